"""A plain torch loop over the clients, in one process."""

from __future__ import annotations

import time

import numpy as np
import torch
from protocol import TakeTurns, Workload, start
from torch import Tensor, nn
from torch_net import as_tensors, make_net, train_client, wait_for

Client = tuple[Tensor, Tensor]


def round_of(net: nn.Module, theta: Tensor, clients: list[Client], batch: int, lr: float) -> Tensor:
    """Return theta and the mean of what the clients change in it, (P,), weighted by their examples."""
    change, examples = torch.zeros_like(theta), sum(len(y) for _, y in clients)
    for x, y in clients:
        change.add_(train_client(net, theta, x, y, batch, lr).sub_(theta), alpha=len(y) / examples)
    return theta + change


def main(workload: Workload, threads: int, take_turns: TakeTurns) -> None:
    """Take turns on a workload."""
    torch.set_num_threads(threads)
    net, clients = make_net(workload), as_tensors(workload)

    def train() -> tuple[list[float], np.ndarray]:
        theta, seconds = torch.from_numpy(workload.start).to(workload.device), []
        for cohort in workload.cohorts:
            began = time.perf_counter()
            theta = round_of(net, theta, [clients[client] for client in cohort], workload.batch, workload.lr)
            wait_for(workload.device)
            seconds.append(time.perf_counter() - began)
        return seconds, theta.cpu().numpy()

    take_turns(train, {"torch": torch.__version__})


if __name__ == "__main__":
    start(main)
