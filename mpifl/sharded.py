"""`comm.reduce = "sharded"`: the server's vectors are cut over the ranks, so that rank 0 is no bottleneck.

Every rank runs the algorithm's round alike, on its slice of each vector of P numbers: slices are gathered to all ranks
where clients need whole vectors (Allgather), each rank gets the sum of its slice alone (Reduce_scatter), and moves it.
Whatever is decided on the way follows from sums that all ranks have. Everything else, scores for one, goes as always:
by rank 0's headers. For algorithms whose round acts on each coordinate by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifl.config import UserError
from mpifl.engine.host import Ask
from mpifl.fleet import Fleet
from mpifl.messages import ROUND, WHOLE, Header
from mpifl.tree import Layout, Tree, leaves, tree_map
from mpifl.uplink.exact import Answer, Wire, decode
from mpifl.work import Algorithm, ClientWork, Cohort, Sums


class ShardedFleet(Fleet):
    """A Fleet on every rank; rank 0's starts each round. parameters: P.

    A leaf whose last axis is P is a stack of vectors, and each of its rows is cut into R slices of one width W; the
    last ones are padded with zeros.
    """

    def __init__(self, *arguments: Any, parameters: int) -> None:
        super().__init__(*arguments)
        self.parameters, self.width = parameters, -(-parameters // self.comm.size)
        self._together = False

    def hold(self, state: Tree) -> Tree:
        """Return this rank's slices of a whole state."""
        return tree_map(lambda leaf: self._slice(leaf) if self._is_vector(leaf) else leaf, state)

    def fetch(self, state: Tree) -> Tree:
        """On rank 0: return the whole state."""
        Header(WHOLE, self.round, self.accepted).announce(self.comm)
        return tree_map(torch.clone, self.whole(state))

    def whole(self, tree: Tree) -> Tree:
        """Return a tree whose slices are whole vectors again, until ranks arrive; all of them at once."""
        slices = [leaf for _, leaf in leaves(tree) if self._is_slice(leaf)]
        if not slices:
            return tree
        rows = torch.cat([leaf.reshape(-1, self.width) for leaf in slices])
        shapes = [(*leaf.shape[:-1], self.parameters) for leaf in slices]
        # Each where a message would have it: results depend on how a vector lies to a cache line.
        layout = Layout.place((str(number), torch.float32, shape) for number, shape in enumerate(shapes))
        row = 4 * self.parameters
        starts = [leaf.start + row * i for leaf in layout.leaves for i in range(leaf.bytes // row)]
        memory = self.comm.join(rows.numpy(), self.parameters, starts, layout.bytes)
        views = layout.views(torch.from_numpy(memory))
        joined = {id(leaf): views[str(number)] for number, leaf in enumerate(slices)}
        return tree_map(lambda leaf: joined.get(id(leaf), leaf), tree)

    def run(self, algorithm: Algorithm, state: Tree, cohort: Cohort) -> Tree:
        """On rank 0: one round on all ranks, on slices."""
        Header(ROUND, self.round, self.accepted).announce(self.comm)
        return self.run_alike(algorithm, state, cohort)

    def run_alike(self, algorithm: Algorithm, state: Tree, cohort: Cohort) -> Tree:
        """One round on slices; all ranks at once."""
        self._together = True
        new = algorithm.round(state, cohort)
        self._together = False
        return new

    def ask(self, work: ClientWork, ids: np.ndarray, given: Tree | None, shared: Tree) -> Sums:
        """As Fleet's; within a round on every rank alike, with slices in `shared` and in what it returns."""
        if self._together:
            with self.host.clock.during("send"):
                shared = self.whole(tree_map(torch.as_tensor, shared))
        return super().ask(work, ids, given, shared)

    def _once(self, question: Ask, home: np.ndarray, wire: Wire) -> Answer:
        if not self._together:
            return super()._once(question, home, wire)
        comm, clock = self.comm, self.host.clock
        with clock.during("send"):
            comm.bcast(question.limits)  # rank 0 has asked for scores as well, by the same works
            self.host.settle(self.round, self.accepted)
        mine = np.flatnonzero(home == comm.rank)
        given = tree_map(lambda leaf: leaf[mine], question.given)
        ahead = question.ahead[self._next_homes[1] == comm.rank] if len(question.ahead) else question.ahead
        due = self._due(question, home)
        own = replace(question, ids=question.ids[mine], given=given, ahead=ahead, room=comm.room)
        buffers = self.host.answer(own)
        with clock.during("wait"):
            comm.arrive(lambda: comm.rank == 0 and self._pass_time(due))
        with clock.during("reduce"):
            sliced, sums = self._sum(wire, buffers)
        with clock.during("server"):
            answer = decode(sliced, sums)
        self._time(question, answer)
        return answer

    def _raised(self) -> str:
        return self._gather_raised() if self._together else super()._raised()

    def _sum(self, wire: Wire, buffers: list[Tensor]) -> tuple[Wire, list[Tensor]]:
        """This rank's slices of the sums of vectors, and the whole sums of all else, laid out like an upload."""
        update, rest = wire.parts(buffers)
        rest, specs, summed = rest.copy(), [], []
        self.comm.sum_everywhere(rest)
        for leaf, part in zip(wire.update.leaves, update.split([leaf.size for leaf in wire.update.leaves])):
            shape = leaf.shape
            if shape and shape[-1] == self.parameters:
                shape = (*shape[:-1], self.width)
                summed += self.comm.sum_slices([row.numpy() for row in part.view(-1, self.parameters)])
            else:
                summed.append(part.numpy().copy())
                self.comm.sum_everywhere(summed[-1])
            specs.append((leaf.name, leaf.dtype, shape))
        parts = [np.concatenate([*summed, rest])] if wire.exact else [np.concatenate(summed or [rest[:0]]), rest]
        return replace(wire, update=Layout.place(specs)), [torch.from_numpy(part) for part in parts]

    def _is_vector(self, leaf: Tensor) -> bool:
        return bool(leaf.shape) and leaf.shape[-1] == self.parameters and leaf.dtype == torch.float32

    def _is_slice(self, leaf: Tensor) -> bool:
        return bool(leaf.shape) and leaf.shape[-1] == self.width and leaf.dtype == torch.float32

    def _slice(self, leaf: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(leaf, (0, self.width * self.comm.size - self.parameters))
        start = self.comm.slice * self.width
        return padded[..., start : start + self.width].clone()


class Follower:
    """A host's side: its slices of the state, moved when rank 0 starts a round.

    begin: round -> its cohort, after the fleet has begun it.
    """

    def __init__(
        self, fleet: ShardedFleet, algorithm: Algorithm, state: Tree, begin: Callable[[int, Fleet], Cohort]
    ) -> None:
        self.fleet, self.algorithm, self.state, self._begin = fleet, algorithm, fleet.hold(state), begin

    def answer(self, header: Header) -> None:
        """Do what a ROUND or a WHOLE asks for."""
        self.fleet.accepted = header.accepted
        if header.command == WHOLE:
            self.fleet.whole(self.state)
            return
        cohort = self._begin(header.round, self.fleet)
        new = self.fleet.run_alike(self.algorithm, self.state, cohort)
        if cohort.latest.count:
            self.state = new


def refuse_unless_elementwise(name: str, algorithm: Algorithm, state: Tree, parameters: int, ranks: int) -> None:
    """Raise UserError for an algorithm that cannot run on slices of vectors of P numbers over so many ranks."""
    if not algorithm.elementwise:
        raise UserError(
            f'comm.reduce is "sharded", but a round of {name} does not act on each coordinate by itself (clip_norm on '
            f'the server, or an algorithm that does not say elementwise=True); use comm.reduce = "node" or "flat"'
        )
    width = -(-parameters // ranks)
    others = [leaf.shape[-1] for _, leaf in leaves(state) if leaf.shape and leaf.shape[-1] != parameters]
    if ranks > 1 and width in (1, *others):  # a slice could be taken for something else
        raise UserError(
            f'comm.reduce is "sharded", but {parameters} parameters are too few for {ranks} ranks; use "node" or "flat"'
        )
