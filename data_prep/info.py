"""What a dataset is: its columns and splits, where it comes from, how and by which command it was made."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mpifl.data.format import Feature
from mpifl.data.shard import Dataset

SHOWN_NAMES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which dataset."""
    parser.add_argument("dataset", type=Path, metavar="DIR", help="folder of a dataset")


def run(options: argparse.Namespace) -> None:
    """Print the description."""
    print(describe(options.dataset))


def describe(path: Path) -> str:
    """Describe a dataset from its index alone, in a few lines."""
    dataset = Dataset(path)
    lines = [f"dataset   {path}", f"digest    {dataset.digest}"]
    lines += [f"{name:<9} {text}" for name, text in dataset.provenance.items()]
    lines += [f"column    {name}: {_spoken(feature)}" for name, feature in dataset.features.items()]
    lines += [f"split     {split}: {_split(dataset, split)}" for split in dataset.splits]
    dataset.close()
    return "\n".join(lines)


def _spoken(feature: Feature) -> str:
    words = [feature.dtype, "x".join(map(str, feature.shape)) or "number"]
    if feature.classes is not None:
        names = list(map(repr, feature.names or ()))[:SHOWN_NAMES]
        more = ", ..." if len(feature.names or ()) > SHOWN_NAMES else ""
        words.append(f"{feature.classes} classes" + (f" ({', '.join(names)}{more})" if names else ""))
    if feature.pad is not None:
        words.append(f"sequences of at most {feature.shape[0]}, padded with {feature.pad}")
    if feature.std is not None:
        words.append(f"mean {_numbers(feature.mean)}, std {_numbers(feature.std)}")
    return ", ".join(words)


def _numbers(value: float | tuple[float, ...]) -> str:
    return "/".join(f"{number:.6g}" for number in np.atleast_1d(value))


def _split(dataset: Dataset, split: str) -> str:
    shards = dataset.shards(split)
    size = sum(path.stat().st_size for path, _ in shards)
    files = f"{len(shards)} {'shard' if len(shards) == 1 else 'shards'} of {size / 2**20:,.1f} MiB in all"
    if dataset.central(split):
        return f"{dataset.total(split):,} rows of no client (central); {files}"
    sizes = dataset.sizes(split)
    spread = f"min {sizes.min():,}, median {np.median(sizes):,g}, max {sizes.max():,}"
    same = "; the clients of train" if split != "train" and dataset.aligned(split) else ""
    return f"{len(sizes):,} clients with {dataset.total(split):,} rows ({spread}){same}; {files}"
