"""python -m tools.config_docs: write docs/configuration.md from the configuration's schema."""

from pathlib import Path
from typing import Annotated

import typer

from megagpt.config.reference import reference
from megagpt.errors import UserError
from tools.command import run_command, single_command

PROGRAM = "python -m tools.config_docs"


def main(
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/configuration.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page is not current.")] = False,
) -> None:
    """Write the reference of all configuration keys from the schema's types and docstrings.

    Example: python -m tools.config_docs --check
    """
    page = reference()
    try:
        if not check:
            output.write_text(page, encoding="utf-8")
        elif output.read_text(encoding="utf-8") != page:
            raise UserError(f"{output}: not current; run {PROGRAM}")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}") from error


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
