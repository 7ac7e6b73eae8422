"""How a question to the hosts lies in flat buffers: no pickle, no message types, only an index and vectors.

header   16 int64: command, round, last accepted round, work, attempt, sizes
layout   names, dtypes and shapes as JSON, only when this (shared, given) has not been seen before
table    row r: the ids rank r hosts in this ask (-1 pads), those it will host next round, what is given to each
buffer   [sum limits | shared], flat bytes, each leaf on a 64-byte line
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch

from mpifl.engine.host import Ask
from mpifl.tree import Layout, Tree, leaves, one_row, tree_map

STOP, ASK, ROWS, MEMORY, SAVE, SAVED, ROUND, WHOLE, RAISED = range(9)
NOBODY = np.empty(0, np.int64)


class Header(NamedTuple):
    """What every rank learns first; the last seven fields belong to ASK and ROWS."""

    command: int
    round: int
    accepted: int
    work: int = 0
    attempt: int = 0
    clients: int = 0
    width: int = 0
    ahead: int = 0
    layout: int = 0
    text_bytes: int = 0

    def announce(self, comm: Any) -> None:
        """Send it to every rank."""
        buffer = np.zeros(16, dtype=np.int64)
        buffer[: len(self)] = self
        comm.announce(buffer)

    @staticmethod
    def await_from(comm: Any) -> Header:
        """Wait for the next one from rank 0."""
        buffer = np.zeros(16, dtype=np.int64)
        comm.announce(buffer)
        return Header(*buffer[: len(Header._fields)].tolist())


class Sender:
    """Rank 0's side; remembers which layouts the hosts know."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self._known: dict[tuple[Layout, Layout], int] = {}

    def send(self, command: int, ask: Ask, home: np.ndarray, accepted: int, home_ahead: np.ndarray = NOBODY) -> Ask:
        """Send `ask` of the whole cohort down, id i to rank home[i]; returns rank 0's own part of it.

        home_ahead: the rank of each of ask.ahead.
        """
        comm, tree = self.comm, {"limits": torch.from_numpy(ask.limits)}
        if ask.shared:
            tree["shared"] = ask.shared
        down, given = Layout.of(tree), Layout.of(one_row(ask.given))
        text = b"" if (down, given) in self._known else down.to_json() + b"\n" + given.to_json()
        layout = self._known.setdefault((down, given), len(self._known))
        places, next_places = _places(home, comm.size), _places(home_ahead, comm.size)
        width = max(1, places.max(initial=-1) + 1)  # a row has bytes, if nobody is asked
        ahead = next_places.max(initial=-1) + 1
        sizes = (len(ask.ids), int(width), int(ahead), layout, len(text))
        Header(command, ask.round, accepted, ask.work, ask.attempt, *sizes).announce(comm)
        if text:
            comm.publish(len(text), lambda room: np.copyto(room, np.frombuffer(text, np.uint8)))
        row = _table_row(given, int(width), int(ahead))
        table = torch.zeros((comm.size, row.bytes), dtype=torch.uint8)
        values = {"id": ask.ids, "ahead": ask.ahead} | {f"given.{name}": leaf for name, leaf in leaves(ask.given)}
        for leaf in row.leaves:
            column = table[:, leaf.start : leaf.start + leaf.bytes].view(leaf.dtype).view(comm.size, *leaf.shape)
            if leaf.name in ("id", "ahead"):
                column.fill_(-1)
            rank, place = (home_ahead, next_places) if leaf.name == "ahead" else (home, places)
            column[torch.from_numpy(rank), torch.from_numpy(place)] = torch.as_tensor(values[leaf.name])
        mine = row.empty()
        comm.scatter(table.numpy(), mine.numpy())
        buffer = comm.publish(down.bytes, lambda room: down.pack(tree, torch.from_numpy(room)))
        sent = down.views(torch.from_numpy(buffer))
        return _own_part(comm, ask.work, ask.round, ask.attempt, len(ask.ids), row.views(mine), sent)


class Receiver:
    """A host's side."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self._layouts: list[tuple[Layout, Layout]] = []

    def receive(self, header: Header) -> Ask:
        """Receive this rank's part of the ask that `header` announced."""
        if header.text_bytes:
            down, given = self.comm.publish(header.text_bytes).tobytes().split(b"\n")
            self._layouts.append((Layout.from_json(down), Layout.from_json(given)))
        down, given = self._layouts[header.layout]
        row = _table_row(given, header.width, header.ahead)
        mine = row.empty()
        self.comm.scatter(None, mine.numpy())
        buffer = self.comm.publish(down.bytes)
        views = row.views(mine), down.views(torch.from_numpy(buffer))
        return _own_part(self.comm, header.work, header.round, header.attempt, header.clients, *views)


def _places(home: np.ndarray, ranks: int) -> np.ndarray:
    """Each client's place among those of its rank, (n,) int64, in order."""
    counts, order, places = np.bincount(home, minlength=ranks), np.argsort(home, kind="stable"), np.empty_like(home)
    places[order] = np.arange(len(home)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def _table_row(given: Layout, width: int, ahead: int) -> Layout:
    """One rank's row of the table: ids (width,), next round's (ahead,), and what is given to each, (width, ...)."""
    leaves = [(f"given.{g.name}", g.dtype, (width, *g.shape)) for g in given.leaves]
    return Layout.place([*leaves, ("id", torch.int64, (width,)), ("ahead", torch.int64, (ahead,))])


def _own_part(comm: Any, work: int, round: int, attempt: int, clients: int, row: Tree, down: Tree) -> Ask:
    ids, ahead = (row[name].numpy() for name in ("id", "ahead"))
    ids, ahead = ids[ids >= 0], ahead[ahead >= 0]
    given = tree_map(lambda slots: slots[: len(ids)], row.get("given", {}))
    shared, limits = down.get("shared", {}), down["limits"].numpy()
    return Ask(work, round, ids, shared, limits, clients, given, attempt, ahead, comm.room)


def pack_rows(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Bytes of [id | values] as float64, for a gather."""
    return np.concatenate([ids[:, None].astype(np.float64), values], axis=1).reshape(-1).view(np.uint8)


def pack_raised(raised: tuple[int, str] | None) -> np.ndarray:
    """Bytes of (client, what its visit raised) as a line of JSON, of None no bytes, for a gather."""
    return np.frombuffer((json.dumps(raised) + "\n" if raised else "").encode(), dtype=np.uint8)


def pack_digests(digests: list[tuple[int, bytes]]) -> np.ndarray:
    """Bytes of (client, sha256) entries, 40 each, for a gather."""
    return np.frombuffer(b"".join(client.to_bytes(8, "big") + sha for client, sha in digests), dtype=np.uint8)
