"""Datasets to measure with, written by the public ShardWriter and found again by name."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mpifl.bench.cases import Case
from mpifl.data.shard import Dataset, Feature, embedded
from mpifl.data.writer import ShardWriter

Client = tuple[str, dict[str, np.ndarray]]

PEOPLE = {"x": Feature("uint8", (16,), mean=127.5, std=73.9), "y": Feature("uint8", (), classes=10)}
IMAGES = {"x": Feature("uint8", (28, 28), mean=0.0, std=255.0), "y": Feature("uint8", (), classes=62)}
COLOUR = {"x": Feature("uint8", (3, 32, 32), mean=127.5, std=73.9), "y": Feature("uint8", (), classes=10)}
SPEECH = {name: Feature("uint8", (80,), classes=90, pad=0) for name in "xy"}
TEST_ROWS = 1000


def people(path: Path, clients: int) -> Iterator[Case]:
    """So many clients of 1 to 4 rows of 16 random bytes and a label."""
    return _written(path, PEOPLE, _people(clients), {"rows": "1 to 4"}, "")


def images(path: Path, clients: int, rows: int, compression: str = "") -> Iterator[Case]:
    """So many clients of so many 28x28 images: the embedded handwriting, enlarged, in a new choice for each client."""
    return _written(path, IMAGES, _images(clients, rows), {"rows": rows}, compression)


def femnist(path: Path, clients: int = 340) -> Iterator[Case]:
    """Clients with as many 28x28 images as FEMNIST's writers have, about: log-normal, 16 to 500, 198 in the mean."""
    sizes = np.clip(np.random.RandomState(1).lognormal(5.1, 0.6, clients), 16, 500).astype(np.int64)
    return _written(path, IMAGES, _noise(sizes.tolist(), IMAGES), {"rows": "log-normal(5.1, 0.6), 16 to 500"}, "")


def cifar(path: Path, clients: int = 200) -> Iterator[Case]:
    """Clients of 50 colour images 32x32 of noise."""
    return _written(path, COLOUR, _noise([50] * clients, COLOUR), {"rows": 50}, "")


def speech(path: Path, clients: int = 100) -> Iterator[Case]:
    """Clients of 40 sequences of 80 characters at random."""
    return _written(path, SPEECH, _noise([40] * clients, SPEECH), {"rows": 40}, "")


def evict(path: Path) -> None:
    """Have the system forget what it holds of a dataset's files in memory, so that they are read from the disk."""
    for file in path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def stored_bytes(path: Path) -> int:
    """Bytes of a dataset's files."""
    return sum(file.stat().st_size for file in path.iterdir())


def _written(
    path: Path, features: dict[str, Feature], clients: Iterator[Client], made: dict, compression: str
) -> Iterator[Case]:
    """Write a dataset unless it is there; a case of what that took."""
    if path.exists():
        return
    began = time.perf_counter()
    with ShardWriter(path, features, {"source": "mpifl.bench, random"} | made, compression=compression) as writer:
        writer.write("train", clients)
        blank = {name: np.zeros((TEST_ROWS, *feature.shape), feature.dtype) for name, feature in features.items()}
        writer.central("test", blank)
    seconds = time.perf_counter() - began
    dataset = Dataset(path)
    count = dataset.clients
    dataset.close()
    yield {
        "case": f"write {path.name}",
        "clients": count,
        "minutes": seconds / 60,
        "clients_per_s": count / seconds,
        "MB_on_disk": stored_bytes(path) / 1e6,
    }


def _people(clients: int, at_once: int = 100_000) -> Iterator[Client]:
    random = np.random.RandomState(0)
    for first in range(0, clients, at_once):
        stops = np.cumsum(random.randint(1, 5, min(at_once, clients - first))).tolist()
        x = random.randint(0, 256, (stops[-1], 16), np.uint8)
        y = random.randint(0, 10, stops[-1], np.uint8)
        for number, (start, stop) in enumerate(zip([0, *stops], stops), first):
            yield f"person-{number:08d}", {"x": x[start:stop], "y": y[start:stop]}


def _images(clients: int, rows: int) -> Iterator[Client]:
    random, pixels = np.random.RandomState(0), enlarged()
    for number in range(clients):
        yield (
            f"writer-{number:06d}",
            {
                "x": pixels[random.randint(0, len(pixels), rows)],
                "y": random.randint(0, 62, rows).astype(np.uint8),
            },
        )


def _noise(sizes: Sequence[int], features: dict[str, Feature]) -> Iterator[Client]:
    random = np.random.RandomState(0)
    for number, rows in enumerate(sizes):
        columns = {}
        for name, feature in features.items():
            least = 0 if feature.pad is None else 1  # a pad would end the sequence
            columns[name] = random.randint(least, feature.classes or 256, (rows, *feature.shape), np.uint8)
        yield f"client-{number:06d}", columns


def enlarged() -> np.ndarray:
    """The embedded digits as (n, 28, 28) uint8, 0 to 255, of strokes so thin that they compress as EMNIST does."""
    digits = Dataset(embedded("digits"))
    small = torch.from_numpy(digits.rows("train", 0, digits.total("train"))["x"])
    digits.close()
    large = F.interpolate(small[:, None].float(), size=(28, 28), mode="bilinear")[:, 0]  # 0 to 16
    return ((large - 8).clamp(min=0) * (255 / 8)).round().to(torch.uint8).numpy()
