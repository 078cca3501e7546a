"""Where the package keeps the files that it makes itself."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Callable

from iopath.common.file_io import file_lock

from smca.errors import DatasetError


def cache_dir() -> Path:
    """The folder that the environment variable ``SMCA_CACHE`` names, else ``~/.cache/smca``."""
    return Path(os.environ.get("SMCA_CACHE") or "~/.cache/smca").expanduser().absolute()


def name_for(source: str, state: object) -> str:
    """A name for what is made of a file or folder in some state; another state has another name."""
    # File systems take 255 bytes.
    return f"{Path(source).stem[:40]}_{hashlib.sha256(str(state).encode()).hexdigest()[:8]}"


def create_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Make sure that a file or folder in the cache exists, whole: `write` creates it under the path
    that it is given. Several processes may call this at the same time (one writes, the others
    wait), and one that is killed leaves nothing under `path`. A cache folder that cannot be written
    to is a DatasetError."""
    partial = path.with_name(path.name + ".partial")
    try:
        if path.exists():  # asked without the lock first: a finished cache may be read-only
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(path)):
            if path.exists():
                return
            if partial.is_dir():
                shutil.rmtree(partial)  # what a killed process left
            write(partial)
            os.replace(partial, path)
    except OSError as error:
        raise DatasetError(
            f"The cache folder {path.parent} cannot be written to ({error}): make room, or set the "
            "environment variable SMCA_CACHE to another folder."
        ) from error
