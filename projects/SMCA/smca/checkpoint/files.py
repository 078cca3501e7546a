"""Files that appear whole or not at all, and checkpoints that are read without running code."""

import codecs
import contextlib
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from typing import IO, Any, Callable, Dict, Iterator, List, Mapping, Optional, Union

import numpy as np
import torch

from smca.errors import CheckpointError

_TEMPORARY = ".tmp"
_NUMBERED = re.compile(r"model_(\d+)\.pth")


class RefusedCode(Exception):
    """The file would run code when it is opened; the message is what it would call."""


def write_atomically(path: str, content: Union[bytes, Callable[[IO[bytes]], Any]]) -> None:
    """Create or replace a file such that it is there whole or as it was before, whenever the
    process is killed.

    Args:
        path: path of the file, whose folder is created if need be.
        content: what to write, or a function that writes it into the binary file that it is given.

    Raises:
        OSError: the file cannot be written. Nothing is left of it then.
    """
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
                _call(content, file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _call(write: Callable[[IO[bytes]], Any], file: IO[bytes]) -> None:
    """PyTorch's writer hides why a file cannot grow; another attempt shows it."""
    try:
        write(file)
    except RuntimeError as error:
        file.write(bytes(1 << 16))
        file.flush()
        raise OSError(str(error).splitlines()[0]) from error


def remove_temporary_files(folder: str) -> None:
    """Remove what :func:`write_atomically` left in a process that was killed."""
    for name in _names(folder):
        if re.search(r"\.[a-z0-9_]{8}\.tmp$", name):  # as `tempfile` makes names
            os.remove(os.path.join(folder, name))


def read_tag(folder: str) -> str:
    """The file name in ``last_checkpoint``; "" where that is absent, empty or no text."""
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as file:
            name = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if name.isprintable() else ""


def numbered_checkpoints(folder: str) -> List[str]:
    """Paths of ``model_<iteration>.pth``, in the order in which they were written."""
    paths = [os.path.join(folder, name) for name in _names(folder) if _NUMBERED.fullmatch(name)]
    return sorted(paths, key=lambda path: (os.stat(path).st_mtime_ns, path))


def find_checkpoints(folder: str) -> List[str]:
    """Paths of a run's checkpoints in the order in which to try them: the one that
    ``last_checkpoint`` names (though it may be gone), then from the newest to the oldest, and
    the best only at last."""
    tagged = read_tag(folder)
    iterations = {}
    for name in _names(folder):
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            iterations[name] = int(numbered[1])
        elif name == "model_final.pth":
            iterations[name] = _iteration(os.path.join(folder, name))
    names = [tagged] if tagged else []
    names += sorted(iterations, key=lambda name: (iterations[name], name), reverse=True)
    if os.path.isfile(os.path.join(folder, "model_best.pth")):
        names.append("model_best.pth")
    return [os.path.join(folder, name) for name in dict.fromkeys(names)]


def _names(folder: str) -> List[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _iteration(path: str) -> int:
    try:
        return int(peek(path)["trainer"]["iteration"])
    except (KeyError, TypeError, ValueError):  # it is tried, and named, later
        return -1


def peek(path: str) -> Dict[str, Any]:
    """What a checkpoint holds; its tensors are not read before they are used. Empty for a file that
    cannot be read."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # a broken file can raise anything
        return {}


def load_tensors(path: str) -> Any:
    """Read a file of tensors and plain values, on the CPU, without running code in it.

    Raises:
        RefusedCode: the file would run code.
        OSError, RuntimeError, ValueError, ...: the file is broken in one of many ways.
    """
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
    """Read a pickle of arrays and plain values; errors are those of :func:`load_tensors`."""
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
            problem = f"{path} is a folder: name a checkpoint in it, such as model_final.pth."
        elif "://" in path or os.path.isfile(path):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            problem = (
                f"The checkpoint {path} cannot be read, perhaps it was cut short or is of "
                f"another kind: {reason}."
            )
        raise CheckpointError(problem) from error


# Former names of parameters (regular expressions) and today's, so that weights of the last release
# still load. An entry goes with the release after the renaming.
RENAMED = {r"(decoder\.layers\.\d+)\.centre\.": r"\1.center."}


def rename_parameters(state_dict: Mapping[str, Any]) -> Dict[str, Any]:
    """The same weights in the same order by today's names, with or without a prefix such as
    ``module.``."""
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def steps_of(checkpoint: Mapping[str, Any], max_iter: Optional[int]) -> Optional[int]:
    """The iterations that a checkpoint (with "iteration", or with "best" and its "iteration") of a
    training of `max_iter` has behind it; None if it does not say."""
    iteration = checkpoint.get("iteration", (checkpoint.get("best") or {}).get("iteration"))
    if iteration is None:
        return None
    # Detectron2 numbers an evaluation like the last iteration, from 0, and the one after the
    # training like the next.
    return iteration + 1 if max_iter is None else min(iteration + 1, max_iter)
