"""Mime (Karimireddy et al. 2021, Algorithm 1): clients mimic a centralized optimizer whose statistics they hold fixed.

    ask 1:   c       <- mean_i grad f_i(theta)                                          over all local data
    ask 2:   theta_i <- U(theta_i; s, grad f_i(theta_i; b) - grad f_i(theta; b) + c)    K_i times, from theta
    server:  theta   <- theta - server_lr mean_i (theta - theta_i)
             s       <- V(s; c)

U (`Optimizer.step`) moves with the statistics s held fixed, V moves only the statistics (those that `Optimizer.apply`
returns). A base optimizer whose second moment starts at 0 (adam, yogi, adagrad) takes a huge first step: use fedadam
and relatives. Both gradients of a step share batch and random key. c and `pseudo_grad` point uphill. c is the mean of
the cohort, not of the population: the joint optimum is a fixed point under full participation.
All vectors are flat, (P,).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mpifl.model import Model, rows_of
from mpifl.optim import Optimizer, momentum
from mpifl.schedule import Schedule, constant
from mpifl.tree import Tree, tree_map
from mpifl.work import Algorithm, Batching, Client, ClientWork, Cohort, Upload


def mime(
    model: Model,
    batches: Batching = Batching(size=20),  # noqa: B008 - immutable
    base_opt: Optimizer = momentum(0.1),  # noqa: B008
    server_lr: Schedule = constant(1.0),  # noqa: B008
    gradient_size: int = 0,
    weighting: Literal["examples", "uniform"] = "examples",
) -> Algorithm:
    """Build Mime; gradient_size: rows per batch of the full-gradient pass (0: all at once), a matter of memory only."""
    whole = replace(batches, size=gradient_size, epochs=1, steps=None, drop_last=False, max_steps=None)

    def weight(client: Client) -> Tensor:
        return client.n if weighting == "examples" else torch.ones_like(client.n)

    def gradient_step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        grad, _ = model.grad_and_loss(shared["theta"], batch)
        return {"grad": carry["grad"].add_(grad * (rows_of(batch) / client.n))}

    full_gradient = ClientWork(
        lambda shared, client: {"grad": torch.zeros_like(shared["theta"])},
        gradient_step,
        lambda shared, client, carry: Upload({"grad": carry["grad"]}, weight(client)),
        whole,
    )

    def start(shared: Tree, client: Client) -> Tree:
        return {"theta": shared["theta"].clone(), "loss": torch.zeros(()), "steps": torch.zeros(())}

    def step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        grad, loss = model.grad_and_loss(carry["theta"], batch)
        anchor, _ = model.grad_and_loss(shared["theta"], batch)
        theta = base_opt.step(carry["theta"], grad.sub_(anchor).add_(shared["c"]), shared["opt"])
        return {"theta": theta, "loss": carry["loss"] + loss, "steps": carry["steps"] + 1}

    def finish(shared: Tree, client: Client, carry: Tree) -> Upload:
        stats = {"loss": carry["loss"], "steps": carry["steps"]}
        return Upload({"pseudo_grad": shared["theta"] - carry["theta"]}, weight(client), stats=stats)

    train = ClientWork(start, step, finish, batches)

    def init(theta: Tensor) -> Tree:
        return {"theta": theta, "opt": base_opt.init(theta)}

    def round(state: Tree, cohort: Cohort) -> Tree:
        opt = state["opt"] | {"lr": torch.tensor(base_opt.lr(cohort.round))}
        c = cohort.mean(full_gradient, theta=state["theta"])["grad"]
        mean = cohort.mean(train, theta=state["theta"], opt=opt, c=c)
        theta = state["theta"] - server_lr(cohort.round) * mean["pseudo_grad"]
        _, observed = base_opt.apply(state["theta"].clone(), c, tree_map(torch.clone, opt))
        return {"theta": theta, "opt": observed}

    models = lambda state: {"model": state["theta"]}  # noqa: E731
    return Algorithm(init, round, (full_gradient, train), models, weighting=weighting, elementwise=base_opt.elementwise)
