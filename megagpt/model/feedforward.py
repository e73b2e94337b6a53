"""Feed-forward block: linear, activation, linear; or SwiGLU (Shazeer 2020), where one half gates the other."""

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig


class FeedForward(nn.Module):
    """(batch, seq, hidden) -> (batch, seq, hidden), with config.ffn_size in between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        if self.activation == "swiglu":
            self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the block to every position on its own."""
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(hidden_states)) * self.up(hidden_states))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down(F.gelu(self.up(hidden_states), approximate=approximate))
