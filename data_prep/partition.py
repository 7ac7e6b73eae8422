"""Seeded partitions of a corpus over clients: a list with one array of row indices per client, ascending.

Randomness is numpy.random.RandomState throughout: NumPy's policy freezes its streams, so that one seed gives
one partition, hence the same bytes of a dataset, under every NumPy version. Generator makes no such promise.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.random import RandomState

from mpifl.config import UserError

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


def flag(name: str) -> str:
    """Return the option that sets this argument of a partition."""
    return "--" + name.replace("_", "-")


def _at_least(least: float, **given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not least <= value < np.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise UserError(f"{flag(name)} {value}: it must be at least {least}{finite}")


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
