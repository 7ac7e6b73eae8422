"""Checkpoints: all that ranks need to go on after a round, bit for bit, on any number of them.

    RUN/checkpoints/round-00000012/
        server.safetensors          leaves of the server's state, by dotted name
        memory-00003.safetensors    client memory kept by rank 3: client (n,), visits (n,), rows (n, bytes)
        run.json                    rounds done, limits of sums, layout of a row, dataset, versions, hardware
        COMPLETE                    size and crc32 of each file; without it the folder is no checkpoint

They are found and read here, and written by `saving`.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mpifl.comm import Alone, World
from mpifl.config import UserError
from mpifl.engine.store import ClientMemory
from mpifl.tree import Layout, Tree, leaves, unflatten

MARK = "COMPLETE"


class Damaged(Exception):
    """A checkpoint's file is not as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, to be read. Raises Damaged where a file is not as it was written."""

    path: Path
    rounds: int
    files: dict[str, list[int]] = field(compare=False)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What run.json says."""
        try:
            about = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            texts = [about["dataset"], about["row"], about["hardware"], about["versions"]["torch"], *about["branches"]]
            limits = [limit for of_a_work in about["limits"].values() for limit in of_a_work]
            if not all(isinstance(text, str) for text in texts) or not all(0 < limit < 1e290 for limit in limits):
                raise ValueError("it does not say what a checkpoint's must")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"run.json: {error}") from None
        return about

    def verify(self, share: int, shares: int) -> None:
        """Compare every shares-th file with its crc32, and the sizes of all."""
        for number, (name, (size, crc)) in enumerate(sorted(self.files.items())):
            path = self.path / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise Damaged(f"{name} has {'no' if found is None else found} bytes, and had {size}")
            if number % shares == share and _crc(path) != crc:
                raise Damaged(f"{name} is not what was written: its crc32 differs")
            if name.endswith(".safetensors"):
                with safe_open(path, "pt"):  # reads what it holds
                    pass

    def server(self, like: Tree) -> Tree:
        """The server's state, which must have the leaves of `like`."""
        with safe_open(self.path / "server.safetensors", "pt") as file:
            state = unflatten({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        for name in self.about["branches"]:
            *folders, last = name.split(".")
            node = state
            for folder in folders:
                node = node.setdefault(folder, {})
            node[last] = {}
        there, wanted = ({name: (leaf.dtype, leaf.shape) for name, leaf in leaves(tree)} for tree in (state, like))
        if other := sorted(name for name, kind in wanted.items() if there.get(name) != kind):
            raise UserError(f"{self.path} holds another state of the server than this program's ({', '.join(other)})")
        return state

    def restore(self, memory: ClientMemory, mine: Any) -> None:
        """Put the rows of the clients that this rank keeps into `memory`. mine: (n,) ids -> (n,) bool."""
        for name in sorted(self.files):
            if name.startswith("memory-"):
                with safe_open(self.path / name, "pt") as file:
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                    count = shapes.get("client", (0,))
                    if shapes != {"client": count, "visits": count, "rows": (*count, memory.layout.bytes)}:
                        raise UserError(f"{self.path / name} does not hold client memory; choose another run.out")
                    clients, visits = file.get_tensor("client"), file.get_tensor("visits")
                    chosen = np.flatnonzero(mine(clients.numpy()))
                    rows = file.get_slice("rows")
                    for place in chosen.tolist():
                        memory.put(int(clients[place]), rows[place : place + 1][0], int(visits[place]))


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return crc


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in RUN/checkpoints, newest first."""
    found = []
    for path in folder.glob("round-*"):
        name = re.fullmatch(r"round-(\d{8,})", path.name)
        try:  # a device would be read without end
            files = json.loads((path / MARK).read_text(encoding="utf-8")) if (path / MARK).is_file() else None
        except (OSError, ValueError):
            continue
        if name and isinstance(files, dict) and {"server.safetensors", "run.json"} <= files.keys() and _sized(files):
            found.append(Checkpoint(path, int(name[1]), files))
    return sorted(found, key=lambda checkpoint: -checkpoint.rounds)


def _sized(files: dict[str, Any]) -> bool:
    """Whether each file has its size and crc32."""
    return all(isinstance(said, list) and list(map(type, said)) == [int, int] for said in files.values())


def newest(comm: World | Alone, folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is as it was written, on every rank; whose files each rank reads a share of.

    One that is damaged is named on stderr, and the one before it taken. Raises UserError if all are.
    """
    names = comm.share("\n".join(c.path.name for c in complete(folder)[:64]) if comm.rank == 0 else "").split()
    for name in names:
        found = [checkpoint for checkpoint in complete(folder) if checkpoint.path.name == name]
        try:
            if not found:
                raise Damaged("it is not seen from this node")
            found[0].verify(comm.rank, comm.size)
            found[0].about  # noqa: B018 - readable
            whole = True
        except (Damaged, OSError, SafetensorError) as damage:
            print(f"mpifl: checkpoint {folder / name} is damaged: {damage}", file=sys.stderr, flush=True)
            whole = False
        if comm.lowest(int(whole)):
            return found[0]
    if names:
        raise UserError(
            f"none of the checkpoints in {folder} is as it was written; remove that folder to start again, or choose "
            f"another run.out"
        )
    return None


def refuse_others(checkpoint: Checkpoint, dataset: str, layout: Layout) -> None:
    """Raise UserError unless a checkpoint is of this dataset (digest) and of such rows."""
    if checkpoint.about["dataset"] != dataset:
        raise UserError(
            f"{checkpoint.path} was made with another dataset ({checkpoint.about['dataset'][:12]}..., now "
            f"{dataset[:12]}...); give that one as data.path, or choose another run.out"
        )
    if checkpoint.about["row"] != layout.to_json().decode():
        raise UserError(f"{checkpoint.path} holds client memory of another layout; choose another run.out")


def other_machine(checkpoint: Checkpoint, about: dict[str, Any]) -> str:
    """What of processor and torch differs from those that made a checkpoint, as text; "" if nothing does."""
    then, now = ({"processor": a["hardware"], "torch": a["versions"]["torch"]} for a in (checkpoint.about, about))
    return "; ".join(f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name])
