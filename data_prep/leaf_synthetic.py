"""Synthetic(alpha, beta): vectors with labels of a linear model that differs between clients, made here or by LEAF.

What to put where: nothing, `--alpha 1 --beta 1` makes Synthetic(1, 1) of T. Li et al. (2020), FedProx, section 5.1. Or
--source is a folder of JSON files in LEAF's layout, e.g. data/synthetic/data as data/synthetic/main.py and
preprocess.sh of https://github.com/TalwalkarLab/leaf fill it, or data/synthetic_1_1/data of
https://github.com/litian96/FedProx; in it
    train/*.json  test/*.json
or one folder of *.json, which becomes the split "train".
A client is a task k. alpha is how much the models differ, beta how much the inputs do:
    y = argmax(x W_k + b_k),  W_k, b_k ~ N(u_k, 1),  u_k ~ N(0, alpha)
    x ~ N(v_k, S),  S diagonal, S_jj = j^-1.2,  v_k ~ N(B_k, 1),  B_k ~ N(0, beta)
with 50 + lognormal(4, 2) examples per client, the first 90 % in split train and the rest in test. As in the authors'
program, alpha and beta are standard deviations. A client is a function of the seed and its number alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import leaf
from data_prep.conversion import Conversion, Split, ranges
from mpifl.config import UserError
from mpifl.data.shard import Columns, Feature

CLIENT_BYTES = 450 * 60 * 4
"""Of a client, on average: e^(4 + 2^2 / 2) + 50 examples of 60 numbers."""
TRAIN_SHARE = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to make, or where the files are."""
    parser.add_argument("--alpha", type=float, help="spread of the clients' models, 0 or more")
    parser.add_argument("--beta", type=float, help="spread of the clients' inputs, 0 or more")
    parser.add_argument("--clients", type=int, default=30, help="number of clients to make (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is made (default: 0)")
    leaf.add_source(parser, required=False)
    parser.add_argument("--dimension", type=int, default=60, help="numbers of a vector (default: 60)")
    parser.add_argument("--classes", type=int, default=10, help="number of labels (default: 10)")


def prepare(options: argparse.Namespace) -> Conversion:
    """Plan the clients to be made, or find the files and list their users."""
    dimension, classes = options.dimension, options.classes
    if dimension < 1 or not 1 <= classes <= 256:
        raise UserError(f"--dimension {dimension} --classes {classes}: must be at least 1, and 1 to 256")
    if any((spread is None) == (options.source is None) for spread in (options.alpha, options.beta)):
        raise UserError("give --alpha and --beta to make a dataset, or else --source to convert one")
    splits, provenance = _converted(options) if options.source else _made(options)
    features = {"x": Feature("float32", (dimension,)), "y": Feature("uint8", (), classes=classes)}
    return Conversion(features, splits, provenance)


def _converted(options: argparse.Namespace) -> tuple[tuple[Split, ...], dict[str, str]]:
    convert = partial(to_columns, dimension=options.dimension, classes=options.classes)
    return leaf.splits(leaf.find(options.source, "synthetic"), convert), {
        "source": "a synthetic dataset in the layout of LEAF, JSON: S. Caldas et al. (2018)",
        "made": f"vectors of {options.dimension} numbers as they are, {options.classes} classes",
        "licence": "not given",
    }


def _made(options: argparse.Namespace) -> tuple[tuple[Split, ...], dict[str, str]]:
    alpha, beta, seed = options.alpha, options.beta, options.seed
    if not (0 <= alpha < np.inf and 0 <= beta < np.inf and options.clients >= 1 and 0 <= seed < 2**32):
        given = f"--alpha {alpha:g} --beta {beta:g} --clients {options.clients} --seed {seed}"
        raise UserError(f"{given}: spreads must be at least 0, clients at least 1, the seed 0 to {2**32 - 1}")
    pieces = ranges(np.full(options.clients, CLIENT_BYTES), options.shard_mb)
    make = partial(_clients, alpha=alpha, beta=beta, seed=seed, dimension=options.dimension, classes=options.classes)
    splits = (Split(name, pieces, partial(make, name), clients=options.clients) for name in ("train", "test"))
    return tuple(splits), {
        "source": f"Synthetic({alpha:g}, {beta:g}), T. Li et al. (2020), made by this command",
        "made": f"{options.clients} clients, {options.dimension} dimensions, {options.classes} classes, seed {seed}; "
        f"of each client the first {TRAIN_SHARE:.0%} are split train, the rest test",
        "licence": "none is needed",
    }


def _clients(
    split: str, part: Iterable[int], alpha: float, beta: float, seed: int, dimension: int, classes: int
) -> Iterator[tuple[str, Columns]]:
    for number in part:
        x, y = task(np.random.RandomState([seed, number]), alpha, beta, dimension, classes)
        cut = int(TRAIN_SHARE * len(y))
        rows = slice(cut) if split == "train" else slice(cut, None)
        yield f"f_{number:05d}", {"x": x[rows], "y": y[rows]}


def task(
    random: np.random.RandomState, alpha: float, beta: float, dimension: int = 60, classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a client's examples, x float32 (n, dimension) and y uint8 (n,), by this module's equations."""
    size = 50 + int(random.lognormal(4, 2))
    u, B = random.normal(0, alpha), random.normal(0, beta)
    W, b = random.normal(u, 1, (dimension, classes)), random.normal(u, 1, classes)
    v = random.normal(B, 1, dimension)
    deviation = np.arange(1, dimension + 1) ** (-1.2 / 2)
    x = random.normal(v, deviation, (size, dimension)).astype(np.float32)
    return x, np.argmax(x @ W + b, axis=1).astype(np.uint8)


def to_columns(x: list, y: list, path: Path, user: str, dimension: int, classes: int) -> Columns:
    """Turn vectors and labels into x float32 (n, dimension), y uint8 (n,)."""
    vectors = leaf.numbers(x, dimension, path, user).astype(np.float32)
    return {"x": vectors, "y": leaf.labels(y, classes, path, user)}
