"""Files that appear whole or not at all, and checkpoints that are read without running code."""

import codecs
import contextlib
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, List, Union

import numpy as np
import torch
import yaml
from detectron2.utils.file_io import PathManager

from smca.errors import CheckpointError

_TEMPORARY = ".tmp"


class RefusedCode(Exception):
    """The file would run code when it is opened; the message is what it would call."""


def write_atomically(path: str, content: Union[bytes, Callable[[IO[bytes]], Any]]) -> None:
    """Create or replace a file, and its folder, such that it is there whole or as it was before,
    whenever the process is killed, and also after an OSError. `content` is what to write, or a
    function that writes it into the binary file that it is given."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    # The temporary file is in the same folder, so that it can be renamed in one step.
    descriptor, temporary = tempfile.mkstemp(_TEMPORARY, os.path.basename(path) + ".", folder)
    os.close(descriptor)
    try:
        with open(temporary, "wb") as file:  # by name, for a writer that wants that
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except RuntimeError as error:  # PyTorch's, of a full disk for one
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def remove_temporary_files(folder: str) -> None:
    """Remove what :func:`write_atomically` left in a process that was killed."""
    for path in Path(folder).glob(f"*{_TEMPORARY}"):
        if re.search(r"\.[a-z0-9_]{8}\.tmp$", path.name):  # as `tempfile` makes names
            path.unlink()


def read_tag(folder: str) -> str:
    """The file name in ``last_checkpoint``; "" where that is absent, empty or no text."""
    try:
        name = Path(folder, "last_checkpoint").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if name.isprintable() else ""


def by_time(folder: str, pattern: str) -> List[str]:
    """Paths of a folder's files in the order in which they were written; none of a folder that
    cannot be read, since writing into it gives a better error."""
    paths: List[Path] = []
    with contextlib.suppress(PermissionError):
        paths = sorted(Path(folder).glob(pattern), key=lambda p: (p.stat().st_mtime_ns, p.name))
    return list(map(str, paths))


def find_checkpoints(folder: str) -> List[str]:
    """Paths of a run's checkpoints in the order in which to try them: the one that
    ``last_checkpoint`` names (though it may be gone), then from the newest to the oldest, and
    the best only at last."""
    tagged, best = read_tag(folder), os.path.join(folder, "model_best.pth")
    paths = [os.path.join(folder, tagged)] if tagged else []
    paths += reversed(by_time(folder, "model_*.pth"))
    return list(dict.fromkeys(sorted(paths, key=lambda path: path == best)))


def peek(path: str) -> Dict[str, Any]:
    """What a checkpoint holds; its tensors are not read before they are used. Empty for a file that
    cannot be read."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # a broken file can raise anything
        return {}


def load_tensors(path: str) -> Any:
    """Read a file of tensors and plain values, on the CPU, without running code in it; a broken one
    raises errors of many types (:func:`reading`)."""
    if zipfile.is_zipfile(path):  # PyTorch does not look at the checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} in it is damaged")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise
        raise RefusedCode(foreign[1]) from error


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # whose module has another name in NumPy 2


class _ArrayUnpickler(pickle.Unpickler):
    """Knows nothing but arrays and plain values."""

    _ALLOWED = {
        "collections.OrderedDict": OrderedDict,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
        "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
        "_codecs.encode": codecs.encode,  # how old pickles spell bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise RefusedCode(f"{module}.{name}") from None


def load_arrays(path: str) -> Dict[str, Any]:
    """Read a pickle of arrays and plain values like :func:`load_tensors`."""
    with open(path, "rb") as file:
        return _ArrayUnpickler(file, encoding="latin1").load()


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn whatever goes wrong with reading a checkpoint, whose path or URL the user gave, into a
    CheckpointError of one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except RefusedCode as error:
        raise CheckpointError(
            f"The checkpoint {path} would run code when it is opened ({error}), which is "
            "refused: only files of tensors and plain values are read."
        ) from error
    except Exception as error:  # other structures, and damaged ones, raise nearly every type
        problem = f"The checkpoint {os.path.abspath(path)} does not exist."
        if "://" in path and isinstance(error, (OSError, AssertionError)):
            problem = f"{path} cannot be downloaded: give a local copy of it."
        elif os.path.isdir(path):
            problem = f"{path} is a folder: name a checkpoint in it, such as model_best.pth."
        elif "://" in path or os.path.isfile(path):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = reason.split(" In PyTorch")[0].rstrip(".")  # advice that would run code
            problem = (
                f"The checkpoint {path} cannot be read, perhaps it was cut short or is of "
                f"another kind: {reason}."
            )
        raise CheckpointError(problem) from error


def read_published(path: str) -> Dict[str, Any]:
    """What the config.yaml beside the weights of a published detector says; else nothing."""
    content = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        if path.endswith(".safetensors"):
            content = yaml.safe_load(Path(path).with_name("config.yaml").read_text("utf-8"))
    return content if isinstance(content, dict) else {}


def require_file(path: str) -> None:
    """Raise a CheckpointError if there is no such file, or if a URL cannot be downloaded."""
    with reading(path):
        open(PathManager.get_local_path(path), "rb").close()
