"""python -m tools.train_tokenizer: an own byte-level BPE from text, as one file that tiktoken can read."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megagpt.corpus.finding import find_files
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import HARMLESS, BadRecord, ReadCount
from megagpt.corpus.sources import Piece, SourceFile, one_line
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import TOKENIZER_NAMES, load_tokenizer
from megagpt.tokenizer.ranks import write_rank_file
from megagpt.tokenizer.training import MIN_VOCAB_SIZE, train_bpe
from tools.command import run_command, single_command

PROGRAM = "python -m tools.train_tokenizer"
PIECE_BYTES = 1 << 20  # so much at once, of a file of which parts can be read and of a document


def main(
    inputs: Annotated[list[str], typer.Option("--input", help="File, folder or glob pattern of text; repeatable.")],
    output: Annotated[Path, typer.Option(help="File to write; give its path as --tokenizer to other commands.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="MORE", help="More inputs, as a shell expands a pattern to.")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=MIN_VOCAB_SIZE, help="Entries, 256 bytes and the end-of-document token included.")
    ] = 32768,
    sample_megabytes: Annotated[
        float, typer.Option(min=0.001, help="Most text to train on, in MB; every part of the input gives its share.")
    ] = 100,
    text_key: Annotated[str, typer.Option(help="Key or column of the text in .jsonl, Parquet, Arrow.")] = "text",
) -> None:
    """Train a byte-level BPE with GPT-2's split pattern; the same input gives the same file.

    Reads what tools.preprocess reads: .jsonl, Parquet, Arrow, HTML, WARC and WET, plain text; see its --help.

    Example: python -m tools.train_tokenizer --input 'corpus/*.jsonl' --vocab-size 8192 --output data/bpe.tiktoken
    """
    if output.is_dir():
        raise UsageError(f"--output {one_line(output)}: is a folder; name a file in it, such as bpe.tiktoken")
    if output.stem in TOKENIZER_NAMES:
        raise UsageError(f"--output {one_line(output)}: {output.stem} names another tokenizer; choose another name")
    start = time.monotonic()
    sample = Sample(find_files([*inputs, *(more or [])], written=[output]), int(sample_megabytes * 1e6), text_key)
    try:
        ranks = train_bpe(sample, vocab_size)
    except UserError as error:
        raise UserError(f"{error}{sample.left_out()}") from error
    try:
        write_rank_file(ranks, output)
    except OSError as error:
        raise UserError(f"{one_line(output)}: cannot be written: {error.strerror}") from error
    print(f"{one_line(output)}: {vocab_size:,} entries, sha256 {load_tokenizer(output).vocab_sha256}")
    print(f"  trained on {sample.bytes / 1e6:.2f} MB of text in {time.monotonic() - start:.1f} s{sample.left_out()}")


class Sample:
    """Documents from all over the files, of about `target_bytes` together; reads little more than it gives.

    Every file gives a share as large as its part of the input: one that can be cut gives it from all over, another
    from its beginning. Iterate once. Documents are whole up to PIECE_BYTES; what exceeds the target is less than that.
    """

    def __init__(self, files: list[SourceFile], target_bytes: int, text_key: str) -> None:
        self._pieces = [piece for index, file in enumerate(files) for piece in _pieces(file, index)]
        self._share = target_bytes / max(1, sum(file.size for file in files))
        self._text_key = text_key
        self.bytes = 0
        """Bytes of text given so far."""
        self._bad = 0
        self._first_bad = ""

    def __iter__(self) -> Iterator[str]:
        passed = 0
        for piece in self._pieces:
            passed += piece.stop - piece.start
            target = self._share * passed
            if self.bytes >= target:
                continue
            for text in self._texts(piece):
                content = text.encode()[: max(PIECE_BYTES, int(target) - self.bytes)]
                self.bytes += len(content)
                yield content.decode(errors="ignore")
                if self.bytes >= target:
                    break

    def left_out(self) -> str:
        """What was met that should be a document and is not, to be added to a message; "" if there was nothing."""
        return f"; left out {self._bad:,} bad records, the first: {self._first_bad}" if self._bad else ""

    def _texts(self, piece: Piece) -> Iterator[str]:
        try:
            for record in read_piece(piece, self._text_key, ReadCount()):
                if not isinstance(record, BadRecord):
                    yield record.text
                elif record.reason not in HARMLESS:
                    self._bad += 1
                    where = (
                        f"{one_line(piece.file.name)}, {'row' if piece.file.is_columnar else 'byte'} {record.position}"
                    )
                    self._first_bad = self._first_bad or f"{where}: {record.reason} ({record.detail})"
        except OSError as error:
            raise UserError(f"{one_line(piece.file.name)}: cannot be read: {error.strerror}") from error


def _pieces(file: SourceFile, index: int) -> Iterator[Piece]:
    step = PIECE_BYTES if file.is_splittable else max(1, file.size)
    for start in range(0, file.size, step):
        yield Piece(file, index, start, min(start + step, file.size))


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
