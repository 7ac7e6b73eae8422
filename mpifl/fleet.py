"""A question to a cohort, carried over the ranks: one header, one Scatter, one Bcast down, one Reduce up.

Rank 0 owns a `Fleet`; every other rank sits in `serve`. Both see the same few messages:

    header   16 int64: command, work, round, last accepted round, layout, sizes
    layout   names, dtypes and shapes as JSON, only when this (shared, given) has not been seen before
    table    row r: the ids rank r hosts in this ask (-1 pads), then what is given to each of them
    buffer   [sum limits | shared], flat bytes, each leaf on a 64-byte line
    answer   [update | weight | stats | count | one row per rank], summed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from mpifl.config import UserError
from mpifl.engine.host import Ask, Host
from mpifl.placement import by_owner, longest_first
from mpifl.tree import Layout, Tree, tree_map
from mpifl.uplink.exact import Answer, Wire, decode, fits, next_limits
from mpifl.work import ClientWork, Sums

_STOP, _ASK, _ROWS, _MEMORY = 0, 1, 2, 3
_HEADER = 16


@dataclass
class Traffic:
    """What asks cost since the last reading: steps and examples, seconds per rank, exclusions, repeats."""

    steps: int = 0
    examples: int = 0
    excluded: int = 0
    repeats: int = 0
    busy: np.ndarray = field(default_factory=lambda: np.zeros(1))
    hosts: dict[str, float] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def imbalance(self) -> float:
        """Largest busy time over the mean of the hosts; 1.0 is perfect."""
        hosts = self.busy[1:] if len(self.busy) > 1 else self.busy
        return float(hosts.max() / hosts.mean()) if hosts.mean() > 0 else 1.0


class Fleet:
    """Rank 0's side: places clients, asks, repeats an ask whose grid did not fit, and reads the sums.

    nonfinite: "stop" raises UserError naming client and round when an update is NaN or infinite; "exclude"
    leaves that client out, counted in `traffic.excluded`. say: called with one line for people.
    """

    def __init__(
        self,
        comm: Any,
        host: Host,
        nonfinite: Literal["stop", "exclude"] = "stop",
        say: Callable[[str], None] = print,
    ) -> None:
        self.comm, self.host, self.nonfinite, self.say = comm, host, nonfinite, say
        self.works = host.works
        self.round, self.accepted = 0, -1
        self.limits: dict[str, list[float]] = {}
        self.traffic = Traffic(busy=np.zeros(comm.size))
        self.resident_bytes: list[int] = []
        self._read = (comm.bytes_down, comm.bytes_up)
        self._homes: dict[int, int] = {}
        self._layouts: dict[bytes, int] = {}

    def begin(self, round: int) -> None:
        """Start a round: clients may be placed anew."""
        self.round = round
        self._homes.clear()

    def read_traffic(self) -> Traffic:
        """Return what was counted since the last reading."""
        read, self.traffic = self.traffic, Traffic(busy=np.zeros(self.comm.size))
        down, up = self.comm.bytes_down, self.comm.bytes_up
        read.bytes_down, read.bytes_up = down - self._read[0], up - self._read[1]
        self._read = (down, up)
        return read

    def ask(self, work: ClientWork, ids: np.ndarray, given: Tree | None, shared: Tree) -> Sums:
        """Have every client in `ids`, (n,) int64, do `work`; returns the exact sums over those that counted."""
        index, given, shared = self._index(work), given or {}, tree_map(torch.as_tensor, shared)
        wire = self.host.wire(index, shared, _one_row(given))
        name = f"{index}:{'|'.join(wire.names)}"
        limits = np.asarray(self.limits.get(name) or wire.first_limits())
        home = self._place(work, ids)
        while True:
            answer = self._once(index, wire, ids, home, given, shared, limits)
            self._count(answer)
            if not wire.exact or fits(limits, answer.peaks, len(ids)):
                break
            self._tell_repeat(wire, answer)
            limits = next_limits(wire, limits, answer.peaks, len(ids))
        self._refuse_bad(work, wire, answer)
        self.limits[name] = next_limits(wire, limits, answer.peaks, len(ids)).tolist()
        self.traffic.excluded += int(answer.rows["excluded"].sum())
        return answer.sums

    def rows(self, work: ClientWork, ids: np.ndarray, shared: Tree) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return (ids (n,), {"weight": (n,), stat: (n,)}) per client that ran `work`, in order of id, unsummed."""
        index = self._index(work)
        wire = self.host.wire(index, shared, {})
        home = self._place(work, ids)
        ask = self._send(_ROWS, index, ids, home, {}, shared, wire.first_limits())
        gathered = self.comm.gather(_pack_rows(*self.host.rows(ask))).view(np.float64).reshape(-1, 1 + sum(wire.small))
        gathered = gathered[np.argsort(gathered[:, 0], kind="stable")]
        names = ["weight", *(leaf.name for leaf in wire.stats.leaves)]
        columns = np.split(gathered[:, 1:], np.cumsum(wire.small)[:-1], axis=1)
        return gathered[:, 0].astype(np.int64), {n: c[:, 0] for n, c in zip(names, columns)}

    def memory_digest(self) -> str:
        """Return one sha256 over all clients' memory in order of client, "" when none is kept."""
        if not self.host.memory.kept:
            return ""
        self._header(_MEMORY)
        self.host.settle(self.round, self.accepted)
        packed = self.comm.gather(_pack_digests(self.host))
        entries = sorted(bytes(entry) for entry in packed.reshape(-1, 40))  # a client's number comes first
        return hashlib.sha256(b"".join(entries)).hexdigest()

    def stop(self) -> None:
        """Let the hosts go."""
        self._header(_STOP)

    def _index(self, work: ClientWork) -> int:
        for index, known in enumerate(self.works):
            if known is work:
                return index
        raise ValueError("this ClientWork is not among the Algorithm's `works`, so hosts do not know it")

    def _place(self, work: ClientWork, ids: np.ndarray) -> np.ndarray:
        """Rank of each id: with its memory, else longest first; one home per client for all asks of a round."""
        hosts = max(1, self.comm.size - 1)
        first = 0 if self.comm.size == 1 else 1
        if work.batches.of == "block":
            return first + longest_first(self.host.source.examples(work.batches)[ids], hosts)
        if self.host.memory.kept:
            return first + by_owner(ids, hosts)
        new = np.asarray([id for id in ids.tolist() if id not in self._homes], dtype=np.int64)
        if len(new):
            examples = self.host.source.examples(work.batches)
            steps = work.batches.steps_of(examples[new if work.batches.of == "client" else 0])
            steps = np.broadcast_to(steps, len(new))
            self._homes.update(zip(new.tolist(), (first + longest_first(steps, hosts)).tolist()))
        return np.asarray([self._homes[id] for id in ids.tolist()], dtype=np.int64)

    def _once(
        self,
        index: int,
        wire: Wire,
        ids: np.ndarray,
        home: np.ndarray,
        given: Tree,
        shared: Tree,
        limits: np.ndarray,
    ) -> Answer:
        ask = self._send(_ASK, index, ids, home, given, shared, limits)
        buffers = self.host.answer(ask)
        _reduce(self.comm, self.host, buffers)
        with self.host.clock.during("server"):
            return decode(wire, buffers)

    def _send(
        self,
        command: int,
        index: int,
        ids: np.ndarray,
        home: np.ndarray,
        given: Tree,
        shared: Tree,
        limits: np.ndarray,
    ) -> Ask:
        """Send one question down and return rank 0's own part of it."""
        comm, host = self.comm, self.host
        with host.clock.during("send"):
            tree = {"limits": torch.from_numpy(limits), "shared": shared}
            down, per_client = Layout.of(tree), Layout.of(_one_row(given))
            text = b"[" + down.to_json() + b"," + per_client.to_json() + b"]"
            known = text in self._layouts
            layout = self._layouts.setdefault(text, len(self._layouts))
            members = [np.flatnonzero(home == rank) for rank in range(comm.size)]
            width = max(map(len, members))
            self._header(command, index, len(ids), width, layout, 0 if known else len(text))
            host.settle(self.round, self.accepted)
            if not known:
                comm.bcast(np.frombuffer(text, dtype=np.uint8).copy())
            row = _table_layout(per_client, width)
            table = torch.zeros((comm.size, row.bytes), dtype=torch.uint8)
            for packed, rows in zip(table, members):
                _fill_row(row.views(packed), ids[rows], tree_map(lambda leaf, rows=rows: leaf[rows], given))
            mine = row.empty()
            comm.scatter(table.numpy(), mine.numpy())
            buffer = down.pack(tree, down.empty())
            comm.bcast(buffer.numpy())
        return _read_ask(index, self.round, len(ids), row.views(mine), down.views(buffer))

    def _header(self, command: int, *rest: int) -> None:
        header = np.zeros(_HEADER, dtype=np.int64)
        header[: 3 + len(rest)] = (command, self.round, self.accepted, *rest)
        self.comm.announce(header)

    def _count(self, answer: Answer) -> None:
        rows, traffic = answer.rows, self.traffic
        traffic.steps += int(rows["steps"].sum())
        traffic.examples += int(rows["examples"].sum())
        traffic.busy = traffic.busy + rows["busy"]
        self.resident_bytes = rows["resident_bytes"].astype(np.int64).tolist()
        for phase in ("load", "train", "sum"):
            traffic.hosts[phase] = traffic.hosts.get(phase, 0.0) + float(rows[phase].sum())

    def _tell_repeat(self, wire: Wire, answer: Answer) -> None:
        self.traffic.repeats += 1
        over = answer.first("over")
        if over:
            client = self.host.dataset.client_id("train", over[0])
            self.say(
                f"round {self.round + 1}: {wire.names[over[1]]} of client {client} is beyond the sum's grid; "
                f"asking again with a coarser one"
            )

    def _refuse_bad(self, work: ClientWork, wire: Wire, answer: Answer) -> None:
        """Stop at, or tell of, the first client whose numbers were not finite."""
        bad = answer.first("bad")
        if bad is None:
            return
        if work.batches.of != "client":  # no client is to blame: the model itself is beyond numbers
            raise UserError(
                f"round {self.round + 1}: {wire.names[bad[1]]} on split '{work.batches.split}' is NaN or infinite: "
                f"training has diverged; lower the learning rates or clip gradients (clip_norm)"
            )
        client = self.host.dataset.client_id("train", bad[0])
        what = f"round {self.round + 1}: {wire.names[bad[1]]} of client {client} is NaN or infinite"
        if self.nonfinite == "stop":
            raise UserError(
                f"{what}; lower the client learning rate or clip its gradients (clip_norm), or leave such clients "
                f'out with run.nonfinite="exclude"'
            )
        others = int(answer.rows["excluded"].sum()) - 1
        self.say(f"{what}; left out{f', and {others} more' if others else ''}")


def serve(comm: Any, host: Host) -> None:
    """Answer rank 0's questions until it says stop."""
    layouts: list[tuple[Layout, Layout]] = []
    header = np.zeros(_HEADER, dtype=np.int64)
    while True:
        host.clock.enter("wait")
        comm.announce(header)
        command, round, accepted, index, clients, width, layout, text_bytes = header[:8].tolist()
        host.settle(round, accepted)
        if command == _STOP:
            return
        if command == _MEMORY:
            comm.gather(_pack_digests(host))
            continue
        host.clock.enter("receive")
        if text_bytes:
            text = np.empty(text_bytes, dtype=np.uint8)
            comm.bcast(text)
            down, given = json.loads(text.tobytes())
            layouts.append((Layout.from_json(json.dumps(down)), Layout.from_json(json.dumps(given))))
        down, per_client = layouts[layout]
        row = _table_layout(per_client, width)
        mine, buffer = row.empty(), down.empty()
        comm.scatter(None, mine.numpy())
        comm.bcast(buffer.numpy())
        ask = _read_ask(index, round, clients, row.views(mine), down.views(buffer))
        if command == _ROWS:
            comm.gather(_pack_rows(*host.rows(ask)))
        else:
            _reduce(comm, host, host.answer(ask))


def _reduce(comm: Any, host: Host, buffers: list[torch.Tensor]) -> None:
    with host.clock.during("wait"):
        comm.arrive()  # here ranks wait patiently for the last one to finish training; Reduce itself is busy
    with host.clock.during("reduce"):
        for buffer in buffers:
            comm.reduce(buffer.numpy())


def _table_layout(given: Layout, width: int) -> Layout:
    """One rank's row of the table: ids (width,), and what is given to each, (width, ...)."""
    rows = [
        ("id", torch.int64, (width,)),
        *((f"z.{g.name}", g.dtype, (width, *g.shape)) for g in given.leaves),
    ]
    return Layout.place(rows)


def _one_row(given: Tree) -> Tree:
    """What one client is given, from leaves (n, ...)."""
    return tree_map(lambda leaf: leaf.new_zeros(leaf.shape[1:]), given)


def _fill_row(row: Tree, ids: np.ndarray, given: Tree) -> None:
    """Write one rank's ids, (n,), and given leaves, (n, ...), into views of its table row, (width, ...) each."""
    row["id"].fill_(-1)
    row["id"][: len(ids)] = torch.from_numpy(ids)
    tree_map(lambda slots, leaf: slots[: len(ids)].copy_(leaf), row.get("z", {}), given)


def _read_ask(index: int, round: int, clients: int, row: Tree, down: Tree) -> Ask:
    ids = row["id"].numpy()
    ids = ids[ids >= 0]
    given = tree_map(lambda slots: slots[: len(ids)], row.get("z", {}))
    return Ask(index, round, ids, down.get("shared", {}), down["limits"].numpy(), clients, given)


def _pack_rows(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, None].astype(np.float64), values], axis=1).reshape(-1).view(np.uint8)


def _pack_digests(host: Host) -> np.ndarray:
    entries = [client.to_bytes(8, "big") + sha for client, sha in host.memory.digests()]
    return np.frombuffer(b"".join(entries), dtype=np.uint8)
