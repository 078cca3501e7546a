"""Signals that end a training: Ctrl-C, and what schedulers send before they end a job."""

import contextlib
import functools
import os
import signal
import threading
from types import FrameType
from typing import Any, Callable, Dict, Iterator, List, Optional

from torch.utils.data import DataLoader

# SIGUSR1 is what Slurm can send ahead of the time limit.
STOP_SIGNALS: List[int] = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


class StopSignals:
    """Notes the first stop signal, which the training looks at after each step."""

    received: Optional[int] = None
    _is_interruptible = False

    def __init__(self) -> None:
        self._previous: Dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals from now on, if this is the process's main thread."""
        self.received = None
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._on_signal) for n in STOP_SIGNALS}

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @contextlib.contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """Let signals, and one that waits, raise :func:`stop_error` at once inside the block."""
        self._is_interruptible = enabled
        try:
            if enabled and self.received is not None:
                raise stop_error(self.received)
            yield
        finally:
            self._is_interruptible = False

    def _on_signal(self, number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != self._pid:  # a forked process, such as a data loader's worker
            return
        if self.received is None:
            self.received = number
        if self._is_interruptible:
            self._is_interruptible = False  # the launcher may hand the same signal on
            raise stop_error(number)


def stop_error(number: int) -> BaseException:
    """The exception by which a signal ends the program: KeyboardInterrupt for SIGINT, SystemExit
    with 128 plus the signal's number for others."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def protect_workers(loader: Any) -> None:
    """Let a data loader's workers live on when a stop signal is sent to all processes, because the
    training needs them to finish its step. The training has to end them itself.
    """
    if not isinstance(loader, DataLoader):  # Detectron2's own loader of batches has one inside
        loader = getattr(loader, "dataset", None)
    if isinstance(loader, DataLoader) and loader.num_workers > 0:
        loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn)


def _init_worker(init: Optional[Callable[[int], Any]], worker_id: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if init is not None:
        init(worker_id)
