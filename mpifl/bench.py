"""Benchmarks: `python -m mpifl.bench FAMILY`; with no family, it lists them.

Contestants of a case run in turn (A B A B ...), so that a slow minute of the machine hits all of them, and
medians are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpifl.algorithms.fedavg import local_training
from mpifl.comm import Alone, World
from mpifl.config import UserError, choice
from mpifl.console import Console
from mpifl.data.shard import Feature
from mpifl.engine.serial import visit
from mpifl.launch import Parser, command
from mpifl.model import from_module
from mpifl.models.cnn import emnist_conv
from mpifl.models.linear import mlp
from mpifl.optim import sgd
from mpifl.rand import as_tensor, fold
from mpifl.results import hardware, versions
from mpifl.tree import Tree
from mpifl.work import Batching, Client

Case = dict[str, Any]
"""One row of a table, and one line of JSON: "case" says what was measured, the other keys carry their units."""

EMNIST = {"x": Feature("float32", (28, 28)), "y": Feature("int64", (), classes=62)}
STEP_MODELS = {"dense": (mlp, 100), "conv": (emnist_conv, 8)}
"""Model factories, and how many steps of each take long enough to be timed."""
BATCH, LR = 20, 0.01


def step(options: argparse.Namespace) -> Iterator[Case]:
    """The serial engine's SGD step against a plain hand-written loop: EMNIST nets, batch 20, one thread.

    The mask keeps every row, so it changes nothing but the work; with a key, both loops drop out.
    """
    torch.set_num_threads(1)
    for name, (factory, steps) in STEP_MODELS.items():
        for mask, key in ((False, False), (True, False), (False, True), (True, True)):
            batches = _batches(steps, mask, key)
            ours, hand = _engine_loop(factory, batches), _hand_loop(factory, batches, training=key)
            ms_hand, ms_ours = (1e3 * seconds / steps for seconds in _medians(options.repeats, hand, ours))
            extras = " + ".join(["mask"] * mask + ["key"] * key)
            yield {"case": f"{name}, {extras or 'bare'}", "ms hand": ms_hand, "ms ours": ms_ours, "ratio": ms_ours / ms_hand}


def _batches(steps: int, mask: bool, key: bool) -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(steps):
        batch = {
            "x": torch.randn(BATCH, 28, 28, generator=generator),
            "y": torch.randint(62, (BATCH,), generator=generator),
            "index": torch.arange(BATCH),
        }
        if mask:
            batch["mask"] = torch.ones(BATCH, dtype=torch.bool)
        if key:
            batch["key"] = as_tensor(fold(0, "step", number))
        batches.append(batch)
    return batches


def _engine_loop(factory: Callable[..., nn.Module], batches: list[Tree]) -> Callable[[], None]:
    """A visit, as a host runs it: start, a step per batch, finish."""
    model = from_module(lambda: factory(EMNIST))
    work = local_training(model, Batching(size=BATCH), sgd(LR), 0.0, "examples")
    shared = {"theta": model.init(0), "lr": torch.tensor(LR)}
    count = torch.tensor(float(BATCH * len(batches)))
    client = Client(torch.tensor(0), as_tensor(0), count, {}, torch.tensor(0), {}, {})
    return lambda: visit(work, shared, client, batches)


def _hand_loop(factory: Callable[..., nn.Module], batches: list[Tree], training: bool) -> Callable[[], None]:
    """What one would write without mpifl; dropout is torch's own."""
    net: nn.Module = HandConv() if factory is emnist_conv else factory(EMNIST)
    net.train(training)
    parameters, first = list(net.parameters()), [p.detach().clone() for p in net.parameters()]

    def loop() -> None:
        with torch.no_grad():
            torch._foreach_copy_(parameters, first)
        for batch in batches:
            gradients = torch.autograd.grad(_hand_loss(net(batch["x"]), batch), parameters)
            with torch.no_grad():
                torch._foreach_sub_(parameters, gradients, alpha=LR)

    return loop


def _hand_loss(scores: Tensor, batch: Tree) -> Tensor:
    if "mask" not in batch:
        return F.cross_entropy(scores, batch["y"])
    mask = batch["mask"]
    return (F.cross_entropy(scores, batch["y"], reduction="none") * mask).sum() / mask.sum()


class HandConv(nn.Module):
    """The EMNIST net of mpifl/models/cnn.py with torch's dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(64 * 12 * 12, 128), nn.Linear(128, 62)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x.view(-1, 1, 28, 28)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.dropout(x.flatten(1), 0.25, self.training)
        x = F.dropout(F.relu(self.fc1(x)), 0.5, self.training)
        return self.fc2(x)


def _medians(repeats: int, *contestants: Callable[[], None]) -> list[float]:
    """Median seconds of each, run in turn after one run that is not counted."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for repeat in range(repeats + 1):
        for run, spent in zip(contestants, seconds):
            began = time.process_time()
            run()
            if repeat:
                spent.append(time.process_time() - began)
    return [median(spent) for spent in seconds]


FAMILIES: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {"step": step}


def report(family: str, cases: Iterator[Case], json_file: str | None, console: Console) -> None:
    """Print a table of the cases, a row as soon as it is measured; append them to a file as JSON lines."""
    machine = {"versions": versions("none"), "hardware": hardware(torch.device("cpu"))}
    for number, case in enumerate(cases):
        if number == 0:
            console.say(f"{'':<24}" + "".join(f"{column:>12}" for column in case if column != "case"))
        console.say(f"{case['case']:<24}" + "".join(f"{v:>12.3f}" for k, v in case.items() if k != "case"))
        if json_file:
            with Path(json_file).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"family": family} | case | machine) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name.startswith("-"):
        listed = "\n".join(f"  {family:<8}{function.__doc__.splitlines()[0]}" for family, function in FAMILIES.items())
        parser = Parser(
            prog="python -m mpifl.bench",
            usage="python -m mpifl.bench FAMILY [options]",
            description=f"Measure a family of cases:\n{listed}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.read(comm, arguments or ["--help"])
        return
    family = FAMILIES[choice(name, FAMILIES, "benchmark")]
    parser = Parser(prog=f"python -m mpifl.bench {name}", description=family.__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each contestant (15)")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per case")
    options = parser.read(comm, arguments[1:])
    if options is None:
        return
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}; it must be at least 1")
    if comm.rank == 0:
        report(name, family(options), options.json, Console())


if __name__ == "__main__":
    sys.exit(main())
