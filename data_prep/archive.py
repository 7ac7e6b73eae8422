"""Files that are compressed or packed into a tar, read in any order and with bounded memory by any process."""

from __future__ import annotations

import bz2
import gzip
import lzma
import mmap
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import BinaryIO

from mpifl.config import UserError

COMPRESSED = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}
BROKEN = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a truncated, damaged or empty file raises."""


@lru_cache(maxsize=8)
def content(path: Path) -> mmap.mmap:
    """Map a file into memory; a compressed one, which has no random access, is first unpacked, once per process.

    It is unpacked into a nameless file in TMPDIR, which goes with the process however that ends.
    """
    try:
        with path.open("rb") as file:
            opener = COMPRESSED.get(file.read(3), open)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with opener(path, "rb") as packed:
            if opener is open:
                return mmap.mmap(packed.fileno(), 0, access=mmap.ACCESS_READ)
            with scratch(path) as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
                unpacked.flush()
                return mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ)
    except UserError:
        raise
    except BROKEN as error:
        kind = f"{opener.__module__} file" if opener is not open else "file"
        raise UserError(f"{path}: truncated, damaged or empty {kind} ({error}); fetch it again") from None


def forget(pages: mmap.mmap) -> None:
    """Give back the memory that reading a map has filled; who reads there again gets it from the system's cache."""
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


@contextmanager
def scratch(path: Path) -> Iterator[BinaryIO]:
    """Give a nameless file in TMPDIR for what `path` holds, open; if mapped before it is closed, it stays as long."""
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        if error.errno is None:  # not the system's: what was read is broken
            raise
        where = f"while it was unpacked in {tempfile.gettempdir()}; unpack it yourself, or set TMPDIR"
        raise UserError(f"{path}: {error.strerror or error} {where}") from None


def members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield what a tar holds; the bytes of each are content(path)[offset_data : offset_data + size]."""
    data = content(path)
    data.seek(0)  # where the one before stopped reading
    try:
        with tarfile.open(fileobj=data, mode="r:") as tar:
            for number in count():
                if number % 1024 == 0:
                    forget(data)
                if not (member := tar.next()):
                    break
                tar.members = []  # it would keep all
                yield member
    except (tarfile.TarError, ValueError) as error:  # ValueError: mmap, asked for what lies behind the end
        raise UserError(f"{path}: not a tar, or damaged ({error}); fetch it again") from None
    if data[tar.offset : tar.offset + 512] != bytes(512):  # tarfile takes a damaged header for the end
        raise UserError(f"{path}: truncated or damaged (unpacked, at byte {tar.offset}); fetch it again")
