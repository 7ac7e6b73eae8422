"""A federated dataset held in arrays: for tests, notebooks, and generators of synthetic clients."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mpifl.config import UserError
from mpifl.data.clients import check_client, derived_features
from mpifl.data.format import Feature, wrong_value

Arrays = Mapping[str, np.ndarray]


class MemoryDataset:
    """The interface of `shard.Dataset` over arrays.

    clients: one dict of columns, (n_i, ...), per client of split "train". test: a dict of columns (a central
    split) or one dict per client. features: name -> Feature; by default dtype and shape of the arrays.
    Raises UserError when clients disagree on columns, dtypes or shapes, and for labels out of range.
    """

    def __init__(
        self,
        clients: Sequence[Arrays],
        test: Arrays | Sequence[Arrays] | None = None,
        features: dict[str, Feature] | None = None,
    ) -> None:
        if not clients:
            raise UserError("a dataset needs at least one client")
        given = {"train": clients} | ({} if test is None else {"test": [test] if isinstance(test, Mapping) else test})
        self.features = features or derived_features("train", "0", clients[0])
        self._clients = {split: [self._checked(split, *one) for one in enumerate(given[split])] for split in given}
        self._central = {split: split == "test" and isinstance(test, Mapping) for split in given}
        self.splits = tuple(self._clients)
        self.clients = len(clients)
        self.path = "memory"
        self.provenance: dict[str, str] = {}
        sha = hashlib.sha256()
        for split, held in self._clients.items():
            for index, arrays in enumerate(held):
                for name in sorted(arrays):
                    sha.update(f"{split} {index} {name} {arrays[name].shape}".encode())
                    sha.update(np.ascontiguousarray(arrays[name]).tobytes())
        self.digest = sha.hexdigest()
        self._sizes = {
            split: np.asarray([len(next(iter(arrays.values()))) for arrays in held], dtype=np.int64)
            for split, held in self._clients.items()
        }
        self._all: dict[str, dict[str, np.ndarray]] = {}

    def _checked(self, split: str, index: int, arrays: Arrays) -> dict[str, np.ndarray]:
        """A client's columns in the machine's own byte order."""
        expected = [(name, np.dtype(feature.dtype), feature.shape) for name, feature in self.features.items()]
        check_client(split, str(index), arrays, self.features, expected)
        for name, feature in self.features.items():
            if feature.classes and (wrong := wrong_value(arrays[name], feature)):
                raise UserError(f"split '{split}', client '{index}', column '{name}': row {wrong[0]} {wrong[1]}")
        return {name: arrays[name].astype(dtype, copy=False) for name, dtype, _ in expected}

    def sizes(self, split: str) -> np.ndarray:
        """Examples per client, (clients,) int64."""
        return self._sizes[split]

    def client_id(self, split: str, index: int) -> str:
        """The client's name: here its index."""
        return str(index)

    def central(self, split: str) -> bool:
        """Whether the split belongs to no client."""
        return self._central[split]

    def aligned(self, split: str) -> bool:
        """Whether the split has the clients of "train"."""
        return not self._central[split] and len(self._clients[split]) == self.clients

    def total(self, split: str) -> int:
        """Rows of the split."""
        return int(self.sizes(split).sum())

    def client(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Columns of one client, (n_i, ...)."""
        return dict(self._clients[split][index])

    def rows(self, split: str, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows [start, stop) of all clients one after the other."""
        if split not in self._all:
            held = self._clients[split]
            self._all[split] = {name: np.concatenate([arrays[name] for arrays in held]) for name in self.features}
        return {name: array[start:stop] for name, array in self._all[split].items()}

    def close(self) -> None:
        """Nothing is open."""
