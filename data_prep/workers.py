"""Processes that work for a conversion, and end with it however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from mpifl.config import UserError

# Not by fork: a copy of a process with threads, or with HDF5 files open, may hang.
SPAWN = multiprocessing.get_context("spawn")
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG

shared: Any = None
"""In a worker: what it was given to share with all others."""


@contextmanager
def workers(jobs: int, share: Any = None) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of so many processes, gone when the block is left; UserError if one of them was killed.

    share: a value of SPAWN, found in each of them as `shared`. Submit with `ctrl_c_blocked`.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, SPAWN, _begin, (share, os.getpid()))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("a process was killed while it converted, perhaps for lack of memory; lower --jobs") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        ours = set(multiprocessing.active_children()) - others
        for worker in ours:
            worker.kill()
        for worker in ours:
            worker.join()  # what they leave behind is ours from here on


@contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C: it is for us to end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(share: Any, parent: int) -> None:
    """End with the process that started this one, however that ends."""
    global shared
    shared = share
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it ended before this one was asked to notice


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
