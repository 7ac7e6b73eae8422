"""Metrics as sums over examples, and the ClientWorks that collect them.

A metric is a function (scores, batch, options...) of the model's scores, (B, ...). It returns an array with a row
per example, whose mean is reported, or sums over the rows that `batch["mask"]` keeps: a `Ratio` or `Counts`. Sums
are all that travels, so a score does not depend on who scored which examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpifl.config import Run, UserError
from mpifl.model import Model, column_of, targets_of, traced
from mpifl.tree import Tree, tree_map
from mpifl.work import Batching, Client, ClientWork, Upload

PAD, BOS, EOS = 0, 1, 2
"""Ids of language data that are no words; a target that is PAD is no target."""
BLOCK = Run.eval_batch
"""Rows of one block of a central split, unless the job says otherwise."""
MOST_CLASSES, MOST_DOMAINS = 1000, 100
"""Sizes beyond which a confusion matrix or a vector of domains is refused: they are written at every evaluation."""


class Ratio(NamedTuple):
    """Sums whose ratio is reported: values / weights elementwise, 0 where the weight is 0; of one shape, float64."""

    values: Tensor
    weights: Tensor


class Counts(NamedTuple):
    """Sums that are reported as they are; float64."""

    values: Tensor


Metric = Callable[[Tensor, Tree], Tensor | Ratio | Counts]
"""(scores (B, ...), batch) -> values (B, ...), reported as their mean over examples, or sums over the batch."""


# --- sums ------------------------------------------------------------------------------------------------


def without_key(batch: Tree) -> Tree:
    """The same batch for evaluation: no key, so no dropout and no augmentation."""
    return {name: leaf for name, leaf in batch.items() if name != "key"}


def example_sums(values: Tensor, batch: Tree) -> Tensor:
    """Sum per-example values, (B, ...), over rows the mask keeps; (...) float64, so that long sums stay sharp."""
    values = values.to(torch.float64)
    if "mask" in batch:
        values = torch.where(batch["mask"].view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return values.sum(dim=0)


def summed(found: Tensor | Ratio | Counts, batch: Tree) -> Ratio | Counts:
    """What a metric returned, as sums over the batch: values per example become a mean's."""
    if not isinstance(found, Tensor):
        return found
    values, examples = example_sums(found, batch), example_sums(torch.ones_like(batch["index"]), batch)
    return Ratio(values, examples.expand_as(values))


def _named(label: str, sums: Ratio | Counts) -> Tree:
    """Sums as stats: the values under the metric's label, what they are divided by beside them."""
    weights = {f"{label}/weight": sums.weights} if isinstance(sums, Ratio) else {}
    return {label: sums.values} | weights


def ratios(stats: Mapping[str, Any], undefined: float = 0.0) -> dict[str, np.ndarray]:
    """Return {metric: what is reported}, float64, from stats; `undefined` where the weight is 0.

    Leading axes may be added to all leaves alike, as those of single clients have.
    """
    reported = {}
    for name, sums in stats.items():
        if name in ("examples", "weight") or name.endswith("/weight"):
            continue
        values = np.asarray(sums, dtype=np.float64)
        weights = np.asarray(stats.get(f"{name}/weight", 1.0), dtype=np.float64)
        reported[name] = np.divide(values, weights, out=np.full_like(values, undefined), where=weights != 0)
    return reported


def means(stats: Mapping[str, Any]) -> dict[str, Any]:
    """`ratios` as floats and nested lists; NaN-free, 0 where nothing was scored."""
    return {name: values.tolist() for name, values in ratios(stats).items()}


def headline(metrics: Iterable[str], scores: Mapping[str, Any]) -> str:
    """Name of the first metric that is one number in `scores`, "loss" if there is none."""
    return next((name for name in metrics if isinstance(scores.get(name), float)), "loss")


# --- classification --------------------------------------------------------------------------------------


def accuracy(scores: Tensor, batch: Tree) -> Tensor:
    """1.0 where the highest of the scores, (B, classes), is at `batch["y"]`, (B,); (B,)."""
    y = targets_of(batch, scores, 1, "metric accuracy", other="token_accuracy")
    return (scores.argmax(dim=-1) == y).to(torch.float32)


def top_k(scores: Tensor, batch: Tree, k: int = 5) -> Tensor:
    """1.0 where `batch["y"]`, (B,), is among the k highest of the scores, (B, classes); of equals the first; (B,)."""
    y = targets_of(batch, scores, 1, "metric top_k", other="token_accuracy")
    if not 1 <= k <= scores.shape[-1]:
        raise UserError(f"metric top_k: k is {k}; it must be from 1 to the {scores.shape[-1]} classes scored")
    highest = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return (highest == y[:, None]).any(dim=-1).to(torch.float32)


def confusion(scores: Tensor, batch: Tree) -> Counts:
    """Count examples by [true, predicted] class: (classes, classes)."""
    y = targets_of(batch, scores, 1, "metric confusion", other="token_accuracy")
    classes = scores.shape[-1]
    if classes > MOST_CLASSES:
        raise UserError(f"metric confusion: {classes} classes are scored; it is for {MOST_CLASSES} at most")
    kept = batch.get("mask", torch.ones_like(y)).to(torch.float64)
    cells = y * classes + scores.argmax(dim=-1)
    return Counts(kept.new_zeros(classes * classes).scatter_add(0, cells, kept).view(classes, classes))


def per_domain(scores: Tensor, batch: Tree, metric: Metric, domains: int) -> Ratio | Counts:
    """Any metric over the examples of each domain, `batch["domain_id"]` (B,) from 0 to domains - 1: (domains, ...)."""
    if not 1 <= domains <= MOST_DOMAINS:
        raise UserError(f"metric per_domain: domains is {domains}; it must be from 1 to {MOST_DOMAINS}")
    domain_of_each = column_of(batch, "domain_id", "metric per_domain")
    if not traced() and (domain_of_each >= domains).any():
        highest = int(domain_of_each.max())
        raise UserError(f"metric per_domain: domains is {domains}, and there is a domain_id {highest}; it must be more")
    kept = batch.get("mask", torch.ones_like(domain_of_each, dtype=torch.bool))
    each = [batch | {"mask": kept & (domain_of_each == domain)} for domain in range(domains)]
    sums = [summed(metric(scores, one), one) for one in each]
    return type(sums[0])(*map(torch.stack, zip(*sums)))


# --- language --------------------------------------------------------------------------------------------


def token_accuracy(scores: Tensor, batch: Tree, outside: tuple[int, ...] = (PAD, BOS, EOS)) -> Ratio:
    """Share of tokens predicted, over targets `batch["y"]`, (B, L), inside the vocabulary; scores (B, L, ids).

    outside: ids that are never counted and never predicted; StackOverflow's out-of-vocabulary id belongs to them.
    """
    y = targets_of(batch, scores, 2, "metric token_accuracy", other="accuracy")
    words = sorted(set(range(scores.shape[-1])) - set(outside))
    if not words or not all(0 <= id < scores.shape[-1] for id in outside):
        some = f"some of the ids scored, 0 to {scores.shape[-1] - 1}, and not all"
        raise UserError(f"metric token_accuracy: outside is {list(outside)}; it must hold {some}")
    inside = torch.ones(scores.shape[-1], dtype=torch.bool, device=scores.device)
    inside[list(outside)] = False
    counted = inside[y] & (y != PAD)
    hits = counted & (_best(scores, words, inside) == y)
    return Ratio(example_sums(hits.sum(dim=-1), batch), example_sums(counted.sum(dim=-1), batch))


def _best(scores: Tensor, words: list[int], inside: Tensor) -> Tensor:
    """Where the highest of the scores of `words` is; no copy of large scores where the other ids are at the ends."""
    span = slice(words[0], words[-1] + 1)
    scores = scores[..., span]
    if len(words) < scores.shape[-1]:
        scores = scores.masked_fill(~inside[span], -torch.inf)
    return scores.argmax(dim=-1) + words[0]


def token_loss(scores: Tensor, batch: Tree) -> Ratio:
    """Mean cross entropy of scores, (B, L, ids), over the targets `batch["y"]`, (B, L), that are not PAD; nats."""
    y = targets_of(batch, scores, 2, "metric token_loss", other="the loss of every job")
    losses = F.cross_entropy(scores.flatten(0, 1), y.flatten(), ignore_index=PAD, reduction="none").view_as(y)
    tokens = (y != PAD).sum(dim=-1)
    return Ratio(example_sums(losses.sum(dim=-1), batch), example_sums(tokens, batch))


# --- the works -------------------------------------------------------------------------------------------


def scoring(
    model: Model,
    metrics: dict[str, Metric],
    split: str,
    of: Literal["client", "block", "all"],
    theta_of: Callable[[Tree, Client], Tensor] = lambda shared, client: shared["theta"],
    numbers_only: bool = False,
    size: int = BLOCK,
) -> ClientWork:
    """Score one vector: stats are the sums of `loss` and each metric, and `examples`; weight is examples.

    theta_of: (shared, client) -> (P,), for clients that have a vector of their own. numbers_only: leave out metrics
    that are more than one number. size: rows scored at a time, fixed, so that sums do not
    depend on who scores what.
    """

    def start(shared: Tree, client: Client) -> Tree:
        return {"theta": theta_of(shared, client), "sums": {}}  # each metric knows its shape, at the first batch

    def step(shared: Tree, client: Client, carry: Tree, batch: Tree) -> Tree:
        batch = without_key(batch)
        scores = model.scores(carry["theta"], batch)
        found = {"loss": model.loss(scores, batch)} | {name: metric(scores, batch) for name, metric in metrics.items()}
        sums = {"examples": example_sums(torch.ones_like(batch["index"]), batch)}
        for name, values in found.items():
            sums |= _named(name, summed(values, batch))
        if carry["sums"]:
            sums = tree_map(torch.add, carry["sums"], sums)
        return {"theta": carry["theta"], "sums": sums}

    def finish(shared: Tree, client: Client, carry: Tree) -> Upload:
        sums = carry["sums"]
        stats = {name: total for name, total in sums.items() if not (numbers_only and total.dim())}
        return Upload(update={}, weight=sums["examples"], stats=stats)

    return ClientWork(start, step, finish, Batching(size=size, shuffle=False, split=split, of=of))
