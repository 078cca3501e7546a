"""Where the package keeps the files that it makes itself."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, Callable

from iopath.common.file_io import file_lock

from .errors import DatasetError


def cache_dir() -> Path:
    """
    Returns:
        The folder named by the environment variable ``SMCA_CACHE``, else
        ``~/.cache/smca``. It need not exist yet.
    """
    return Path(os.environ.get("SMCA_CACHE") or "~/.cache/smca").expanduser().absolute()


def create_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Make sure that `path` exists, whole: several processes may call this at the same time (one
    writes, the others wait), and one that is killed leaves nothing under `path`.

    Args:
        path: file or folder to create unless it is there.
        write: creates the file or folder under the temporary path that it is given.

    Raises:
        DatasetError: the cache folder cannot be written to.
    """
    if path.exists():  # asked without the lock first: a finished cache may be read-only
        return
    partial = path.with_name(path.name + ".partial")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(str(path)))
        except OSError as error:
            raise DatasetError(
                f"The cache folder {path.parent} cannot be written to ({error}): set the "
                "environment variable SMCA_CACHE to a folder that can be."
            ) from error
        if path.exists():
            return
        if partial.is_dir():
            shutil.rmtree(partial)  # what a killed process left
        write(partial)
        os.replace(partial, path)
