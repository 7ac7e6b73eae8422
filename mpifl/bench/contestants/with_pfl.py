"""pfl-research: its FedAvg on its simulated backend, batches cut beforehand, users placed by their number of rows.

Several processes find each other as pfl's do, through PFL_WORKER_ADDRESSES and PFL_WORKER_RANK.
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version
from itertools import chain, cycle
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from protocol import TakeTurns, Workload, start
from torch import Tensor, nn
from torch_net import as_tensors, make_net, mean_loss, wait_for


class Net(nn.Module):
    """A net with the methods that pfl calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch, ()."""
        return mean_loss(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return none: nothing is evaluated."""
        return {}


class FedAvg(FederatedAveraging):
    """pfl's, without the evaluation of every user in round 0."""

    def get_next_central_contexts(self, *arguments: Any) -> Any:
        """Return what pfl does, with evaluation off."""
        contexts, *others = super().get_next_central_contexts(*arguments)
        return contexts and tuple(replace(context, do_evaluation=False) for context in contexts), *others


class Laps(TrainingProcessCallback):
    """Seconds of each round."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.began = device, [], time.perf_counter()

    def after_central_iteration(self, *arguments: Any, **keywords: Any) -> tuple[bool, Metrics]:
        """Note a round."""
        wait_for(self.device)
        began, self.began = self.began, time.perf_counter()
        self.seconds.append(self.began - began)
        return False, Metrics()


def federated(workload: Workload) -> FederatedDataset:
    """Return users as a data source whose cohorts are the workload's, again and again."""
    users = [PyTorchTensorDataset((x, y), user_id=str(client)) for client, (x, y) in enumerate(as_tensors(workload))]
    upcoming = cycle(chain.from_iterable(workload.cohorts))
    sizes = {client: len(user) for client, user in enumerate(users)}
    return FederatedDataset(users.__getitem__, lambda: next(upcoming), sizes)


def main(workload: Workload, threads: int, take_turns: TakeTurns) -> None:
    """Take turns on a workload."""
    torch.set_num_threads(threads)
    net, data = make_net(workload), federated(workload)
    parameters = list(net.parameters())
    learner = PyTorchModel(Net(net), torch.optim.SGD, torch.optim.SGD(parameters, lr=1.0))
    backend = SimulatedBackend(data, data, [WeightByDatapoints()])
    rounds, cohort = len(workload.cohorts), len(workload.cohorts[0])
    job = NNAlgorithmParams(rounds, evaluation_frequency=rounds, train_cohort_size=cohort, val_cohort_size=None)
    local = NNTrainHyperParams(workload.batch, local_num_epochs=1, local_learning_rate=workload.lr)

    def train() -> tuple[list[float], np.ndarray | None]:
        nn.utils.vector_to_parameters(torch.from_numpy(workload.start.copy()).to(workload.device), parameters)
        laps = Laps(workload.device)
        FedAvg().run(job, backend, learner, local, callbacks=[laps], send_metrics_to_platform=False)
        first = pytorch_ops.distributed.global_rank == 0
        return laps.seconds, nn.utils.parameters_to_vector(parameters).detach().cpu().numpy() if first else None

    take_turns(train, {name: version(name) for name in ("pfl", "torch")})


if __name__ == "__main__":
    start(main)
