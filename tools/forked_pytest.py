#!/usr/bin/env python
"""
Run pytest again and again in forks of one process, which has the libraries imported already:

    forked_pytest.py torch detectron2.engine ...    # what to import

Each line on stdin is a JSON list of a time limit in seconds and pytest's arguments; the line on
stdout that answers it is pytest's exit code, or "late". `mutate.py` uses it.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time

import pytest


def main(modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    # This folder: the tests belong to another checkout, which has one of its own.
    del sys.path[0]
    gc.freeze()  # so that forks share it all
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        limit, arguments = json.loads(line)
        print(run(limit, arguments), file=answers, flush=True)


def run(limit: float, arguments: list[str]) -> int | str:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        code = 3  # pytest's own for an internal error
        try:
            code = int(pytest.main(arguments))
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit
    try:
        ended, status = os.waitpid(pid, os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
            ended, status = os.waitpid(pid, os.WNOHANG)
    finally:  # after Ctrl-C, too
        # What the tests started ends with them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return "late"
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(sys.argv[1:])
