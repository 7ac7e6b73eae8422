"""What a round costs on paper: compute over the hosts, alpha-beta for the collectives, rank 0's own work.

    round = server + compute + down + up
    compute = busy * imbalance / min(hosts, cores)
    down, up by comm.reduce, of n bytes over R ranks on N nodes of r ranks (Thakur et al. 2005, large messages); ranks
    of one node share its network, and add what they hold through its memory, each a slice:
      flat     down  (log2 R + R - 1) alpha + 2 (R - 1)/R n r beta          scatter + allgather
               up    2 log2 R alpha + 2 (R - 1)/R n r beta + n gamma        reduce-scatter + gather
      node     down  (log2 N + N - 1) alpha + 2 (N - 1)/N n beta + n gamma
               up    2 log2 N alpha + 2 (N - 1)/N n beta + n gamma + (r + 1)/r n gamma
      sharded  down  log2 N alpha + (N - 1)/N n beta + n gamma              allgather
               up    log2 N alpha + (N - 1)/N n beta + (r + 1)/r n gamma    reduce-scatter
    server = constant + passes * P * gamma, of which every rank has 1/R when the optimizer is sharded

Parameters travel down as float32 and up as float64, the exact sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Reduce = Literal["flat", "node", "sharded"]
SERVER_PASSES = 10
"""Reads and writes of a parameter on rank 0, in floats: decode the sum, divide, server optimizer, pack."""


@dataclass(frozen=True)
class Machine:
    """What a prediction needs to know of a cluster.

    alpha: seconds per message. beta: seconds per byte between nodes. gamma: seconds per byte of memory on one core.
    ranks_per_node. cores: that ranks have to themselves in all (or GPUs), None: one each. server: seconds of rank 0
    that no size changes.
    """

    alpha: float
    beta: float
    gamma: float
    ranks_per_node: int
    server: float
    cores: int | None = None


@dataclass(frozen=True)
class Predicted:
    """Seconds of a round, by part."""

    compute: float
    down: float
    up: float
    server: float

    @property
    def total(self) -> float:
        """Seconds of the round."""
        return self.compute + self.down + self.up + self.server


def predict(machine: Machine, reduce: Reduce, ranks: int, parameters: int, busy: float, imbalance: float) -> Predicted:
    """Predict a round. busy: seconds that one host would take for the whole cohort. imbalance: busiest host / mean."""
    hosts = max(1, ranks - 1)
    compute = busy * imbalance / min(hosts, machine.cores or hosts)
    down, up = (_seconds(machine, reduce, ranks, parameters * width, way) for width, way in ((4, "down"), (8, "up")))
    share = ranks if reduce == "sharded" else 1
    server = machine.server + SERVER_PASSES * 4 * parameters * machine.gamma / share
    return Predicted(compute, down, up, server)


def _seconds(machine: Machine, reduce: Reduce, ranks: int, bytes: int, way: str) -> float:
    if ranks == 1:
        return 0.0
    on_node = min(ranks, machine.ranks_per_node)
    nodes = math.ceil(ranks / on_node)
    copy = bytes * machine.gamma
    added = copy if way == "up" else 0.0
    if reduce == "flat":
        # On one node a byte to another rank costs a copy in memory.
        return (
            _messages(machine, ranks, way)
            + 2 * (ranks - 1) / ranks * (on_node * bytes * machine.beta if nodes > 1 else copy)
            + added
        )
    within = copy * (on_node + 1) / on_node if way == "up" else copy
    between = (nodes - 1) / nodes * bytes * machine.beta
    if reduce == "sharded":
        return math.log2(nodes) * machine.alpha + between + within
    return _messages(machine, nodes, way) + 2 * between + (added if nodes > 1 else 0.0) + within


def _messages(machine: Machine, partners: int, way: str) -> float:
    stages = math.log2(partners)
    return machine.alpha * (stages + partners - 1 if way == "down" else 2 * stages)
