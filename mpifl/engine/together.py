"""Works mapped over clients by torch.func.vmap, and what forbids that."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb

import torch
from torch import Tensor, nn
from torch.func import vmap

from mpifl.engine.clients import on_leaves
from mpifl.tree import Tree, tree_map
from mpifl.work import Client, ClientWork, Upload


def together(work: ClientWork, device: torch.device) -> ClientWork:
    """The same work on K clients in one call: clients, carry, batch and upload have leading axes, `shared` has not."""

    def finish_one(shared: Tree, client: Client, carry: Tree) -> tuple:
        return tuple(work.finish(shared, client, carry))

    start, step, finish = vmap(work.start, (None, 0)), vmap(work.step, (None, 0, 0, 0)), vmap(finish_one, (None, 0, 0))

    def own(leaf: Tensor) -> Tensor:
        return leaf.contiguous()  # what no client changed yet comes as a broadcast view

    def start_all(shared: Tree, clients: Client) -> Tree:
        with device:  # works write torch.zeros(()): a number on the CPU mixes with a GPU's tensors, (K,) numbers do not
            return tree_map(own, start(shared, clients))

    def step_all(shared: Tree, clients: Client, carry: Tree, batch: Tree) -> Tree:
        return tree_map(own, step(shared, clients, carry, batch))

    def finish_all(shared: Tree, clients: Client, carry: Tree) -> Upload:
        with device:
            return on_leaves(own, Upload(*finish(shared, clients, carry)))

    return ClientWork(start_all, step_all, finish_all, work.batches)


def visit_together(
    work: ClientWork, shared: Tree, clients: Client, batches: Iterable[Tree], steps: Sequence[int]
) -> Upload:
    """As `serial.visit` for a work of `together`; steps: (K) that each client takes, at least 1, descending."""
    ending = {count: slice(steps.index(count), steps.index(count) + steps.count(count)) for count in set(steps)}
    aside = []
    carry = work.start(shared, clients)
    for number, batch in enumerate(batches):
        if number in ending:
            aside.append((ending[number], tree_map(lambda leaf, of=ending[number]: leaf[of].clone(), carry)))
        carry = work.step(shared, clients, carry, batch)
    for lanes, kept in aside:
        tree_map(lambda leaf, rows, lanes=lanes: leaf[lanes].copy_(rows), carry, kept)
    return work.finish(shared, clients, carry)


@contextmanager
def loops_refused(refused: bool) -> Iterator[None]:
    """Raise vmap's warning of an operation that it can only call in a loop, or else be silent, also afterwards."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(refused)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*not yet implemented the batching rule")
            yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(False)


def refusing_module(error: BaseException) -> str:
    """Say which module was running when `error` was raised, e.g. "Dropout at 'encoder.2'"; "" if none was."""
    running = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    modules = [one for one in running if isinstance(one, nn.Module)]
    if not modules:
        return ""
    paths = {id(part): path for path, part in modules[0].named_modules()}
    return f"{type(modules[-1]).__name__} at '{paths.get(id(modules[-1]), '')}'"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
