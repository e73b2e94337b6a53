"""Conversations to a token dataset with a loss mask, for supervised fine-tuning: what is not said is not learned.

A line of .jsonl is {"messages": [{"role": "system|user|assistant", "content": "..."}]} or {"prompt": "...", "response"
or "completion": "..."}, and becomes one document by a chat template. PREFIX.mask has one byte a token: 1 for what the
template marks as learned and for the end-of-document token after an assistant's message, else 0. Segments that are
learned and that are not are encoded apart, so that every token belongs to one of them; what spells a special token in
a message is ordinary text. One pass in one thread; memory does not grow with the number of conversations.
"""

import hashlib
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

import megagpt
from megagpt.config.schema import Section
from megagpt.corpus.chat_template import ChatTemplate, Segment, load_template
from megagpt.corpus.config import TRAIN, VALIDATION
from megagpt.corpus.executor import Observer, Progress
from megagpt.corpus.finding import find_files
from megagpt.corpus.hashing import collapse_whitespace, text_hash
from megagpt.corpus.output import check_replaceable, finished, publishing, reserved, write_tokenizer
from megagpt.corpus.quarantine import QUARANTINE_NAME, check_bad_ratio
from megagpt.corpus.reading import DEFAULT_MAX_BYTES, json_type, parse_object, read_piece
from megagpt.corpus.records import HARMLESS, TOO_LARGE, BadRecord, BadRecordError, Document, ReadCount
from megagpt.corpus.sources import Piece, SourceFile, one_line
from megagpt.corpus.splits import draws, nominal_bounds, settled_bounds, split_of
from megagpt.corpus.workspace import Receipt
from megagpt.data.indexed import IndexedDatasetWriter, token_dtype
from megagpt.data.manifest import FileChecksum, Manifest, SplitInfo
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.fast import DocumentEncoder

TEMPLATE_NAME = "chat_template.jinja"
"""The template's source in the dataset's folder."""

ROLES = ("system", "user", "assistant")

_VERSION = 1  # of what comes out of the same input
_LIBRARIES = ("jinja2", "numpy", "orjson", "tiktoken", "xxhash", "zstandard")
_SPLITS = (TRAIN, VALIDATION)  # by number of split
_TOKENS_AT_ONCE = 1 << 20
_PROGRESS_BYTES = 1 << 20
_SECONDS_BETWEEN_REPORTS = 0.1

Message = dict[str, str]


class ChatConfig(Section):
    """What to make of which conversations."""

    input: list[str] = Field(min_length=1)
    """Files, folders, patterns and lists of .jsonl, as of preprocessing."""
    output: str = Field(min_length=1)
    """Folder of the dataset."""
    tokenizer: str = "gpt2"
    """Name of a tiktoken encoding, `bytes`, or the file of an own BPE."""
    vocab_dir: str | None = None
    """Folder to look for vocabulary files in first."""
    template: str = "chatml"
    """`chatml`, `plain`, or the file of a Jinja template."""
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of the conversations that go to the split `validation`, drawn by the hash of their content."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the split."""
    max_tokens: int | None = Field(None, gt=1)
    """Most tokens of a conversation, end-of-document included: longer ones are left out; null: no limit."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of bad lines above which the run fails."""


@dataclass(frozen=True)
class ChatReport:
    """What was made."""

    output: Path
    splits: dict[str, SplitInfo]
    counts: dict[str, int]
    """conversations (well-formed ones), too_long (of those, left out), bad and harmless lines, learned_tokens of all
    splits, and learned_tokens_SPLIT."""
    seconds: float
    was_finished: bool = False
    """Whether an earlier run of the same plan had made it."""


def prepare_chat(config: ChatConfig, observe: Observer = lambda _: None, overwrite: bool = False) -> ChatReport:
    """Make the dataset `config.output`: train.* and validation.*, each .bin, .idx and .mask, and what describes them.

    The folder appears when it is complete. If it is already the dataset of the same input and settings, nothing is
    done. observe: called with the progress. overwrite: replace an existing dataset.

    Raises:
        UsageError: the template or the tokenizer cannot be used.
        UserError: the input, the output folder or the disk do not allow it; too many lines are no conversations (their
            list is then left beside the output); none is left.
    """
    start = time.monotonic()
    output = Path(config.output).resolve()
    template = load_template(config.template)
    tokenizer = load_tokenizer(config.tokenizer, config.vocab_dir)
    files = _find(config.input, output)
    run = _Run(config, template, tokenizer, files)
    if not overwrite and (manifest := finished(output, run.hash)):
        check_bad_ratio(
            output / QUARANTINE_NAME, manifest.counts["bad"], manifest.counts["conversations"], config.max_bad
        )
        seconds = time.monotonic() - start
        return ChatReport(Path(config.output), manifest.splits, manifest.counts, seconds, was_finished=True)
    rejects = output.with_name(f"{output.name}.{QUARANTINE_NAME}")
    with reserved(output):
        check_replaceable(output, overwrite)
        with publishing(output, run.hash, overwrite) as folder:
            written = _write(run, folder, observe)
            _check(written, folder, rejects, config.max_bad)
            _describe(run, written, folder)
        rejects.unlink(missing_ok=True)  # of an earlier run
    return ChatReport(Path(config.output), written.splits, dict(written.counts), time.monotonic() - start)


def conversation(values: dict[str, Any]) -> list[Message]:
    """The messages of one record, role and content; what else it holds is not looked at.

    BadRecordError: it is no conversation in which the assistant says something.
    """
    if "messages" in values:
        messages = _messages(values["messages"])
    elif "prompt" in values:
        answers = [key for key in ("response", "completion") if key in values]
        if len(answers) != 1:
            raise BadRecordError(
                "missing key" if not answers else "ambiguous", "a prompt needs either 'response' or 'completion'"
            )
        messages = [
            {"role": "user", "content": _text(values["prompt"], "'prompt'")},
            {"role": "assistant", "content": _text(values[answers[0]], repr(answers[0]))},
        ]
    else:
        keys = ", ".join(map(repr, list(values)[:5]))
        raise BadRecordError("missing key", f"neither 'messages' nor 'prompt' among {keys}")
    spoken = [message["content"] for message in messages if message["role"] == "assistant"]
    if not spoken:
        raise BadRecordError("nothing to learn", "no message of the assistant")
    if any(not content or content.isspace() for content in spoken):
        raise BadRecordError("empty answer", "a message of the assistant has no text but whitespace")
    return messages


def encode_conversation(
    segments: Sequence[Segment], ends_with_answer: bool, encoder: DocumentEncoder, eod_id: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """The token ids of a document and its loss mask, 1 for learned ones: (tokens) each.

    segments: at least one. The document ends with one end-of-document token, learned if `ends_with_answer` or the
    template says so.
    """
    is_ended = segments[-1].text is None
    last = Segment(None, ends_with_answer or (is_ended and segments[-1].learned))
    whole = [*(segments[:-1] if is_ended else segments), last]
    end = np.array([eod_id], np.uint32)
    parts = [end if segment.text is None else encoder.encode(segment.text) for segment in whole]
    learned = [np.full(part.size, segment.learned, np.uint8) for part, segment in zip(parts, whole, strict=True)]
    return np.concatenate(parts), np.concatenate(learned)


@dataclass(frozen=True)
class _Run:
    """What is known before anything is written."""

    config: ChatConfig
    template: ChatTemplate
    tokenizer: Tokenizer
    files: list[SourceFile]

    @property
    def settings(self) -> dict[str, Any]:
        """What of the configuration shapes the result."""
        return self.config.model_dump(mode="json", exclude={"output", "max_bad", "vocab_dir"})

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries that shape the result."""
        return {"megagpt": megagpt.__version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}

    @property
    def hash(self) -> str:
        """sha256 of all that shapes the result."""
        identity = {
            "chat": _VERSION,
            "config": {key: value for key, value in self.settings.items() if key != "input"},
            "template": self.template.source,
            "files": [file.identity for file in self.files],
            "vocabulary": [self.tokenizer.vocab_sha256, self.tokenizer.vocab_size, self.tokenizer.eod_id],
            "versions": self.versions,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _find(inputs: Sequence[str], output: Path) -> list[SourceFile]:
    """The input, each file to be read line by line. UsageError: a file is not .jsonl by its name."""
    files = find_files(inputs, written=[output])
    for file in files:
        if file.kind != "jsonl" and not file.obstacle:
            raise UsageError(
                f"input {one_line(file.name)}: is not .jsonl by its name (or .jsonl.gz, .jsonl.zst, ...); write a "
                "conversation a line, and name only such files"
            )
    return [replace(file, format="text", text_unit="line") for file in files]


def _write(run: _Run, folder: Path, observe: Observer) -> "_Pass":
    """Write the splits and the quarantine; none of the splits is empty as far as there are conversations enough."""
    fraction = run.config.validation_fraction
    nominal = nominal_bounds({VALIDATION: fraction} if fraction else {})
    written = _Pass(run, nominal, folder)
    written.read(observe)
    documents = [written.splits[name].documents if name in written.splits else 0 for name in _SPLITS]
    extremes = np.array([written.smallest_draw, written.largest_draw], np.uint64)
    settled = settled_bounds(nominal, documents[: len(nominal) + 1], lambda: [extremes] if any(documents) else [])
    if settled != nominal:  # a small input: it is read once more
        for path in folder.iterdir():
            path.unlink()
        written = _Pass(run, settled, folder)
        written.read(observe)
    return written


class _Encoded(NamedTuple):
    """A document that is not yet written."""

    hash: int
    """Of the conversation's content."""
    tokens: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.uint8]


class _Pass:
    """Reads the whole input once, and writes the splits and the quarantine into `folder`."""

    def __init__(self, run: _Run, bounds: Sequence[int], folder: Path) -> None:
        self._run, self._bounds, self._folder = run, bounds, folder
        self._encoder = DocumentEncoder(run.tokenizer)
        self._dtype = token_dtype(run.tokenizer.vocab_size)
        self._writers: dict[int, IndexedDatasetWriter] = {}
        self._waiting: list[_Encoded] = []
        self._waiting_tokens = 0
        self.counts = Counter(dict.fromkeys(("conversations", "too_long", "bad", "harmless", "learned_tokens"), 0))
        self.splits: dict[str, SplitInfo] = {}
        """Counts of the splits that have documents."""
        self.smallest_draw, self.largest_draw = 2**64 - 1, 0
        """Of the conversations that stay."""

    def read(self, observe: Observer) -> None:
        """Do it. UserError: a file cannot be read, or the disk refuses."""
        progress = _ReadingProgress(self._run.files, observe)
        with ExitStack() as stack:
            rejects = stack.enter_context(open(self._folder / QUARANTINE_NAME, "w", encoding="ascii"))
            for number, file in enumerate(self._run.files):
                count = ReadCount()
                for record in _records(Piece(file, number, 0, file.size), count):
                    try:
                        self._add(record)
                    except BadRecordError as bad:
                        reason, detail = bad.args
                        self.counts["harmless" if reason in HARMLESS else "bad"] += 1
                        line = record.line if isinstance(record, BadRecord) else count.lines
                        entry = {"file": file.name, "line": line, "byte": record.position, "row": None}
                        rejects.write(json.dumps({**entry, "reason": reason, "detail": detail}) + "\n")
                    if self._waiting_tokens >= _TOKENS_AT_ONCE:
                        self._write_waiting(stack)
                    progress.show(number, count, self.counts)
                progress.finish(number, self.counts)
            self._write_waiting(stack)
        for split, writer in sorted(self._writers.items()):
            self.splits[_SPLITS[split]] = SplitInfo(
                documents=writer.num_documents, sequences=writer.num_sequences, tokens=writer.num_tokens
            )

    def _add(self, record: Document | BadRecord) -> None:
        """Encode a conversation, to be written soon. BadRecordError: it is none."""
        if isinstance(record, BadRecord):
            raise BadRecordError(record.reason, _detail(record))
        messages = conversation(parse_object(record.text.encode()))
        segments = self._run.template.render(messages)
        if not any(segment.learned and segment.text for segment in segments):
            raise BadRecordError("nothing to learn", "the template marks nothing of it as learned")
        eod_id = self._run.tokenizer.eod_id
        tokens, mask = encode_conversation(segments, messages[-1]["role"] == "assistant", self._encoder, eod_id)
        self.counts["conversations"] += 1
        if self._run.config.max_tokens is not None and tokens.size > self._run.config.max_tokens:
            self.counts["too_long"] += 1
        else:
            self._waiting.append(_Encoded(_content_hash(messages), tokens, mask))
            self._waiting_tokens += tokens.size

    def _write_waiting(self, stack: ExitStack) -> None:
        """Write what was encoded to the splits, whose files `stack` will close."""
        drawn = draws(np.array([document.hash for document in self._waiting], np.uint64), self._run.config.seed)
        self.smallest_draw = min([self.smallest_draw, *drawn.tolist()])
        self.largest_draw = max([self.largest_draw, *drawn.tolist()])
        splits = split_of(drawn, self._bounds)
        for split in np.unique(splits).tolist():
            if split not in self._writers:
                writer = IndexedDatasetWriter(self._folder / _SPLITS[split], self._dtype, loss_mask=True)
                self._writers[split] = stack.enter_context(writer)
            documents = [self._waiting[index] for index in np.flatnonzero(splits == split)]
            mask = np.concatenate([document.mask for document in documents])
            tokens = np.concatenate([document.tokens for document in documents])
            self._writers[split].add_documents(tokens, [document.tokens.size for document in documents], mask)
            for key in ("learned_tokens", f"learned_tokens_{_SPLITS[split]}"):
                self.counts[key] += int(mask.sum())
        self._waiting, self._waiting_tokens = [], 0


def _records(piece: Piece, count: ReadCount) -> Iterator[Document | BadRecord]:
    """The lines of a file that are not blank."""
    try:
        yield from read_piece(piece, "", count)
    except OSError as error:
        raise UserError(f"{one_line(piece.file.name)}: cannot be read: {error.strerror}") from error


def _check(written: _Pass, folder: Path, rejects: Path, max_bad: float) -> None:
    """UserError if too many lines are bad, or no conversation is left; the list of bad lines is then at `rejects`."""
    bad, conversations = written.counts["bad"], written.counts["conversations"]
    if written.splits and bad <= max_bad * (conversations + bad):
        return
    (folder / QUARANTINE_NAME).replace(rejects)
    check_bad_ratio(rejects, bad, conversations, max_bad)
    raise UserError(
        f"no conversation is left: {bad:,} lines are bad (see {one_line(rejects)}), {written.counts['too_long']:,} "
        "conversations have more tokens than --max-tokens"
    )


def _describe(run: _Run, written: _Pass, folder: Path) -> None:
    """Write the template, a copy of an own tokenizer, and the manifest."""
    (folder / TEMPLATE_NAME).write_text(run.template.source, encoding="utf-8")
    info = write_tokenizer(run.tokenizer, run.config.tokenizer, folder)
    Manifest(
        tokenizer=info,
        splits=written.splits,
        counts=dict(sorted(written.counts.items())),
        checksums={path.name: FileChecksum.of(path) for path in sorted(folder.iterdir())},
        config=run.settings,
        versions=run.versions,
        plan_hash=run.hash,
    ).save(folder)


class _ReadingProgress:
    """Tells an Observer how much of the input is read, in pieces of 1 MiB as it is stored."""

    def __init__(self, files: Sequence[SourceFile], observe: Observer) -> None:
        self._files, self._observe = files, observe
        self._pieces = [-(-file.size // _PROGRESS_BYTES) for file in files]
        self._bytes_before, self._last = 0, 0.0

    def show(self, number: int, count: ReadCount, counts: Counter[str]) -> None:
        """Report, unless it was just done; within a compressed file, only its end tells how much was read."""
        if time.monotonic() - self._last < _SECONDS_BETWEEN_REPORTS:
            return
        within = count.bytes if self._files[number].compression == "none" else 0
        self._report(number, within // _PROGRESS_BYTES, within, counts)

    def finish(self, number: int, counts: Counter[str]) -> None:
        """Report that a file is read."""
        self._report(number, self._pieces[number], self._files[number].size, counts)
        self._bytes_before += self._files[number].size

    def _report(self, number: int, pieces: int, within: int, counts: Counter[str]) -> None:
        self._last = time.monotonic()
        done = sum(self._pieces[:number]) + pieces
        now: Receipt = {
            "documents": counts["conversations"],
            "bytes": self._bytes_before + within,
        }
        self._observe(Progress("chat", sum(self._pieces), done, 0, now, now))


def _messages(values: Any) -> list[Message]:
    if not isinstance(values, list):
        raise BadRecordError("wrong type", f"'messages' is {json_type(values)}, not an array")
    messages = []
    for number, value in enumerate(values, 1):
        where = f"message {number}"
        if not isinstance(value, dict):
            raise BadRecordError("wrong type", f"{where} is {json_type(value)}, not an object")
        for key in ("role", "content"):
            if key not in value:
                raise BadRecordError("missing key", f"{where} has no {key!r}")
        if value["role"] not in ROLES:
            raise BadRecordError("unknown role", f"{where} is of {str(value['role'])[:40]!r}, not {' or '.join(ROLES)}")
        messages.append({"role": value["role"], "content": _text(value["content"], f"the content of {where}")})
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError("wrong type", f"{what} is {json_type(value)}, not a string")
    if "\0" in value:
        raise BadRecordError("NUL character", f"at character {value.index(chr(0))} of {what}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError("lone surrogate", f"at character {error.start} of {what}") from None
    return value


def _content_hash(messages: Sequence[Message]) -> int:
    """A hash of what is said and by whom, however it is written down and whatever the template."""
    said = "\0".join(text for message in messages for text in (message["role"], message["content"]))
    return text_hash(collapse_whitespace(said.encode()))[0]


def _detail(record: BadRecord) -> str:
    """Why a line could not be read, without naming an option that this command does not have."""
    if record.reason == TOO_LARGE:
        return f"more than the {DEFAULT_MAX_BYTES:,} bytes that a line may have"
    return record.detail
