"""python -m tools.config_docs: write docs/configuration.md and its like for corpora and studies from the schemas."""

from pathlib import Path
from typing import Annotated

import typer

from megagpt.config.reference import reference
from megagpt.corpus.config import CorpusConfig
from megagpt.errors import UserError
from megagpt.scaling.laws.study import LawsConfig
from megagpt.scaling.study import StudyConfig
from tools.command import run_command, single_command

PROGRAM = "python -m tools.config_docs"
_CORPUS_HEAD = """\
# Configuration of a corpus

<!-- Written by `python -m tools.config_docs` from megagpt/corpus/config.py; change that file and run it again. -->

What `python -m tools.preprocess` does is configured by a YAML file (configs/data/ has some for several kinds of text)
and by flags, which win:

    python -m tools.preprocess --config configs/data/web.yaml --input 'crawl/*.warc.gz' --output data/web

`execution`, `output` and `max_bad` never change a byte of the dataset; all else does, and is in its manifest.
"""
_STUDY_HEAD = """\
# Configuration of a scaling study

<!-- Written by `python -m tools.config_docs` from megagpt/scaling/study.py; change that file and run it again. -->

What `python -m tools.scaling` measures is configured by a YAML file (configs/scaling/ has some) and by `key=value`
arguments, which win; `section.key=value` is a key of the runs' own configuration, for all of them:

    python -m tools.scaling strong configs/scaling/gpu.yaml --output runs/scaling/gpu repeats=1 train.micro_batch_size=8
"""
_LAWS_HEAD = """\
# Configuration of a scaling-law study

<!-- Written by `python -m tools.config_docs` from megagpt/scaling/laws/study.py; change that file and run it again. -->

What `python -m tools.scaling laws` trains is configured by a YAML file (configs/scaling/laws_cpu.yaml, say) and by
`key=value` arguments, which win; `section.key=value` is a key of the runs' own configuration, for all of them:

    python -m tools.scaling laws configs/scaling/laws_cpu.yaml --output runs/scaling/laws lr=5e-3 train.seed=1
"""


def pages() -> dict[str, str]:
    """The pages by their names."""
    return {
        "configuration.md": reference(),
        "corpus_configuration.md": reference(CorpusConfig, _CORPUS_HEAD),
        "scaling_configuration.md": reference(StudyConfig, _STUDY_HEAD),
        "laws_configuration.md": reference(LawsConfig, _LAWS_HEAD),
    }


def main(
    folder: Annotated[Path, typer.Option(help="Where the pages are written.")] = Path("docs"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a page is not current.")] = False,
) -> None:
    """Write the reference of all configuration keys from the schemas' types and docstrings.

    Example: python -m tools.config_docs --check
    """
    for name, page in pages().items():
        path = folder / name
        try:
            if not check:
                path.write_text(page, encoding="utf-8")
            elif path.read_text(encoding="utf-8") != page:
                raise UserError(f"{path}: not current; run {PROGRAM}")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
