"""Copying a dataset to a disk of the node before training, once per node whatever its number of ranks."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from mpifl.config import UserError
from mpifl.data.shard import Dataset


def stage(path: Path, folder: str) -> Path:
    """Return where `folder` on this node has the dataset of `path`; the first rank to ask copies it, others wait.

    folder: may name variables of the environment, as in "$TMPDIR". A copy is known by its digest, found again by
    later jobs, and made anew when files of it are lost or cut short. Raises UserError when it cannot be made.
    """
    dataset = Dataset(path)
    dataset.close()
    local = Path(os.path.expandvars(folder)).expanduser()
    if "$" in str(local):
        raise UserError(f"data.stage is '{folder}', and there is no such variable here; set it, or name a folder")
    copy = local / f"{dataset.path.name}-{dataset.digest[:16]}"
    try:
        local.mkdir(parents=True, exist_ok=True)
        with open(local / f".{copy.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(copy):
                _copy(dataset.path, copy)
    except (OSError, shutil.Error) as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # of the first file of several
        raise UserError(f"data.stage is '{folder}': {path} cannot be copied there ({reason}); choose another") from None
    return copy


def _is_whole(copy: Path) -> bool:
    """Whether all files are there with their sizes: what cleans up old files may have taken some."""
    try:
        Dataset(copy).close()
    except UserError:
        return False
    return True


def _copy(source: Path, copy: Path) -> None:
    unfinished = copy.with_name(f"{copy.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(source, unfinished)
        unfinished.rename(copy)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
