"""A conversation with a model that was fine-tuned on conversations, in the template and tokens of its training."""

from collections.abc import Iterator, Sequence

from megagpt.corpus.chat_template import ChatTemplate
from megagpt.inference.batch import Batch, longest, run
from megagpt.inference.generate import drawable, positions_needed
from megagpt.inference.sampling import Sampling, sample_key
from megagpt.inference.text import TextSample
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer

_LEAST_POSITIONS = 1024
_END_OF_TURN = {"chatml": ("<|im_end|>",)}


class Conversation:
    """What was said so far, of which the model reads as many of the last turns as fit its context."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        sampling: Sampling,
        template: ChatTemplate,
        *,
        max_tokens: int,
        seed: int = 0,
        stop: Sequence[str] = (),
        compile: bool | None = None,
    ) -> None:
        """compile: whether to compile the step of decoding, at the first answer; None: no.

        An answer ends before the end-of-document token, one of `stop`, or chatml's <|im_end|>."""
        self.messages: list[dict[str, str]] = []
        self._model, self._tokenizer, self._sampling, self._template = model, tokenizer, sampling, template
        self._max_tokens, self._seed, self._turn = max_tokens, seed, 0
        self._stop = (*stop, *_END_OF_TURN.get(template.name, ()))
        self._compile = bool(compile)
        self._batch = self._row(1)

    def say(self, content: str) -> Iterator[str]:
        """Say something; yield the answer as it comes. Raises UsageError for what is longer than the context."""
        asked = {"role": "user", "content": content}
        prompt_ids = self._prompt(asked)
        most = longest(self._model.config, len(prompt_ids), self._max_tokens, slide=False)
        sample = TextSample(prompt_ids, sample_key(self._seed, self._turn), most, self._tokenizer, self._stop)
        self._turn += 1
        needed = positions_needed(self._model, [sample])
        if needed > self._batch.max_len:
            self._batch = self._row(needed)
        shown = 0
        for _ in run(self._batch, iter([sample])):
            yield sample.text[shown:]
            shown = len(sample.text)
        self.messages += [asked, {"role": "assistant", "content": sample.text}]

    def _row(self, positions: int) -> Batch:
        """For so many positions, or for up to twice as many, so that not every answer needs another one."""
        room = min(self._model.config.max_seq_len, max(_LEAST_POSITIONS, 1 << (positions - 1).bit_length()))
        allowed = drawable(self._tokenizer, self._model)
        return Batch(self._model, self._sampling, 1, room, allowed=allowed, compile=self._compile)

    def _prompt(self, asked: dict[str, str]) -> list[int]:
        """The tokens of the conversation, without its oldest exchanges where they leave no room for an answer."""
        room = self._model.config.max_seq_len - min(self._max_tokens, self._model.config.max_seq_len // 2)
        for start in range(0, len(self.messages) + 1, 2):
            ids = self._encoded([*self.messages[start:], asked])
            if len(ids) <= room:
                break
        return ids

    def _encoded(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """As megagpt.corpus.chat encodes a conversation: what is learned apart from what is not."""
        segments = self._template.render(messages, add_generation_prompt=True)
        parts = [[self._tokenizer.eod_id] if s.text is None else self._tokenizer.encode(s.text) for s in segments]
        return [token for part in parts for token in part]
