"""Files that torch.save wrote, read as data: tensors, numbers, texts and containers of them, never code.

A pickle can name any function to be called while it is read. torch.load(weights_only=True) calls none but those that
make tensors; classes of other programs, in which a file keeps settings, must be named one by one. What names anything
else is refused.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagpt.errors import UserError


class Inert:
    """Stands in for a class of another program: it has the attributes that were saved, and none of the behaviour."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def read_torch_file(path: Path, classes: Mapping[str, type] | None = None, map_location: Any = "cpu") -> Any:
    """The content of the file at `path`; on the CPU memory-mapped: what is not used costs no memory.

    classes: what stands for the classes that the file may name, by their full name; without it only data is read.
    Raises UserError for a file that cannot be read, is none of torch's, or names anything else.
    """
    known: list[Any] = [(cls, name) for name, cls in (classes or {}).items()]
    try:
        mapped = map_location == "cpu" and zipfile.is_zipfile(path)  # torch before 1.6 wrote no zip files
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: is not loaded, since it would call {named[1]}: a file of weights has no need for that; "
                "get it from its author as safetensors"
            ) from None
        raise _unreadable(path, "not a file that torch saved") from None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, f"not a file that torch saved ({str(error).splitlines()[0]})") from error


def foreign_names(path: Path) -> list[str]:
    """The classes and functions that the file at `path` names, beside those of data. Raises UserError."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (RuntimeError, ValueError, EOFError) as error:
        raise _unreadable(path, f"not a file that torch saved ({str(error).splitlines()[0]})") from error


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; the file is damaged, or of another program: copy it again")
