"""SCAFFOLD, option II (Karimireddy et al. 2020, Algorithm 1): client drift cancelled by control variates.

    client:  theta_i <- theta_i - lr (grad f_i(theta_i; batch) - c_i + c)        K_i times, from theta
             c_i'    <- c_i - c + (theta - theta_i) / (K_i lr)
    server:  theta   <- theta - server_lr mean_i (theta - theta_i)
             c       <- c + (W_S / W) mean_i (c_i' - c_i)

Means are weighted by w_i; W_S and W are the weights of the counted clients and of the population, which keeps
c = sum_i (w_i / W) c_i at all times, under any participation. With uniform weights W_S / W is the paper's |S| / N.
Every control variate is a *gradient* (points uphill; optimizers subtract it). All vectors are flat, (P,).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mpifl.model import Model
from mpifl.optim import sgd
from mpifl.schedule import Schedule, constant
from mpifl.tree import Tree
from mpifl.work import Algorithm, Batching, Client, ClientWork, Cohort, Upload


def scaffold(
    model: Model,
    batches: Batching = Batching(size=20),  # noqa: B008 - immutable
    client_lr: Schedule = constant(0.1),  # noqa: B008
    server_lr: Schedule = constant(1.0),  # noqa: B008
    weighting: Literal["examples", "uniform"] = "uniform",
) -> Algorithm:
    """Build SCAFFOLD; clients take plain SGD steps, since momentum would break the telescoping of c_i'."""
    descend = sgd(client_lr).step

    def memory(theta: Tensor) -> Tree:
        return {"control": torch.zeros_like(theta)}

    def start(shared: Tree, client: Client) -> Tree:
        correction = shared["control"] - client.memory["control"]
        zero = torch.zeros(())
        return {"theta": shared["theta"].clone(), "correction": correction, "steps": zero, "loss": zero}

    def step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        grad, loss = model.grad_and_loss(carry["theta"], batch)
        grad.add_(carry["correction"])
        theta = descend(carry["theta"], grad, {"lr": shared["lr"]})
        return carry | {"theta": theta, "steps": carry["steps"] + 1, "loss": carry["loss"] + loss}

    def finish(shared: Tree, client: Client, carry: Tree) -> Upload:
        pseudo_grad = shared["theta"] - carry["theta"]
        # c_i' - c_i = -c + mean gradient, in which c - c_i was added at every step.
        # A schedule may end at 0: such a visit learns nothing, and c_i stays.
        length = shared["lr"] * carry["steps"].clamp(min=1)
        change = torch.where(length > 0, pseudo_grad / length - shared["control"], 0.0)
        return Upload(
            update={"pseudo_grad": pseudo_grad, "control_change": change},
            weight=client.n if weighting == "examples" else torch.ones_like(client.n),
            memory={"control": client.memory["control"] + change},
            stats={"loss": carry["loss"], "steps": carry["steps"]},
        )

    train = ClientWork(start, step, finish, batches)

    def init(theta: Tensor) -> Tree:
        return {"theta": theta, "control": torch.zeros_like(theta)}

    def round(state: Tree, cohort: Cohort) -> Tree:
        lr = torch.tensor(client_lr(cohort.round))
        mean = cohort.mean(train, theta=state["theta"], control=state["control"], lr=lr)
        return {
            "theta": state["theta"] - server_lr(cohort.round) * mean["pseudo_grad"],
            "control": state["control"] + cohort.weight_fraction * mean["control_change"],
        }

    models = lambda state: {"model": state["theta"]}  # noqa: E731
    return Algorithm(init, round, (train,), models, memory, weighting, elementwise=True)
