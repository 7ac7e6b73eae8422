"""The serial engine's SGD step against a plain hand-written loop, in ms of CPU time, one thread.

EMNIST nets, batch 20; a visit's start and finish are included. Where batches have a mask (it keeps every row)
both loops honour it, and where they have a key both drop out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpifl.algorithms.fedavg import local_training
from mpifl.bench.cases import Case, medians
from mpifl.data.shard import Feature
from mpifl.engine.serial import keep_freed_memory, visit
from mpifl.model import Model, from_module
from mpifl.models.cnn import EmnistConv
from mpifl.models.linear import mlp
from mpifl.optim import sgd
from mpifl.rand import as_tensor, fold
from mpifl.tree import Tree
from mpifl.work import Batching, Client, Upload

EMNIST = {"x": Feature("float32", (28, 28)), "y": Feature("int64", (), classes=62)}
BATCH, LR = 20, 0.01


class PlainConv(EmnistConv):
    """The same net with torch's dropout, as one would write it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return scores, (B, 62)."""
        x = F.relu(self.conv1(x.view(-1, 1, 28, 28)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.dropout(x.flatten(1), 0.25, self.training)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        return self.fc2(x)


STEP_NETS = {"dense": (lambda: mlp(EMNIST), lambda: mlp(EMNIST), 100), "conv": (EmnistConv, PlainConv, 8)}
"""Net for the engine, net for the hand-written loop, and how many steps take long enough to be timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield a case per net, with and without mask and key."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for name, (net, plain, steps) in STEP_NETS.items():
        model = from_module(net)
        for mask, key in ((False, False), (True, False), (False, True), (True, True)):
            batches = made_batches(steps, mask, key)
            by_hand, by_engine = hand_loop(plain(), model, batches), engine_loop(model, batches)
            hand, ours = (1e3 * seconds / steps for seconds in medians(options.repeats, by_hand, by_engine))
            extras = " + ".join(["mask"] * mask + ["key"] * key) or "bare"
            yield {"case": f"{name}, {extras}", "ms_hand": hand, "ms_ours": ours, "ratio": ours / hand}


def made_batches(steps: int, mask: bool, key: bool) -> list[Tree]:
    """Return batches of noise with the leaves asked for."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(steps):
        batch = {
            "x": torch.randn(BATCH, 28, 28, generator=generator),
            "y": torch.randint(62, (BATCH,), generator=generator),
            "index": torch.arange(BATCH),
        }
        batch |= {"mask": torch.ones(BATCH, dtype=torch.bool)} if mask else {}
        batch |= {"key": as_tensor(fold(0, "step", number))} if key else {}
        batches.append(batch)
    return batches


def engine_loop(model: Model, batches: list[Tree]) -> Callable[[], Upload]:
    """Return a visit as a host runs it: start, a step per batch, finish."""
    work = local_training(model, Batching(size=BATCH), sgd(LR), 0.0, "examples")
    shared = {"theta": model.init(0), "lr": torch.tensor(LR)}
    examples = torch.tensor(float(BATCH * len(batches)))
    client = Client(torch.tensor(0), as_tensor(0), examples, {}, torch.tensor(0), {}, {})
    return lambda: visit(work, shared, client, batches)


def hand_loop(net: nn.Module, model: Model, batches: list[Tree]) -> Callable[[], list[nn.Parameter]]:
    """Return what one would write without mpifl, from the same start."""
    net.load_state_dict(model.state_dict(model.init(0)))
    net.train("key" in batches[0])
    parameters, first = list(net.parameters()), [p.detach().clone() for p in net.parameters()]

    def loop() -> list[nn.Parameter]:
        with torch.no_grad():
            torch._foreach_copy_(parameters, first)
        for batch in batches:
            grads = torch.autograd.grad(_plain_loss(net(batch["x"]), batch), parameters)
            with torch.no_grad():
                torch._foreach_sub_(parameters, grads, alpha=LR)
        return parameters

    return loop


def _plain_loss(scores: Tensor, batch: Tree) -> Tensor:
    if "mask" not in batch:
        return F.cross_entropy(scores, batch["y"])
    losses = F.cross_entropy(scores, batch["y"], reduction="none")
    return (losses * batch["mask"]).sum() / batch["mask"].sum()
