"""Seeded partitions of a corpus over clients: a list with one array of row indices per client, ascending.

Randomness is numpy.random.RandomState throughout: NumPy's policy freezes its streams, so that one seed gives
one partition, hence the same bytes of a dataset, under every NumPy version. Generator makes no such promise.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.random import RandomState

from mpifl.config import UserError

CLIENTS = 100
REDRAWS = 1000
LEAST_ALPHA = 0.01  # below, the weights that RandomState.dirichlet draws underflow
LEAST_EXPONENT = 1.01  # at 1 no density falls so slowly; just above, one client has nearly everything

Parts = list[np.ndarray]


def iid(count: int, clients: int, per_client: int | None = None, seed: int = 0) -> Parts:
    """Deal examples at random, in equal sizes to within one.

    per_client: exactly so many each; the rest is not used. Raises UserError if there are too few.
    """
    _at_least(1, clients=clients, per_client=per_client)
    order = RandomState(seed).permutation(count)
    if per_client is not None:
        if clients * per_client > count:
            raise UserError(
                f"{clients:,} clients x {per_client} need {clients * per_client:,} examples, there are {count:,}; "
                "lower --clients or --per-client"
            )
        order = order[: clients * per_client]
    return _parts(count, order, np.arange(len(order)) % clients, clients)


def equal_labels(labels: np.ndarray, clients: int, per_label: int | None = None, seed: int = 0) -> Parts:
    """Give each client equally many examples of every label; the rest is not used.

    per_label: how many (default: as many as the rarest label has for all). Raises UserError naming the label that
    has too few.
    """
    _at_least(1, clients=clients, per_label=per_label)
    pools = _shuffled_by_label(labels, RandomState(seed))
    per_label = max(1, min(map(len, pools), default=0) // clients) if per_label is None else per_label
    shares = []
    for pool in pools:
        if len(pool) < clients * per_label:
            found = f"label {labels[pool[0]]} has {len(pool)} examples"
            raise UserError(f"{found}, {clients} clients x {per_label} need more; lower --clients or --per-label")
        shares.append(pool[: clients * per_label].reshape(clients, per_label))
    return list(np.sort(np.concatenate(shares, axis=1), axis=1))


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int = 0) -> Parts:
    """Draw each client's label distribution from Dir(alpha); equal sizes (Hsu et al. 2019).

    A client fills its share from what the clients before it left; a label that has run out is dropped and the
    others scaled up. Sizes are equal to within one. `alpha` is the concentration of each label (the paper's alpha
    times its prior, 1 / labels).
    """
    _at_least(1, clients=clients)
    _at_least(LEAST_ALPHA, alpha=alpha)
    random = RandomState(seed)
    pools = _shuffled_by_label(labels, random)
    left = np.array([len(pool) for pool in pools])
    counts = np.empty((clients, len(pools)), np.int64)
    for client, mix in enumerate(random.dirichlet(np.full(len(pools), alpha), clients)):
        wanted = len(labels) // clients + (client < len(labels) % clients)
        counts[client] = _draw(wanted, mix, left, random)
        left -= counts[client]
    owners = np.concatenate([np.repeat(np.arange(clients), of_label) for of_label in counts.T])
    # Pools are served from their ends: the shipped digits are made so.
    return _parts(len(labels), np.concatenate([pool[::-1] for pool in pools]), owners, clients)


def dirichlet_class(labels: np.ndarray, clients: int, alpha: float, min_examples: int = 0, seed: int = 0) -> Parts:
    """Divide each label's examples by Dir(alpha); sizes vary (Yurochkin et al. 2019).

    min_examples: drawn again until each client has so many (Li et al. 2022: 10); UserError after 1,000 draws.
    """
    _at_least(1, clients=clients)
    _at_least(LEAST_ALPHA, alpha=alpha)
    _at_least(0, min_examples=min_examples)
    random = RandomState(seed)
    wanted = f"{clients:,} clients with at least {min_examples} of {len(labels):,} examples each"
    if clients * min_examples > len(labels):
        raise UserError(f"{wanted} cannot be; lower --clients or --min-examples")
    pools, best = _shuffled_by_label(labels, random), 0
    for _ in range(REDRAWS):
        owners = np.concatenate([_divided(len(pool), _log_gamma(alpha, clients, random)) for pool in pools])
        smallest = np.bincount(owners, minlength=clients).min()
        if smallest >= min_examples:
            return _parts(len(labels), np.concatenate(pools), owners, clients)
        best = max(best, smallest)
    hint = "lower --clients or --min-examples, or raise --alpha"
    raise UserError(f"{wanted} were not found in {REDRAWS} draws (best: at least {best}); {hint}")


def shards(labels: np.ndarray, clients: int, shards_per_client: int = 2, seed: int = 0) -> Parts:
    """Sort by label, cut into equal shards, give each client some (McMahan et al. 2017: 2).

    Shards are equal to within one example. A shard may lie across the border of labels, so that a client may have more
    labels than shards. Raises UserError for more shards than examples.
    """
    _at_least(1, clients=clients, shards_per_client=shards_per_client)
    total = clients * shards_per_client
    if total > len(labels):
        raise UserError(f"{len(labels):,} examples make no {total:,} shards; lower --clients or --shards-per-client")
    random = RandomState(seed)
    order = np.concatenate(_shuffled_by_label(labels, random))
    owners = random.permutation(total) % clients
    return _parts(len(labels), order, np.repeat(owners, _equal(len(labels), total)), clients)


def classes(labels: np.ndarray, clients: int, classes_per_client: int = 2, seed: int = 0) -> Parts:
    """Give each client k labels and an equal part of their examples (Li et al. 2022: #C = k).

    Labels are dealt at random, each to equally many clients to within one (the paper draws them independently, which
    may leave some out); its examples are divided equally to within one. Raises UserError if a label would be left out
    or has fewer examples than clients.
    """
    _at_least(1, clients=clients, classes_per_client=classes_per_client)
    random = RandomState(seed)
    pools = _shuffled_by_label(labels, random)
    if not classes_per_client <= len(pools) <= clients * classes_per_client:
        raise UserError(
            f"{clients:,} clients x {classes_per_client} of {len(pools)} labels: a client has at most all labels, and "
            "every label needs a client; change --clients or --classes-per-client"
        )
    holders: list[list[int]] = [[] for _ in pools]
    for client, hand in enumerate(_hands(len(pools), clients, classes_per_client, random)):
        for label in hand:
            holders[label].append(client)
    for pool, clients_of_label in zip(pools, holders):
        if len(pool) < len(clients_of_label):
            found = f"label {labels[pool[0]]} has {len(pool)} examples for {len(clients_of_label)} clients"
            raise UserError(f"{found}; lower --clients or --classes-per-client")
    owners = np.concatenate([np.repeat(held, _equal(len(pool), len(held))) for pool, held in zip(pools, holders)])
    return _parts(len(labels), np.concatenate(pools), owners, clients)


def log_normal(count: int, clients: int, sigma: float, seed: int = 0) -> Parts:
    """Draw sizes whose logarithm is normal, of deviation sigma; deal examples at random.

    All are used, so that the mean size is given; each size is within one of its share, and may be 0.
    """
    _at_least(1, clients=clients)
    _at_least(0, sigma=sigma)
    random = RandomState(seed)
    owners = _divided(count, sigma * random.standard_normal(clients))
    return _parts(count, random.permutation(count), owners, clients)


def power_law(count: int, clients: int, exponent: float, seed: int = 0) -> Parts:
    """Draw sizes of density size ** -exponent (Clauset et al. 2009); deal examples at random.

    All are used, so that the mean size is given; each size is within one of its share, and may be 0.
    """
    _at_least(1, clients=clients)
    _at_least(LEAST_EXPONENT, exponent=exponent)
    random = RandomState(seed)
    owners = _divided(count, random.standard_exponential(clients) / (exponent - 1))
    return _parts(count, random.permutation(count), owners, clients)


def by_column(groups: np.ndarray) -> dict[str, np.ndarray]:
    """Make one client of each value of a column, in ascending order: natural clients."""
    values, owners = np.unique(groups, return_inverse=True)
    parts = _parts(len(groups), np.arange(len(groups)), owners, len(values))
    return dict(zip(map(str, values.tolist()), parts))


PARTITIONS: dict[str, Callable[..., Any]] = {
    "iid": iid,
    "equal-labels": equal_labels,
    "dirichlet": dirichlet,
    "dirichlet-class": dirichlet_class,
    "shards": shards,
    "classes": classes,
    "log-normal": log_normal,
    "power-law": power_law,
    "by-column": by_column,
}
OPTIONS = {  # a partition takes those that its function names; what has no default there must be given
    "clients": (int, f"number of clients (default: {CLIENTS})"),
    "per_client": (int, "examples of each client, exactly (default: all are used)"),
    "per_label": (int, "examples of each label and client (default: as many as there are)"),
    "alpha": (float, "concentration: towards 0 a client has one label, towards infinity all alike"),
    "min_examples": (int, "examples that each client has at least (default: 0)"),
    "shards_per_client": (int, "shards of each client (default: 2)"),
    "classes_per_client": (int, "labels of each client (default: 2)"),
    "sigma": (float, "deviation of the logarithm of sizes"),
    "exponent": (float, "how fast the density of sizes falls, above 1"),
}


class Shares(NamedTuple):
    """Both splits: client id -> its row indices, ascending; `test` is empty without --hold-out."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser, default: str = "iid") -> None:
    """Declare --partition and everything it takes, --seed, and --hold-out."""
    lines = [f"  {name:17}{function.__doc__.splitlines()[0]}" for name, function in PARTITIONS.items()]
    group = parser.add_argument_group("partition", "how examples are shared out over clients:\n" + "\n".join(lines))
    group.add_argument(
        "--partition", choices=PARTITIONS, default=default, metavar="NAME", help=f"see above (default: {default})"
    )
    for option, (kind, what) in OPTIONS.items():
        takers = [name for name, function in PARTITIONS.items() if option in _parameters(function)]
        users = "all but by-column" if option == "clients" else ", ".join(takers)
        metavar = "N" if kind is int else "X"
        group.add_argument(_flag(option), type=kind, metavar=metavar, help=f"{users}: {what}")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random here (default: 0)")
    held = parser.add_argument_group("hold-out", "examples kept from training, as split test")
    held.add_argument("--hold-out", type=float, default=0.0, metavar="FRACTION", help="how much (default: 0, nothing)")
    held.add_argument(
        "--hold-out-by",
        choices=("examples", "clients"),
        help="that fraction of each client's examples, rounded (default), or of the clients, with all that is theirs",
    )


def shares(
    options: argparse.Namespace,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    count: int | None = None,
) -> Shares:
    """Share examples out as `add_arguments`' options say.

    labels, groups: one value per row, (rows,); groups are what by-column goes by. count: rows of a corpus that has
    neither. Held out by examples, both splits have the same ids in the same order. Raises UserError naming the
    option to change.
    """
    partition, arguments = PARTITIONS[options.partition], _arguments(options)
    if count is None:
        count = len(groups if labels is None else labels)
    for name, value in {"labels": labels, "groups": groups, "count": count, "seed": options.seed}.items():
        if name in _parameters(partition):
            arguments[name] = value
            if value is None:
                what = "a column of client ids" if name == "groups" else "labels"
                raise UserError(f"--partition {options.partition} needs {what}, there is none here; choose another")
    if not count:
        raise UserError("there are no examples to share out; look at the source")
    found = partition(**arguments)
    clients = found if partition is by_column else dict(zip(_ids(len(found)), found))
    if not options.hold_out:
        return Shares(clients, {})
    # A stream of its own: what is held out does not change the partition.
    hold_out = _hold_out_clients if options.hold_out_by == "clients" else _hold_out_examples
    return hold_out(clients, options.hold_out, RandomState((options.seed, 1)))


def describe(options: argparse.Namespace) -> str:
    """Say for provenance how examples are shared out, e.g. "1,000 clients, iid, seed 0"."""
    arguments = _arguments(options)
    clients = f"{arguments.pop('clients'):,} clients, " if "clients" in arguments else ""
    own = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in arguments.items())
    whose = "of the clients" if options.hold_out_by == "clients" else "of each client's examples"
    held = f"; {options.hold_out} {whose} held out as split test" if options.hold_out else ""
    return f"{clients}{options.partition}{f' ({own})' if own else ''}, seed {options.seed}{held}"


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` examples in which every label has its share of the corpus, to within one; indices, ascending."""
    if not 0 <= count <= len(labels):
        raise UserError(f"{count} of {len(labels)} examples cannot be drawn")
    pools = _shuffled_by_label(labels, RandomState(seed))
    shares = np.array([count * len(pool) / len(labels) for pool in pools])
    counts = np.floor(shares).astype(int)
    largest_remainders = np.argsort(counts - shares, kind="stable")[: count - counts.sum()]
    counts[largest_remainders] += 1
    return np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, counts)]))


def _hold_out_examples(clients: dict[str, np.ndarray], fraction: float, random: RandomState) -> Shares:
    train, test = {}, {}
    for name, rows in clients.items():
        held = random.permutation(len(rows)) < round(fraction * len(rows))
        train[name], test[name] = rows[~held], rows[held]
    if not any(map(len, test.values())):
        raise UserError(f"--hold-out {fraction} of each client's examples rounds to none; raise it, or lower --clients")
    return Shares(train, test)


def _hold_out_clients(clients: dict[str, np.ndarray], fraction: float, random: RandomState) -> Shares:
    count = round(fraction * len(clients))
    if not 0 < count < len(clients):
        raise UserError(f"--hold-out {fraction} of {len(clients)} clients is {count}; one must be held out, one stay")
    held = random.permutation(len(clients)) < count
    named = list(zip(held, clients.items()))
    return Shares(dict(item for out, item in named if not out), dict(item for out, item in named if out))


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The chosen partition's own options, refusing what is missing, out of place or out of range."""
    parameters = _parameters(PARTITIONS[options.partition])
    arguments = {}
    for name in OPTIONS:
        value = getattr(options, name)
        if name not in parameters:
            if value is not None:
                raise UserError(f"--partition {options.partition} does not take {_flag(name)}; leave it out")
        elif value is not None:
            arguments[name] = value
        elif name == "clients":
            arguments[name] = CLIENTS
        elif parameters[name].default is inspect.Parameter.empty:
            raise UserError(f"--partition {options.partition} needs {_flag(name)}: {OPTIONS[name][1]}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: it must be 0 to {2**32 - 1}")
    if options.hold_out_by and not options.hold_out:
        raise UserError(f"--hold-out-by {options.hold_out_by} needs --hold-out and a fraction")
    if not 0 <= options.hold_out < 1:
        raise UserError(f"--hold-out {options.hold_out}: it must be at least 0 and below 1")
    return arguments


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _ids(clients: int) -> list[str]:
    digits = max(3, len(str(clients - 1)))
    return [f"client-{number:0{digits}d}" for number in range(clients)]


def _at_least(least: float, **given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not least <= value < np.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise UserError(f"{_flag(name)} {value}: it must be at least {least}{finite}")


def _shuffled_by_label(labels: np.ndarray, random: RandomState) -> Parts:
    order = np.argsort(labels, kind="stable")
    ranked = labels[order]
    borders = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1
    return [random.permutation(pool) for pool in np.split(order, borders)]


def _parts(count: int, rows: np.ndarray, owners: np.ndarray, clients: int) -> Parts:
    """Rows of each client, ascending; `owners` are those of `rows`, other rows of 0 .. count - 1 are nobody's."""
    owner = np.full(count, -1, np.int64)
    owner[rows] = owners
    order = np.argsort(owner, kind="stable")
    borders = np.searchsorted(owner[order], np.arange(clients + 1))
    return [order[start:stop] for start, stop in pairwise(borders)]


def _divided(count: int, log_weights: np.ndarray) -> np.ndarray:
    """Owners of `count` rows, (count,), ascending: each client's number of rows is within one of its share."""
    reached = np.cumsum(np.exp(log_weights - log_weights.max()))
    stops = np.floor(reached / reached[-1] * count).astype(np.int64)
    return np.repeat(np.arange(len(log_weights)), np.diff(stops, prepend=0))


def _equal(total: int, parts: int) -> np.ndarray:
    return total // parts + (np.arange(parts) < total % parts)


def _log_gamma(alpha: float, count: int, random: RandomState) -> np.ndarray:
    """Logarithms of Gamma(alpha) draws, which for small alpha underflow themselves (Marsaglia and Tsang 2000)."""
    return np.log(random.standard_gamma(alpha + 1, count)) + np.log1p(-random.random_sample(count)) / alpha


def _hands(labels: int, clients: int, each: int, random: RandomState) -> list[list[int]]:
    """Deal `each` different labels to every client, from shuffled decks of all labels, one after another."""
    hands, deck = [], []
    for _ in range(clients):
        hand, deck = deck[:each], deck[each:]
        if len(hand) < each:
            fresh = random.permutation(labels).tolist()
            deck = [label for label in fresh if label not in hand] + [label for label in fresh if label in hand]
            missing = each - len(hand)
            hand, deck = hand + deck[:missing], deck[missing:]
        hands.append(hand)
    return hands


def _draw(wanted: int, mix: np.ndarray, left: np.ndarray, random: RandomState) -> np.ndarray:
    """Draw counts per label, (labels,), from `mix` without exceeding `left`; draws that do are made again."""
    taken = np.zeros_like(left)
    while (short := wanted - taken.sum()) > 0:
        weights = mix * (left > taken)
        if not weights.sum() > 0:  # only labels that this client would never draw are left, or its mix underflowed
            weights = (left - taken).astype(float)
        taken += np.minimum(random.multinomial(short, weights / weights.sum()), left - taken)
    return taken
