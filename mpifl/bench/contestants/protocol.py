"""What a peer's script reads and says. It runs in the peer's environment: numpy is there, mpifl is not.

`python with_PEER.py WORKLOAD.npz THREADS MODEL.npy`: once ready, the script prints a JSON line with versions. For
each line that it then reads it trains the workload's rounds from the workload's start, so that every turn is the same
work, writes the model that came out, and prints the seconds of each round. It waits without using a core.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np

Turn = Callable[[], "tuple[list[float], np.ndarray | None]"]
"""Seconds of each round, and the final model, (P,), or None where another process writes it."""
TakeTurns = Callable[[Turn, "dict[str, str]"], None]
"""Called with a turn, and versions, once everything is ready; returns when there are no more turns."""


class Workload:
    """FedAvg, one epoch of each client by SGD in the order of its rows, weighted by examples, server rate 1.

    clients: (x, y) each, (n, ...) float32 or int64. cohorts: clients of each round, by position. start: the initial
    model, (P,) float32, torch's parameters one after the other. net: mlp, emnist_conv, cifar_cnn or char_lstm.
    device: cpu or cuda.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with np.load(path) as file:
            x, y, offsets = file["x"], file["y"], file["offsets"].tolist()
            self.cohorts: list[list[int]] = file["cohorts"].tolist()
            self.start = file["start"]
            self.net, self.classes, self.hidden = str(file["net"]), int(file["classes"]), file["hidden"].tolist()
            self.batch, self.lr = int(file["batch"]), float(file["lr"])
            self.device = str(file["device"])
        self.clients = [(x[first:last], y[first:last]) for first, last in pairwise(offsets)]


def start(main: Callable[[Workload, int, TakeTurns], None]) -> None:
    """Run a script's `main` with its workload, its threads, and what it calls to take turns."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints goes to stderr
    path, threads, model = sys.argv[1:]

    def take_turns(turn: Turn, versions: dict[str, str]) -> None:
        print(json.dumps({"versions": versions}), file=ours, flush=True)
        for _ in sys.stdin:
            seconds, theta = turn()
            if theta is not None:
                np.save(model, theta)
            print(json.dumps({"seconds": seconds}), file=ours, flush=True)

    main(Workload(path), int(threads), take_turns)
