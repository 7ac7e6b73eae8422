"""Flower: its FedAvg strategy and its simulation runtime on Ray, one actor per core, one thread each.

A node of the simulation is a place in the cohort; which client it trains comes with the message.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from protocol import TakeTurns, Workload, start
from torch_net import as_tensors, make_net, train_client


class Cohorts(FedAvg):
    """FedAvg on the workload's cohorts instead of its own samples; notes when each round begins."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.workload, self.began = workload, []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message per client."""
        self.began.append(time.perf_counter())
        messages = []
        for node, client in zip(grid.get_node_ids(), self.workload.cohorts[server_round - 1]):
            what = ConfigRecord({"client": client, "path": self.workload.path})
            record = RecordDict({"arrays": arrays, "config": what})
            messages.append(Message(record, dst_node_id=node, message_type=MessageType.TRAIN))
        return messages


@cache
def prepared(path: str) -> tuple[Workload, list, torch.nn.Module]:
    """Return workload, clients and net, once for each actor."""
    torch.set_num_threads(1)
    workload = Workload(path)
    return workload, as_tensors(workload), make_net(workload)


client_app = ClientApp()


@client_app.train()
def train_message(message: Message, context: Context) -> Message:
    """Train the client that the message names, and reply with its model."""
    what = message.content["config"]
    workload, clients, net = prepared(what["path"])
    x, y = clients[what["client"]]
    (theta,) = message.content["arrays"].to_numpy_ndarrays()
    local = train_client(net, torch.from_numpy(theta), x, y, workload.batch, workload.lr)
    metrics = MetricRecord({"num-examples": len(y)})
    return Message(RecordDict({"arrays": ArrayRecord([local.numpy()]), "metrics": metrics}), reply_to=message)


def main(workload: Workload, threads: int, take_turns: TakeTurns) -> None:
    """Take turns on a workload; threads are actors."""
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        def train() -> tuple[list[float], np.ndarray]:
            strategy = Cohorts(workload)
            result = strategy.start(grid, ArrayRecord([workload.start]), num_rounds=len(workload.cohorts))
            ends = [*strategy.began[1:], time.perf_counter()]
            (theta,) = result.arrays.to_numpy_ndarrays()
            return [end - began for began, end in zip(strategy.began, ends)], theta

        take_turns(train, {name: version(name) for name in ("flwr", "ray", "torch")})

    ray = {"num_cpus": threads, "include_dashboard": False}
    backend = {"client_resources": {"num_cpus": 1}, "init_args": ray}
    run_simulation(server_app, client_app, len(workload.cohorts[0]), backend_config=backend)


if __name__ == "__main__":
    import with_flower  # so that actors import this module, where they keep what they loaded

    start(with_flower.main)
