"""Many prompts from a JSON Lines file to another, by one or several processes, and again after an interruption.

Input: an object a line with `id` (text or whole number, each once) and `prompt`; other keys are not looked at. Process
r of n takes lines r, r + n, ... and appends what it has finished, a line each, to OUTPUT.part-r-of-n. Whoever finds
that all is there puts the parts together, in the order of the input, as OUTPUT. What is in OUTPUT or in any part is not
done again, whatever the number of processes; OUTPUT.settings.json holds the settings of the job, which must stay the
same, and is what processes lock. All of them must see the same folder, and its locks.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from megagpt.data.atomic import replace_file
from megagpt.errors import UsageError, UserError
from megagpt.inference.batch import Batch, longest, run, worth_compiling
from megagpt.inference.generate import drawable, encode_prompt, positions_needed
from megagpt.inference.sampling import Sampling, sample_key
from megagpt.inference.text import TextSample
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer

Key = tuple[str | int, int]
"""Of an output line: the prompt's id, and the number of the sample."""


class Prompt(NamedTuple):
    """A line of the input."""

    id: str | int
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file. Raises UserError with file and line for what is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    prompts: dict[str | int, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not JSON in UTF-8; write one object a line") from None
        name = record.get("id") if isinstance(record, dict) else None
        if not isinstance(name, str | int) or isinstance(name, bool) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{path}, line {number}: write {{"id": ..., "prompt": "..."}}, id a text or a whole number')
        if name in prompts:
            raise UserError(f"{path}, line {number}: id {name!r} was there before; give each prompt its own")
        prompts[name] = Prompt(name, record["prompt"])
    return list(prompts.values())


class Output:
    """The output of a job as one of its processes sees it, from `with` on."""

    def __init__(self, path: Path, settings: Mapping[str, Any], rank: int = 0, world_size: int = 1) -> None:
        """settings: all that lines depend on, of JSON's types."""
        self.path, self._settings = path, dict(settings)
        self._part = path.with_name(f"{path.name}.part-{rank}-of-{world_size}")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Output":
        """Raises UsageError if the job was begun with other settings; UserError if the output cannot be written."""
        try:
            with self._locked() as file:
                self._check_settings(file)
                self._file = open(self._part, "ab")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self._part}: another process is writing it; wait, or give another output") from None
        # A line that a kill has cut off.
        self._file.truncate(self._part.read_bytes().rfind(b"\n") + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a line, which has `id` and maybe `sample`."""
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._file.flush()

    def done(self) -> set[Key]:
        """The lines that are written, by whichever process."""
        with self._locked():
            return set(self._lines())

    def merge(self, keys: Sequence[Key]) -> bool:
        """If all `keys` are written, put OUTPUT together in their order, and say so; lines of other keys come last."""
        with self._locked():
            lines = self._lines()
            if any(key not in lines for key in keys):
                return False
            order = dict.fromkeys([*keys, *lines])
            replace_file(self.path, b"".join(lines[key] for key in order))
            for part in self._parts():
                part.unlink()
        return True

    def _lines(self) -> dict[Key, bytes]:
        found: dict[Key, bytes] = {}
        for file in [self.path] * self.path.exists() + self._parts():
            # Only "\n" ends a line: a kill may have left half of one behind the last.
            for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
                try:
                    record = json.loads(line)
                    found[record["id"], record.get("sample", 0)] = line + b"\n"
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise UserError(f"{file}, line {number}: not a line of this job; give another output") from None
        return found

    def _parts(self) -> list[Path]:
        return sorted(file for file in self.path.parent.iterdir() if file.name.startswith(f"{self.path.name}.part-"))

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with open(self.path.with_name(f"{self.path.name}.settings.json"), "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _check_settings(self, file: IO[bytes]) -> None:
        file.seek(0)
        content = file.read()
        if not content:
            if self.path.exists():
                raise UsageError(f"{self.path}: exists, and is no job's output ({file.name}); give another output")
            file.write(json.dumps(self._settings, indent=2).encode() + b"\n")
            return
        try:
            before = json.loads(content)
            changed = [name for name in self._settings if self._settings[name] != before.get(name)]
        except (ValueError, AttributeError):
            raise UserError(f"{file.name}: damaged; delete it together with {self.path} and its parts") from None
        if changed:
            name = changed[0]
            raise UsageError(
                f"{self.path}: was begun with {name} {before.get(name)!r}, not {self._settings[name]!r}; "
                "give another output, or delete this one with its settings and parts"
            )


class Share(NamedTuple):
    """What one process of a job has to do."""

    keys: list[Key]
    """Of the whole job, in order."""
    todo: list[tuple[Prompt, int]]
    """Prompts, each with the number of the sample."""


def share(prompts: Sequence[Prompt], samples: int, output: Output, rank: int = 0, world_size: int = 1) -> Share:
    """The part of process `rank`, without what is written already."""
    keys = [(prompt.id, sample) for prompt in prompts for sample in range(samples)]
    done = output.done()
    mine = [(prompt, sample) for prompt in prompts[rank::world_size] for sample in range(samples)]
    return Share(keys, [(prompt, sample) for prompt, sample in mine if (prompt.id, sample) not in done])


def sample_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    todo: Sequence[tuple[Prompt, int]],
    sampling: Sampling,
    *,
    batch_size: int,
    max_tokens: int,
    seed: int = 0,
    stop: Sequence[str] = (),
    slide: bool = False,
    logprobs: bool = False,
    compile: bool | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the lines of samples as they end, `batch_size` at a time running.

    A sample depends on seed, its prompt's id and text, and its number, not on what it runs beside. `compile`:
    whether to compile the step; None: if it is worth it. Raises UsageError for a prompt that does not fit the model,
    before any work.
    """
    waiting: dict[TextSample, tuple[Prompt, int]] = {}
    for prompt, number in todo:
        ids = encode_prompt(tokenizer, prompt.text)
        try:
            most = longest(model.config, len(ids), max_tokens, slide)
        except UsageError as error:
            raise UsageError(f"prompt {prompt.id!r}: {error}") from None
        waiting[TextSample(ids, sample_key(seed, prompt.id, number), most, tokenizer, stop)] = (prompt, number)
    if not waiting:
        return
    rows = min(batch_size, len(waiting))
    batch = Batch(
        model,
        sampling,
        rows,
        positions_needed(model, list(waiting)),
        allowed=drawable(tokenizer, model),
        compile=worth_compiling(list(waiting), rows) if compile is None else compile,
    )
    for running in run(batch, iter(list(waiting))):
        for sample in running:
            if sample.ended:
                assert isinstance(sample, TextSample)
                prompt, number = waiting.pop(sample)
                cut_off = sample.ended == "length" and len(sample.tokens) < max_tokens
                record: dict[str, Any] = {
                    "id": prompt.id,
                    "sample": number,
                    "text": sample.text,
                    "ended": "context" if cut_off else sample.ended,
                    "prompt_tokens": len(sample.prompt_ids),
                    "tokens": len(sample.tokens),
                }
                if logprobs:
                    record |= {"token_ids": sample.tokens, "logprobs": sample.logprobs}
                yield record
