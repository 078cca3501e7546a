"""What the processes of a training tell each other beside the training: that one has failed.

A process that waits in a collective for one that is gone may wait until a time limit, and with
NCCL it cannot even run a signal handler. A thread of each process listens for the others' ends.
"""

import contextlib
import functools
import logging
import multiprocessing.connection as mpc
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple, cast

from detectron2.utils import comm

__all__ = ["Failure", "PeerWatch"]

logger = logging.getLogger(__name__)

_GRACE = 10  # seconds in which the main thread may come to its end by itself
_BYE = b"bye"


class Failure:
    """
    Attributes:
        exit_code: what the job's processes are to end with.
        text: what happened.
    """

    def __init__(self, exit_code: int, text: str) -> None:
        self.exit_code, self.text = exit_code, text

    def encode(self) -> bytes:
        return f"{self.exit_code} {self.text}".encode()

    @classmethod
    def decode(cls, message: bytes) -> "Failure":
        exit_code, _, text = message.decode().partition(" ")
        return cls(int(exit_code), text)


class PeerWatch:
    """Connects all processes with the first one. If one ends without a goodbye, be it with an
    error, killed, or with its machine (the systems then miss each other's sign of life), all are
    told. One that does not end by itself within seconds is ended, after `rescue` has run.

    Attributes:
        failure: of another process, the first that became known.
        rescue: saves what is to be saved, given the failure. It may be
            called in a thread, and waits until the state is whole.
    """

    def __init__(self, host: str) -> None:
        """All processes create theirs together.

        Args:
            host: name or address under which the first process's machine is reached.
        """
        self.failure: Optional[Failure] = None
        self.rescue: Optional[Callable[[Failure], None]] = None
        self._failed = threading.Event()
        self._ended = threading.Event()
        self._connections: Dict[mpc.Connection, int] = {}  # to the other end's rank
        self._lock = threading.Lock()
        self._rank, self._size = comm.get_rank(), comm.get_world_size()
        if self._size == 1:
            return
        if self._rank == 0:
            key = secrets.token_bytes(16)
            listener = mpc.Listener(("", 0), backlog=self._size, authkey=key)
            comm.all_gather((host, listener.address[1], key))
            target = functools.partial(self._lead, listener)
        else:
            host, port, key = comm.all_gather(None)[0]
            target = functools.partial(self._follow, (host, port), key)
        threading.Thread(target=target, name="peers", daemon=True).start()

    def fail(self, failure: Failure) -> None:
        """Tell all others that this process ends early, unless it ends because of another."""
        if self._size > 1 and self.failure is None:
            self._broadcast(failure.encode())

    def wait_for_failure(self, seconds: float) -> Optional[Failure]:
        """
        Returns:
            That of another process, if one has become known until then.
        """
        self._failed.wait(seconds)
        return self.failure

    def close(self) -> None:
        """The main thread has come to its end."""
        self._ended.set()
        self._broadcast(_BYE)

    def _broadcast(self, message: bytes, but: Optional[mpc.Connection] = None) -> None:
        with self._lock:
            for connection in [c for c in self._connections if c is not but]:
                with contextlib.suppress(OSError):
                    connection.send_bytes(message)

    def _lead(self, listener: mpc.Listener) -> None:
        accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        accepting.start()
        while not self._ended.is_set():
            with self._lock:
                connections = list(self._connections)
            if not connections:
                time.sleep(0.1)
                continue
            for connection in mpc.wait(connections, timeout=0.5):
                self._receive(cast(mpc.Connection, connection))

    def _accept(self, listener: mpc.Listener) -> None:
        num_missing = self._size - 1
        while num_missing > 0:
            try:
                connection = listener.accept()
                rank = int(connection.recv_bytes())
            except Exception:  # a stranger at the door
                continue
            num_missing -= 1
            _keep_alive(connection)
            with self._lock:
                self._connections[connection] = rank
            if self.failure is not None:
                self._broadcast(self.failure.encode())
        listener.close()

    def _follow(self, address: Tuple[str, int], key: bytes) -> None:
        try:
            connection = mpc.Client(address, authkey=key)
            connection.send_bytes(str(self._rank).encode())
        except Exception as error:
            logger.warning(
                "Process %d cannot be told of others' ends (%s:%d: %s): should one die, this one "
                "waits until its collectives' time limit.",
                self._rank,
                *address,
                error,
            )
            return
        _keep_alive(connection)
        with self._lock:
            self._connections[connection] = 0
        while connection in self._connections:
            self._receive(connection)

    def _receive(self, connection: mpc.Connection) -> None:
        rank = self._connections[connection]
        try:
            message = connection.recv_bytes()
        except (OSError, EOFError):
            text = f"Process {rank} is gone: it was killed, or its machine is."
            message = Failure(1, text).encode()
            self._forget(connection)
        if message == _BYE:
            self._forget(connection)
        elif self.failure is None:
            self.failure = failure = Failure.decode(message)
            self._failed.set()
            if self._rank == 0:
                self._broadcast(message, but=connection)
            threading.Thread(target=self._end, args=(failure,), daemon=True).start()

    def _forget(self, connection: mpc.Connection) -> None:
        with self._lock:
            self._connections.pop(connection, None)

    def _end(self, failure: Failure) -> None:
        if self._ended.wait(_GRACE):
            return
        if self.rescue is not None:
            self.rescue(failure)
            # The main thread was saving itself perhaps, and has the rest to do.
            if self._ended.wait(1):
                return
        logger.error("Process %d ends: %s", self._rank, failure.text)
        for stream in (sys.stdout, sys.stderr, *_log_streams()):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(failure.exit_code)


def _log_streams() -> List[Any]:
    names = ("detectron2", "fvcore", "smca")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    return [handler.stream for handler in handlers if hasattr(handler, "stream")]


def _keep_alive(connection: mpc.Connection) -> None:
    """Let the system ask every few seconds whether the other end's system is still there."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
