"""FedAvg and its family: one local training, one weighted mean, one server optimizer step.

    client:  theta_i <- client_opt step on grad f_i(theta_i; batch) + mu (theta_i - theta)      K_i times, from theta
    server:  d = sum_i w_i (theta - theta_i) / sum_i w_i
             theta <- server_opt step on d

FedAvg (McMahan et al. 2017): server sgd, lr 1. FedAvgM (Hsu et al. 2019): server fedavgm. FedAdagrad, FedYogi,
FedAdam (Reddi et al. 2021, Algorithm 2): server fedadagrad, fedyogi, fedadam. FedProx (Li et al. 2020): mu > 0.
`pseudo_grad` d points uphill: optimizers subtract it. All vectors are flat, (P,).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mpifl.config import UserError
from mpifl.model import Model
from mpifl.optim import Optimizer, sgd
from mpifl.schedule import LARGEST
from mpifl.tree import Tree, tree_map
from mpifl.work import Algorithm, Batching, Client, ClientWork, Cohort, Upload


def fedavg(
    model: Model,
    batches: Batching = Batching(size=20),  # noqa: B008 - immutable
    client_opt: Optimizer = sgd(0.1),  # noqa: B008
    server_opt: Optimizer = sgd(1.0),  # noqa: B008
    mu: float = 0.0,
    weighting: Literal["examples", "uniform"] = "examples",
) -> Algorithm:
    """Build FedAvg or a relative; client optimizers start afresh at every visit.

    mu: strength of FedProx's pull towards theta. weighting: w_i is the client's examples, or 1.
    """
    if not 0 <= mu <= LARGEST:
        raise UserError(f"fedavg's mu is {mu}; it must be 0 (FedAvg) or positive (FedProx)")
    train = local_training(model, batches, client_opt, mu, weighting)

    def init(theta: Tensor) -> Tree:
        return {"theta": theta, "opt": server_opt.init(theta)}

    def round(state: Tree, cohort: Cohort) -> Tree:
        lr = torch.tensor(client_opt.lr(cohort.round))
        mean = cohort.mean(train, theta=state["theta"], lr=lr)
        opt = tree_map(torch.clone, state["opt"]) | {"lr": torch.tensor(server_opt.lr(cohort.round))}
        theta, opt = server_opt.apply(state["theta"].clone(), mean["pseudo_grad"], opt)
        return {"theta": theta, "opt": opt}

    models = lambda state: {"model": state["theta"]}  # noqa: E731
    return Algorithm(init, round, (train,), models, weighting=weighting, elementwise=server_opt.elementwise)


def local_training(
    model: Model,
    batches: Batching,
    client_opt: Optimizer,
    mu: float,
    weighting: Literal["examples", "uniform"],
) -> ClientWork:
    """Train from shared["theta"] with lr shared["lr"]; uploads pseudo_grad, and loss and steps as statistics."""
    descends = client_opt.plain and not mu

    def start(shared: Tree, client: Client) -> Tree:
        theta = shared["theta"].clone()
        opt = client_opt.init(theta) | {"lr": shared["lr"]}
        return {"theta": theta, "opt": opt, "loss": torch.zeros(()), "steps": torch.zeros(())}

    def step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        theta, opt = carry["theta"], carry["opt"]
        if descends:
            theta, loss = model.descend(theta, batch, opt["lr"])
        else:
            grad, loss = model.grad_and_loss(theta, batch)
            if mu:
                grad.add_(theta - shared["theta"], alpha=mu)
            theta, opt = client_opt.apply(theta, grad, opt)
        return {"theta": theta, "opt": opt, "loss": carry["loss"] + loss, "steps": carry["steps"] + 1}

    def finish(shared: Tree, client: Client, carry: Tree) -> Upload:
        weight = client.n if weighting == "examples" else torch.ones_like(client.n)
        stats = {"loss": carry["loss"], "steps": carry["steps"]}
        return Upload({"pseudo_grad": shared["theta"] - carry["theta"]}, weight, stats=stats)

    return ClientWork(start, step, finish, batches)
