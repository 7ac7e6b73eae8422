"""A new HDF5 file that appears whole, or not at all with an error that says why."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from mpifl.config import UserError


@contextmanager
def new_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file that is there, and on the disk, when the block ends without an error; UserError if it cannot be."""
    temporary, plain = path.with_name(f"{path.name}.tmp"), None
    try:
        with _PlainFile(temporary, "w+") as plain:
            # On lines of 64 bytes, as memory is.
            with h5py.File(plain, "w", alignment_threshold=512, alignment_interval=64) as file:
                yield file
            if plain.failure is not None:
                raise plain.failure
            os.fsync(plain.fileno())
        temporary.rename(path)
    except (OSError, RuntimeError) as error:
        raise cannot_be_written(path, (plain and plain.failure) or error) from None
    finally:
        temporary.unlink(missing_ok=True)


class _PlainFile(io.FileIO):
    """A file that keeps the first error of writing to itself: HDF5 crashes the process when a disk is full."""

    failure: OSError | None = None

    def write(self, data: memoryview) -> int:
        """Write all of it, or pretend to."""
        data, done = memoryview(data).cast("B"), 0
        try:
            while done < len(data):  # one call writes at most 2 GiB
                done += super().write(data[done:])
        except OSError as error:
            self.failure = self.failure or error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Cut or lengthen the file, or pretend to."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


def cannot_be_written(path: Path, error: Exception) -> UserError:
    """The error for what the system, or HDF5, said when a file or folder was written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"{path} cannot be written: {reason}")


def sync(path: Path) -> None:
    """Have the names in a folder on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
