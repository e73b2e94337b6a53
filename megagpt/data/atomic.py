"""Files that exist only when complete: written aside, fsynced, renamed.

A rename is atomic within one file system, but it is durable only after the folder itself was fsynced.
"""

import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Force what was written to the file or folder at `path` onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Give `path` this content, so that a crash at any moment leaves either the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_path(path.parent)
