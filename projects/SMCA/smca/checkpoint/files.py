"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from typing import Iterator, Type

from smca.errors import UserError

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: str, error_type: Type[UserError] = UserError) -> Iterator[str]:
    """A temporary path beside `path`, which takes its place when the block ends without an error.

    Args:
        path: its folder is made if it is not there.
        error_type: of what is raised.

    Raises:
        UserError: `path` cannot be written; where its folder is to blame, before the block runs.
    """
    folder = os.path.dirname(os.path.abspath(path))
    temporary = None
    try:
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder.")
        os.makedirs(folder, exist_ok=True)
        # In the same folder, so that it can be renamed in one step.
        suffix = ".tmp" + os.path.splitext(path)[1]
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=suffix)
        os.close(handle)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise error_type(f"The output {path} cannot be written: {error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
