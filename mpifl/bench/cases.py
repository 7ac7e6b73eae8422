"""What the families of benchmarks share: a case, and contestants that take turns."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from mpifl.config import UserError

Case = dict[str, Any]
"""A row of a table and a line of JSON: `case` says what was measured, the other names carry their units."""


def medians(repeats: int, *contestants: Callable[[], Any]) -> list[float]:
    """Median CPU seconds of each, run in turn (A B A B ...), after one run that does not count.

    So a slow minute of the machine hits all of them, and other processes cost less than they would by the wall's clock.
    """
    seconds: list[list[float]] = [[] for _ in contestants]
    for repeat in range(repeats + 1):
        for run, spent in zip(contestants, seconds):
            began = time.process_time()
            run()
            if repeat:
                spent.append(time.process_time() - began)
    return [median(spent) for spent in seconds]


@contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """Where datasets are made: a folder to be kept, or a temporary one; UserError if it cannot be made."""
    if folder is None:
        with TemporaryDirectory(prefix="mpifl-bench-") as temporary:
            yield Path(temporary)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder is '{folder}', which cannot be made: {error.strerror}") from None
    yield folder


def count(text: str) -> int:
    """A whole number of at least 1, for an ArgumentParser."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)
