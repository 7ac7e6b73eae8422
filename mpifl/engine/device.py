"""Which GPU a rank computes on: a function of where it sits on its node and of how many GPUs it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpifl.config import UserError


@dataclass(frozen=True)
class Seat:
    """Where a rank sits among the ranks of its node that a launcher lets see the same GPUs.

    place: its number among those that host clients, -1 for the server. hosts: how many those are. server: whether
    rank 0, which then hosts none, is of the company.
    """

    place: int = 0
    hosts: int = 1
    server: bool = False


def gpu_of(seat: Seat, gpus: int, server_gpu: Literal["share", "own"] = "share", visible: str = "") -> tuple[int, str]:
    """Return which of the `gpus` (at least 1) that a rank sees is its own, and a line for people where hosts share.

    Hosts take them in turn, so that two share one only where there are more hosts than GPUs. The server joins those
    with the fewest hosts or, if server_gpu is "own", has one to itself. A rank that sees one GPU, as Slurm may bind it,
    takes that. visible: CUDA_VISIBLE_DEVICES. Raises UserError when the server cannot have one to itself.
    """
    kept = int(seat.server and server_gpu == "own" and seat.hosts > 0)
    free = gpus - kept
    if not free:
        raise UserError(
            f'run.server_gpu is "own", but rank 0 and {seat.hosts} hosts of its node see one GPU; give the node '
            f"another, or let them share it: run.server_gpu=share"
        )
    if seat.place < 0:
        return (gpus - 1 if kept else seat.hosts % gpus), _shared(seat.hosts, free, visible)
    return seat.place % free, _shared(seat.hosts, free, visible)


def _shared(hosts: int, gpus: int, visible: str) -> str:
    if hosts <= gpus:
        return ""
    if gpus == 1 and visible:  # behind this name Slurm may have put another GPU for each of them
        return (
            f"{hosts} hosts of a node see one GPU each, CUDA_VISIBLE_DEVICES={visible}; python -m mpifl.doctor says "
            f"whether it is the same one"
        )
    most = f"up to {-(-hosts // gpus)} a GPU" if gpus > 1 else "all of them one"
    return f"{hosts} hosts of a node share {gpus} GPU{'s' * (gpus > 1)}, {most}: there are more ranks than GPUs"
