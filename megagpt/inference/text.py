"""From the tokens of a sample to its text, as it comes: whole characters, up to the first stop string.

A stop string ends a sample with the token that completes it, wherever the borders of tokens are. Text that may be the
beginning of one is held back until it is known not to be.
"""

import codecs
from collections.abc import Sequence

from megagpt.errors import UsageError
from megagpt.inference.batch import Sample
from megagpt.tokenizer import Tokenizer


class TextStream:
    """Bytes in, text out."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """`stop`: the stop strings. Raises UsageError for an empty one."""
        if "" in stop:
            raise UsageError("a stop string must not be empty")
        self.stopped = False
        """Whether a stop string was found; nothing comes any more."""
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, content: bytes, final: bool = False) -> str:
        """What can be shown after these bytes. final: no more will come; bytes of half a character become U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(content, final)
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        ready = len(self._held) if final else len(self._held) - self._begun()
        shown, self._held = self._held[:ready], self._held[ready:]
        return shown

    def _begun(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        return next(
            (size for size in range(longest, 0, -1) if any(s.startswith(self._held[-size:]) for s in self._stop)), 0
        )


class TextSample(Sample):
    """A continuation in text. `ended` may be `stop`, too: a stop string, which is not part of the text."""

    def __init__(
        self, prompt_ids: Sequence[int], key: int, max_tokens: int, tokenizer: Tokenizer, stop: Sequence[str] = ()
    ) -> None:
        """It ends before the tokenizer's end-of-document token, too."""
        super().__init__(prompt_ids, key, max_tokens, tokenizer.eod_id)
        self.text = ""
        """So far, without what is held back."""
        self._tokenizer, self._stream = tokenizer, TextStream(stop)

    def take(self, token: int, logprob: float) -> None:
        """Add what was drawn."""
        super().take(token, logprob)
        said = b"" if self.ended == "end" else self._tokenizer.decode_bytes([token])
        self.text += self._stream.push(said, final=self.ended is not None)
        if self._stream.stopped:
            self.ended = "stop"
