"""A block's visit as CUDA graphs: every tensor has its place, and a step is one launch of what was recorded once.

What is recorded reads and writes buffers that stay where they are: `shared`, clients and batch are copied into them,
the carry is theirs. So whatever changes from round to round must come in through these trees, as the contracts say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpifl.engine.clients import on_leaves
from mpifl.tree import Tree, leaves, tree_map
from mpifl.work import Client, ClientWork, Upload

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function on buffers that stay, may call it, and returns what repeats it."""

WARM_UPS = 3
"""Calls before a recording, in which libraries choose their kernels and allocate what they keep."""


def as_cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """The Capture of the current GPU; raises RuntimeError for a function that waits for the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def captured(work: ClientWork, shared: Tree, clients: Client, batch: Tree, capture: Capture) -> ClientWork:
    """A work of `together` whose functions replay what is captured here, for trees of these shapes.

    Only `start` reads `shared` and clients; carry and upload are overwritten by the next visit. A work whose carry
    does not keep its shape comes back as it is.
    """
    here = {"shared": _copy(shared), "clients": _copy(clients._asdict()), "batch": _copy(batch)}
    visitors = Client(**here["clients"])
    carry = _copy(work.start(here["shared"], visitors))
    trial = work.step(here["shared"], visitors, _copy(carry), here["batch"])
    if shapes(trial) != shapes(carry):
        return work
    upload = on_leaves(torch.clone, work.finish(here["shared"], visitors, carry))

    def starting() -> None:
        _write(work.start(here["shared"], visitors), carry)

    def stepping() -> None:
        _write(work.step(here["shared"], visitors, carry, here["batch"]), carry)

    def finishing() -> None:
        _write(work.finish(here["shared"], visitors, carry)._asdict(), upload._asdict())

    starts, steps, finishes = capture(starting), capture(stepping), capture(finishing)

    def start(shared: Tree, clients: Client) -> Tree:
        _write(shared, here["shared"])
        _write(clients._asdict(), here["clients"])
        starts()
        return carry

    def step(shared: Tree, clients: Client, carry: Tree, batch: Tree) -> Tree:
        _write(batch, here["batch"])
        steps()
        return carry

    def finish(shared: Tree, clients: Client, carry: Tree) -> Upload:
        finishes()
        return upload

    return ClientWork(start, step, finish, work.batches)


def shapes(*trees: Tree) -> tuple[Any, ...]:
    """Names, dtypes and shapes of all leaves: what a captured function is for."""
    return tuple((name, leaf.dtype, leaf.shape) for tree in trees for name, leaf in leaves(tree))


def _copy(tree: Tree) -> Tree:
    return tree_map(torch.clone, tree)


def _write(tree: Tree, buffers: Tree) -> None:
    """Copy leaves into the buffers that are not already where they are."""
    places = {_storage(buffer) for _, buffer in leaves(buffers)}
    moved = [(b, leaf) for (_, leaf), (_, b) in zip(leaves(tree), leaves(buffers)) if leaf.data_ptr() != b.data_ptr()]
    # A carry that swaps two leaves would have the second read what the first has overwritten.
    for buffer, leaf in [(b, leaf.clone() if _storage(leaf) in places else leaf) for b, leaf in moved]:
        buffer.copy_(leaf)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
