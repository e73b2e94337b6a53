"""The frame around every command: one-line errors and exit codes (2 bad usage or configuration, 1 failure).

A command module builds a typer app and ends with `if __name__ == "__main__": run_command(app)`. Only UserError and
usage errors are turned into one line; any other exception is a bug and keeps its traceback.
"""

import errno
import io
import os
import signal
import sys
from typing import Any, NoReturn

import typer

from megagpt.errors import UserError
from tools.interrupt import interrupt_as_usual

# typer carries click inside since 0.2x, so the class is found through one that typer has always exported.
_USAGE_ERROR: type[Any] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def single_command(function, name: str) -> typer.Typer:  # type: ignore[no-untyped-def]
    """A typer app of one command, called `name` in its help ("python -m tools.preprocess")."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name)(function)
    return app


def run_command(app: typer.Typer, prog_name: str) -> NoReturn:
    """Run `app` on sys.argv; print a user's error as one line on stderr; exit."""
    try:
        interrupt_as_usual()
        # What the terminal or file cannot show becomes "?"; an output is never cut off by an UnicodeEncodeError.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        result = app(prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
        if code == 130:  # what newer typers make of an interrupt
            fail("interrupted", code)
    except UserError as error:
        code = fail(str(error), error.exit_code)
    except _USAGE_ERROR as error:
        code = fail(f"{' '.join(error.format_message().split())} See {prog_name} --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output went away (`... | head`): not our failure, and nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = fail(f"cannot write the output: {error.strerror}", 1)
    sys.exit(code)


def fail(message: str, code: int) -> int:
    """Print `error: message` on stderr and return `code`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def end_when_asked_to(message: str = "terminated") -> None:
    """From now on SIGTERM and SIGHUP end the command in this line, where it is: so that it leaves nothing half-made.

    No `except Exception` holds the SystemExit up, which they raise.
    """

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(fail(message, 128 + number))

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, end)
