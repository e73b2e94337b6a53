"""Causal self-attention: multi-head, or grouped-query (Ainslie et al. 2023), in which documents may be apart.

One matrix product makes queries, keys and values: its rows are [all query heads | all key heads | all value heads],
and query head h reads key-value head h // (num_attention_heads / num_kv_heads), as in Llama.
torch's SDPA computes it, but compiled in bf16 on CPUs, where products of strips of the matrices are faster. It can keep
documents apart by a (batch, 1, seq, seq) mask, read whole in every layer; FlexAttention (Dong et al. 2024) skips what
is masked, in blocks of 128 x 128, but only compiled and on GPUs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from megagpt.config.schema import ModelConfig
from megagpt.model.positions import Rotary, apply_rotary, document_starts

FlexKernel = Callable[..., Tensor]
"""torch.nn.attention.flex_attention.flex_attention, compiled or not."""

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""By the words of train.attention_kernel."""

_BLOCK_SIZE = 128
_STRIPS_UP_TO = 1024  # positions: their scores are stored, which grows with the square


class BlockSparseMask(NamedTuple):
    """What a BlockMask is made of, apart from its function, so that hooks and compilers see nothing but tensors.

    first_keys: (batch, seq) int32, the first key each query may see; its last one is itself.
    The others count and list, for each block of queries (kv) or keys (q), the blocks it meets of the other kind:
    (batch, 1, blocks) and (batch, 1, blocks, blocks) int32. In the `full` ones, every query sees every key.
    """

    first_keys: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor

    def block_mask(self) -> BlockMask:
        """As FlexAttention takes it."""
        first_keys, seq_len = self.first_keys, self.first_keys.shape[1]

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (first_keys[batch, query] <= key) & (key <= query)

        return BlockMask(
            seq_lengths=(seq_len, seq_len),
            kv_num_blocks=self.kv_num_blocks,
            kv_indices=self.kv_indices,
            full_kv_num_blocks=self.full_kv_num_blocks,
            full_kv_indices=self.full_kv_indices,
            q_num_blocks=self.q_num_blocks,
            q_indices=self.q_indices,
            full_q_num_blocks=self.full_q_num_blocks,
            full_q_indices=self.full_q_indices,
            BLOCK_SIZE=(_BLOCK_SIZE, _BLOCK_SIZE),
            mask_mod=visible,
        )


class LayerCache(Protocol):
    """Keys and values of the earlier positions of one layer."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (batch, kv_heads, seq, head_dim); return those to attend to."""


class Attention(nn.Module):
    """(batch, seq, hidden) -> (batch, seq, hidden)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.flex_kernel: FlexKernel | None = None
        self.sums_at_one_position = False
        self.sdpa_kernel: SDPBackend | None = None
        qkv_size = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, qkv_size, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | BlockSparseMask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend to this and all earlier positions, or to those that `mask` allows.

        mask: see attention_mask and block_sparse_mask; the latter's needs `flex_kernel` to be set, and no dropout.
        """
        batch, seq, _ = hidden_states.shape
        heads = self.qkv(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        attended = self._attend(query, key, value, mask)
        return self.out(attended.transpose(1, 2).reshape(batch, seq, -1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockSparseMask | None) -> Tensor:
        """(batch, heads, seq, head_dim), twice with kv_heads instead -> (batch, heads, seq, head_dim)."""
        grouped = self.num_kv_heads != self.num_heads
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, BlockSparseMask):
            assert self.flex_kernel is not None
            assert not dropout
            # The other kernel, for decoding, takes the place of this one below 128 tokens, but not all head sizes.
            options = {"FORCE_USE_FLEX_ATTENTION": True}
            return self.flex_kernel(
                query, key, value, block_mask=mask.block_mask(), enable_gqa=grouped, kernel_options=options
            )
        if query.shape[2] == 1 and self.sums_at_one_position:
            return _attend_at_one(query, key, value, mask)
        if grouped and query.shape[2] == 1:
            # The heads of a group become its queries: one position sees all that it may, so they need no order.
            batch, heads, _, head_dim = query.shape
            query = query.view(batch, self.num_kv_heads, -1, head_dim)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            return attended.view(batch, heads, 1, head_dim)
        if self._in_strips(query, key, dropout):
            return _attend_in_strips(query, key, value, mask)
        if grouped and mask is not None:
            # No fused GPU kernel takes a mask and grouped heads together; unfused, SDPA would store seq x seq scores.
            repeats = self.num_heads // self.num_kv_heads
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            grouped = False
        # Evaluation and sampling bring masks and caches that the chosen one may not take.
        with sdpa_kernel(self.sdpa_kernel) if self.sdpa_kernel and self.training else nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and query.shape[2] > 1,
                enable_gqa=grouped,
            )

    def _in_strips(self, query: Tensor, key: Tensor, dropout: float) -> bool:
        """Whether strips are the faster way: 1.4 to 4.9 times SDPA's speed with its backward where this says so."""
        return (
            self.sdpa_kernel is None
            and torch.compiler.is_compiling()
            and query.device.type == "cpu"
            and query.dtype == torch.bfloat16
            and 1 < query.shape[2] == key.shape[2] <= _STRIPS_UP_TO
            and not dropout
        )


def _attend_in_strips(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same as products of matrices, a strip of queries with the keys up to its end at a time, to be compiled.

    SDPA's kernels for CPUs reach a fifth of the speed of matrix products in bf16, their backward less.
    """
    seq_len, repeats = query.shape[2], query.shape[1] // key.shape[1]
    strip = 128 if seq_len <= 256 else 256  # more strips multiply less for nothing, but take longer to compile
    query = query * query.shape[-1] ** -0.5
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    position = torch.arange(seq_len, device=query.device)
    attended = []
    for start in range(0, seq_len, strip):
        end = min(start + strip, seq_len)
        visible = position[start:end, None] >= position[:end] if mask is None else mask[..., start:end, :end]
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~visible, -torch.inf)
        attended.append(scores.softmax(-1).to(value.dtype) @ value[:, :, :end])
    return torch.cat(attended, dim=2)


def _attend_at_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same of one position, as sums that a compiler fuses: SDPA's kernels for CPUs are made for many queries."""
    batch, heads, _, head_dim = query.shape
    groups = query.view(batch, key.shape[1], -1, 1, head_dim).float() * head_dim**-0.5
    scores = (groups * key.unsqueeze(2).float()).sum(-1)  # (batch, kv_heads, heads of a group, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    attended = (scores.softmax(-1).unsqueeze(-1) * value.unsqueeze(2).float()).sum(-2)
    return attended.to(query.dtype).view(batch, heads, 1, head_dim)


def attention_mask(seq_len: int, document_ids: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see: bool (batch, 1, seq_len, seq_len), True where it may; None: the causal rule.

    With document_ids (batch, seq_len) a query sees its own document only.
    """
    if document_ids is None:
        return None
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
    return causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])


def block_sparse_mask(document_ids: Tensor) -> BlockSparseMask:
    """What attention_mask says for document_ids (batch, seq_len), by block: (seq_len / 128)^2 numbers, not seq_len^2.

    An id must not come again later. Computed on the ids' device, without waiting for it.
    """
    starts, seq_len = document_starts(document_ids).int(), document_ids.shape[1]
    first_starts = starts[:, ::_BLOCK_SIZE]  # of the first query of each block
    last_starts = starts[:, _BLOCK_SIZE - 1 :: _BLOCK_SIZE]  # of the last
    # Queries that a short last block lacks see nothing, so that no block of keys is full for it.
    last_starts = F.pad(last_starts, (0, first_starts.shape[1] - last_starts.shape[1]), value=seq_len)
    block = torch.arange(first_starts.shape[1], dtype=torch.int32, device=starts.device)
    first_key = block * _BLOCK_SIZE
    # Starts never fall within a row: the first query of a block sees the furthest back, its last one the least far.
    met = (block <= block[:, None]) & (first_key + _BLOCK_SIZE > first_starts[..., None])
    full = (block < block[:, None]) & (first_key >= last_starts[..., None])
    partial, full = (met & ~full).unsqueeze(1), full.unsqueeze(1)
    return BlockSparseMask(
        starts, *_listed(partial), *_listed(full), *_listed(partial.transpose(2, 3)), *_listed(full.transpose(2, 3))
    )


def _listed(marks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row are marked, and the row's columns, those first: int32."""
    columns = torch.argsort(marks.byte(), dim=-1, descending=True, stable=True)
    return marks.sum(-1, dtype=torch.int32), columns.int().contiguous()


def missing_for_sdpa_kernel(
    config: ModelConfig, kernel: str, masked: bool, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why torch cannot train `config` by one of SDPA_KERNELS on `device`, found out by trying; None: it can.

    masked: with documents kept apart by a mask.
    """
    attention = Attention(config).to(device, dtype)
    attention.sdpa_kernel = SDPA_KERNELS[kernel]
    hidden_states = torch.zeros(1, 64, config.hidden_size, device=device, dtype=dtype)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device).tril() if masked else None
    try:
        attention(hidden_states, mask=mask).sum().backward()
    except RuntimeError as error:  # "No available kernel. Aborting execution."
        return str(error).splitlines()[0].rstrip(".")
    return None


def missing_for_flex_attention(config: ModelConfig, device: torch.device) -> str | None:
    """What FlexAttention lacks to train `config` on `device`; None if nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "an NVIDIA GPU of compute capability 8.0 or higher"
    if config.dropout:
        return f"model.dropout 0, but it is {config.dropout}"
    if not 16 <= config.head_dim <= 128:  # larger ones do not fit every GPU's shared memory
        return f"a head size (hidden_size / num_attention_heads) of 16 to 128, but it is {config.head_dim}"
    if config.head_dim & (config.head_dim - 1) and torch.__version__ < "2.7":
        return f"torch 2.7 or a head size that is a power of two, but it is {config.head_dim}"
    return None
