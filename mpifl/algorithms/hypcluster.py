"""HypCluster (Mansour et al. 2020): k models; each client trains the one that serves it best.

    ask 1:   j_i     <- argmin_j f_i(theta_j)                  over all local data; ties: the lowest j
    ask 2:   theta_i <- client_opt step on grad f_i(theta_i; batch)       K_i times, from theta_{j_i}
    server:  d_j     = sum_{i: j_i = j} w_i (theta_j - theta_i) / sum_{i: j_i = j} w_i
             theta_j <- server_opt step on d_j;  a cluster that nobody chose stays untouched, its optimizer too

d_j points uphill. Vectors are flat, (P,); `thetas` is (k, P).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpifl.config import require_count
from mpifl.measure import example_sums, without_key
from mpifl.model import Model
from mpifl.optim import Optimizer, sgd
from mpifl.rand import fold
from mpifl.tree import Tree, tree_map
from mpifl.work import Algorithm, Batching, Client, ClientWork, Cohort, Personal, Upload


def hypcluster(
    model: Model,
    clusters: int = 2,
    batches: Batching = Batching(size=20),  # noqa: B008 - immutable
    client_opt: Optimizer = sgd(0.1),  # noqa: B008
    server_opt: Optimizer = sgd(1.0),  # noqa: B008
    weighting: Literal["examples", "uniform"] = "examples",
    loss_size: int = 0,
    seed: int = 0,
) -> Algorithm:
    """Build HypCluster; cluster 0 starts at theta0, the others at initial vectors of their own (from `seed`).

    loss_size: rows per batch of the choosing pass (0: all at once), a matter of memory only.
    """
    require_count("hypcluster's clusters", clusters, least=1, most=1000)
    whole = replace(batches, size=loss_size, epochs=1, steps=None, drop_last=False, max_steps=None)

    def weight(client: Client) -> Tensor:
        return client.n if weighting == "examples" else torch.ones_like(client.n)

    def choose_step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        batch = without_key(batch)
        losses = [example_sums(model.losses(theta, batch), batch) for theta in shared["thetas"].unbind()]
        return {"losses": carry["losses"] + torch.stack(losses)}

    def chosen(shared: Tree, client: Client, carry: Tree) -> Upload:
        return Upload({}, weight(client), scratch={"cluster": carry["losses"].argmin()})

    choose = ClientWork(
        lambda shared, client: {"losses": shared["thetas"].new_zeros(clusters, dtype=torch.float64)},
        choose_step,
        chosen,
        whole,
    )

    def own(shared: Tree, client: Client) -> Tensor:
        # Who has rows to score but none to choose by gets the first.
        first = shared["thetas"].new_zeros((), dtype=torch.int64)
        cluster = client.scratch.get("cluster", first)
        return shared["thetas"].index_select(0, cluster.view(1))[0]

    def start(shared: Tree, client: Client) -> Tree:
        theta = own(shared, client)
        opt = client_opt.init(theta) | {"lr": shared["lr"]}
        return {"theta": theta, "opt": opt, "loss": torch.zeros(()), "steps": torch.zeros(())}

    def step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        grad, loss = model.grad_and_loss(carry["theta"], batch)
        theta, opt = client_opt.apply(carry["theta"], grad, carry["opt"])
        return {"theta": theta, "opt": opt, "loss": carry["loss"] + loss, "steps": carry["steps"] + 1}

    def finish(shared: Tree, client: Client, carry: Tree) -> Upload:
        share = F.one_hot(client.scratch["cluster"], clusters).to(carry["theta"].dtype)
        pseudo_grad = own(shared, client) - carry["theta"]
        stats = {"loss": carry["loss"], "steps": carry["steps"]}
        return Upload({"pseudo_grad": torch.outer(share, pseudo_grad), "share": share}, weight(client), stats=stats)

    train = ClientWork(start, step, finish, batches)

    def init(theta: Tensor) -> Tree:
        others = [model.init(fold(seed, "cluster", j)) for j in range(1, clusters)]
        return {
            "thetas": torch.stack([theta, *others]),
            "opt": {str(j): server_opt.init(theta) for j in range(clusters)},
        }

    def round(state: Tree, cohort: Cohort) -> Tree:
        cohort.sum(choose, thetas=state["thetas"])
        lr = torch.tensor(client_opt.lr(cohort.round))
        sums = cohort.sum(train, thetas=state["thetas"], lr=lr).update
        thetas, opts = list(state["thetas"].clone().unbind()), dict(state["opt"])
        for j, share in enumerate(sums["share"].tolist()):
            if share > 0:
                mean = (sums["pseudo_grad"][j] / share).to(thetas[j].dtype)
                opt = tree_map(torch.clone, opts[str(j)]) | {"lr": torch.tensor(server_opt.lr(cohort.round))}
                thetas[j], opts[str(j)] = server_opt.apply(thetas[j], mean, opt)
        return {"thetas": torch.stack(thetas), "opt": opts}

    def models(state: Tree) -> dict[str, Tensor]:
        return {f"cluster{j}": theta for j, theta in enumerate(state["thetas"].unbind())}

    personal = Personal(shared=lambda state: {"thetas": state["thetas"]}, theta=own, before=(choose,))
    more = {"weighting": weighting, "personal": personal, "elementwise": server_opt.elementwise}
    return Algorithm(init, round, (choose, train), models, **more)
