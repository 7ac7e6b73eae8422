"""UCI optical digits: 1,797 images 8x8 of handwritten digits, shipped inside mpifl.

What to put where: nothing, scikit-learn brings the file (pip install -e ".[prep]"). 360 random images,
stratified by label, are the central split "test"; the others go to 100 clients whose label distributions are
drawn from Dir(0.5).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from data_prep.conversion import Conversion, Split
from data_prep.partition import dirichlet, stratified
from mpifl.config import UserError
from mpifl.data.format import Columns, Feature

CLIENTS, ALPHA, TEST, SEED = 100, 0.5, 360, 0
FEATURES = {"x": Feature("uint8", (8, 8), mean=0.0, std=16.0), "y": Feature("uint8", (), classes=10)}
PROVENANCE = {
    "source": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998), UCI Machine "
    "Learning Repository: its 1,797 test images, as bundled with scikit-learn",
    "made": f"{TEST} images stratified by label are split test; the others on {CLIENTS} clients, "
    f"label distributions from Dir({ALPHA}), seed {SEED}; pixels 0 to 16 unchanged",
    "licence": "CC BY 4.0",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: this dataset is always the same."""


def prepare(options: argparse.Namespace) -> Conversion:
    """Say what is written; UserError without scikit-learn."""
    _load()
    return Conversion(
        FEATURES,
        (
            Split("train", [None], _train, clients=CLIENTS),
            Split("test", [None], _test, central=True),
        ),
        PROVENANCE,
    )


def _train(_: None) -> Iterator[tuple[str, Columns]]:
    columns = _load()
    train = np.setdiff1d(np.arange(len(columns["y"])), stratified(columns["y"], TEST, SEED))
    for number, part in enumerate(dirichlet(columns["y"][train], CLIENTS, ALPHA, SEED)):
        yield f"client-{number:03d}", {name: column[train[part]] for name, column in columns.items()}


def _test(_: None) -> Iterator[tuple[str, Columns]]:
    columns = _load()
    test = stratified(columns["y"], TEST, SEED)
    yield "", {name: column[test] for name, column in columns.items()}


def _load() -> dict[str, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('digits come from scikit-learn, which is missing: pip install -e ".[prep]"') from None
    digits = load_digits()
    return {"x": digits.images.astype(np.uint8), "y": digits.target.astype(np.uint8)}
