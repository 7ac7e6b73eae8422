"""Partitions: each example lands once, sizes and labels follow the distribution that was asked for, and the options."""

import argparse
from itertools import pairwise

import numpy as np
import pytest

from data_prep import partition
from data_prep.partition import (
    _divided,
    _draw,
    _hands,
    _log_gamma,
    by_column,
    classes,
    dirichlet,
    dirichlet_class,
    equal_labels,
    iid,
    log_normal,
    power_law,
    shards,
    stratified,
)
from data_prep.sharing import OPTIONS, PARTITIONS, add_arguments, describe, shares
from mpifl.config import UserError

LABELS = np.random.RandomState(1).choice(10, 997, p=np.arange(1, 11) / 55)
BALANCED = np.repeat(np.arange(10), 4000)

# Everything that promises to use all examples, as a user asks for it.
ASKED = {
    "iid": "",
    "dirichlet": "--alpha 0.3",
    "dirichlet-class": "--alpha 0.3",
    "shards": "--shards-per-client 3",
    "classes": "--classes-per-client 3",
    "log-normal": "--sigma 2",
    "power-law": "--exponent 1.5",
    "by-column": "",
}


def counts(labels, part, classes=10):
    return np.bincount(labels[part], minlength=classes)


def sizes(parts):
    return np.array(list(map(len, parts)))


PARSER = argparse.ArgumentParser()
add_arguments(PARSER)


def options(text):
    return PARSER.parse_args(text.split())


def share(text, labels=LABELS, groups=LABELS, **given):
    return shares(options(text), labels, groups, **given)


def assert_every_example_once(parts, count):
    parts = list(parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(count))
    assert all((np.diff(part) > 0).all() for part in parts)


# ---- all partitions


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("clients", [7, 40, 60])
def test_every_example_lands_once_in_ascending_order(name, clients):
    asked = "" if name == "by-column" else f"--clients {clients}"
    for seed in range(8):
        found = share(f"--partition {name} {asked} {ASKED[name]} --seed {seed}")
        assert_every_example_once(found.train.values(), len(LABELS))
        assert found.test == {}


@pytest.mark.parametrize("name", [name for name in ASKED if name not in ("by-column", "classes", "shards")])
@pytest.mark.parametrize("clients", [1, 1001])
def test_clients_may_be_one_or_more_than_examples_and_have_ids_of_one_length(name, clients):
    found = share(f"--partition {name} --clients {clients} {ASKED[name]}").train
    assert_every_example_once(found.values(), len(LABELS))
    assert list(found) == (["client-000"] if clients == 1 else [f"client-{i:04d}" for i in range(1001)])


@pytest.mark.parametrize("name", [*ASKED, "equal-labels"])
def test_a_partition_depends_on_its_seed_alone(name):
    def found(seed):
        asked = "--clients 9" if name != "by-column" else "--hold-out 0.3"
        made = share(f"--partition {name} {asked} {ASKED.get(name, '--per-label 2')} --seed {seed}")
        return np.concatenate([*made.train.values(), [-1], *made.test.values()]).tolist()

    np.random.seed(5)
    first = found(0)
    np.random.seed(6)  # the global stream has no say
    assert found(0) == first
    assert found(1) != first


@pytest.mark.parametrize("name", [*ASKED, "equal-labels"])
def test_labels_may_be_words_of_any_kind(name):
    words = np.array([f"letter é{label}" for label in LABELS])
    asked = "--clients 9" if name != "by-column" else ""
    text = f"--partition {name} {asked} {ASKED.get(name, '--per-label 2')}"
    of_numbers, of_words = share(text), share(text, words, words)
    for expected, part in zip(of_numbers.train.values(), of_words.train.values(), strict=True):
        np.testing.assert_array_equal(part, expected)


# ---- equal sizes


@pytest.mark.parametrize(("count", "clients"), [(10, 3), (997, 100), (5, 8), (6, 6)])
def test_iid_sizes_are_equal_to_within_one(count, clients):
    assert np.ptp(sizes(iid(count, clients))) == (count % clients > 0)


def test_iid_per_client_gives_exactly_that_many_and_none_twice():
    parts = iid(997, 100, per_client=9, seed=2)
    assert set(sizes(parts)) == {9}
    assert len(np.unique(np.concatenate(parts))) == 900
    assert set(sizes(iid(900, 100, per_client=9))) == {9}
    with pytest.raises(UserError, match=r"100 clients x 9 need 900 examples, there are 899; .*--per-client"):
        iid(899, 100, per_client=9)


def test_iid_gives_an_example_to_every_client_equally_often():
    draws = 1000
    owners = np.array([np.repeat(range(3), 2)[np.argsort(np.concatenate(iid(6, 3, seed=s)))] for s in range(draws)])
    for client in range(3):
        deviation = np.sqrt(draws * (1 / 3) * (2 / 3))
        assert (np.abs((owners == client).sum(axis=0) - draws / 3) < 5 * deviation).all()


def test_equal_labels_gives_the_same_number_of_every_label_and_no_example_twice():
    parts = equal_labels(LABELS, 3, 4, seed=0)
    assert [counts(LABELS, part).tolist() for part in parts] == [[4] * 10] * 3
    assert len(np.unique(np.concatenate(parts))) == 120


def test_equal_labels_gives_as_many_as_the_rarest_label_has():
    rarest = counts(LABELS, slice(None)).min()
    assert [counts(LABELS, part).tolist() for part in equal_labels(LABELS, 3)] == [[rarest // 3] * 10] * 3


def test_equal_labels_names_the_label_that_has_too_few():
    rarest = counts(LABELS, slice(None))[0]
    with pytest.raises(UserError, match=f"label 0 has {rarest} examples.*--per-label"):
        equal_labels(LABELS, 1, int(rarest) + 1, seed=0)
    with pytest.raises(UserError, match=f"label 0 has {rarest} examples, {rarest + 1} clients x 1 need more"):
        equal_labels(LABELS, int(rarest) + 1)
    assert len(equal_labels(LABELS, 1, int(rarest), seed=0)) == 1


# ---- label skew


@pytest.mark.parametrize("clients", [1, 7, 100, 2000])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 1e4])
def test_dirichlet_gives_every_example_once_and_equal_sizes(clients, alpha):
    parts = dirichlet(LABELS, clients, alpha, seed=3)
    assert len(parts) == clients
    assert_every_example_once(parts, len(LABELS))
    assert np.ptp(sizes(parts)) <= 1


def test_dirichlet_shares_vary_as_the_distribution_says():
    # Var of a share: (1/K)(1 - 1/K)/(K alpha + 1) of the Dirichlet, plus E[q(1 - q)]/n of drawing n examples.
    # The first quarter of the clients draws before any label runs out.
    n, alpha = 50, 0.5
    shares = np.array([counts(BALANCED, part) / n for part in dirichlet(BALANCED, 800, alpha, seed=0)[:200]])
    variance = 0.09 / (10 * alpha + 1)
    assert shares.var() == pytest.approx(variance + (0.09 - variance) / n, rel=0.1)
    assert shares.mean(axis=0) == pytest.approx(np.full(10, 0.1), abs=0.03)


@pytest.mark.parametrize("mix", [[1.0, 0.0, 0.0], [np.nan] * 3])
def test_client_whose_labels_have_run_out_takes_what_is_left(mix):
    taken = _draw(3, np.array(mix), np.array([1, 2, 0]), np.random.RandomState(0))
    assert taken.tolist() == [1, 2, 0]


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_dirichlet_class_shares_vary_as_the_distribution_says(alpha):
    # A client's share of a label is Beta(alpha, (C - 1) alpha); 1,000 examples of a label resolve it to 0.001.
    clients, labels = 5, np.repeat(np.arange(200), 1000)
    found = np.array([counts(labels, part, 200) / 1000 for part in dirichlet_class(labels, clients, alpha, seed=1)])
    assert found.var() == pytest.approx((1 / clients) * (1 - 1 / clients) / (clients * alpha + 1), rel=0.1)
    assert found.mean(axis=1) == pytest.approx(np.full(clients, 1 / clients), abs=0.1)


def test_gamma_draws_have_the_gamma_moments_and_never_underflow():
    random = np.random.RandomState(0)
    draws = np.exp(_log_gamma(0.5, 100_000, random))
    assert draws.mean() == pytest.approx(0.5, rel=0.02)
    assert draws.var() == pytest.approx(0.5, rel=0.05)
    # E[log Gamma(a)] is digamma(a) = -1/a - 0.5772 + 1.645 a - ..., its deviation about 1/a.
    logarithms = _log_gamma(0.01, 100_000, random)
    assert np.isfinite(logarithms).all() and logarithms.min() < np.log(np.finfo(float).tiny)
    assert logarithms.mean() == pytest.approx(-100 - 0.5772 + 0.0164, abs=5 * 100 / np.sqrt(100_000))


def test_dirichlet_class_is_drawn_again_until_nobody_has_too_few():
    unlucky = [seed for seed in range(20) if sizes(dirichlet_class(LABELS, 20, 0.5, seed=seed)).min() < 10]
    assert unlucky
    for seed in unlucky:
        parts = dirichlet_class(LABELS, 20, 0.5, min_examples=10, seed=seed)
        assert sizes(parts).min() >= 10
        assert_every_example_once(parts, len(LABELS))


def test_dirichlet_class_gives_up_with_an_explanation(monkeypatch):
    monkeypatch.setattr(partition, "REDRAWS", 20)
    with pytest.raises(UserError, match=r"at least 49 of 997 examples each were not found in 20 draws.*raise --alpha"):
        dirichlet_class(LABELS, 20, 0.05, min_examples=49)
    with pytest.raises(
        UserError, match=r"20 clients with at least 50 of 997 examples each cannot be; .*--min-examples"
    ):
        dirichlet_class(LABELS, 20, 1e4, min_examples=50)


def test_shards_that_end_with_their_label_give_a_client_at_most_so_many_labels():
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 40))
    parts = shards(labels, 100, 2, seed=4)
    assert set(sizes(parts)) == {4}
    held = np.array([counts(labels, part) for part in parts])
    assert set(held.ravel()) <= {0, 2, 4}


def test_shards_are_runs_of_the_sorted_labels_equal_to_within_one():
    # 997 examples in 21 shards of 47 or 48: a client's labels are what 3 intervals of the sorted labels cover.
    parts = shards(LABELS, 7, 3, seed=4)
    assert np.ptp(sizes(parts)) <= 3
    ranked, starts = np.sort(LABELS), np.cumsum([0, *[48] * (997 % 21), *[47] * (21 - 997 % 21)])
    runs = [np.bincount(ranked[start:stop], minlength=10) for start, stop in pairwise(starts)]
    triples = {tuple(runs[a] + runs[b] + runs[c]) for a in range(21) for b in range(a) for c in range(b)}
    assert {tuple(counts(LABELS, part)) for part in parts} <= triples


def test_shards_go_to_clients_at_random():
    # 10 labels of 2 shards each: a client's second shard is the other of its label once in 19.
    labels = np.repeat(np.arange(10), 2)
    alone = [len(np.unique(labels[part])) == 1 for seed in range(400) for part in shards(labels, 10, 2, seed)]
    assert np.mean(alone) == pytest.approx(1 / 19, abs=0.02)


@pytest.mark.parametrize(("clients", "each"), [(5, 2), (10, 1), (40, 3), (1, 10), (3, 10), (13, 7)])
def test_classes_gives_each_client_exactly_so_many_labels_shared_equally(clients, each):
    for seed in range(5):
        parts = classes(LABELS, clients, each, seed)
        held = np.array([counts(LABELS, part) for part in parts])
        assert ((held > 0).sum(axis=1) == each).all()
        owners = (held > 0).sum(axis=0)
        assert np.ptp(owners) <= 1
        for label in range(10):
            assert np.ptp(held[:, label][held[:, label] > 0]) <= 1


def test_every_pair_of_labels_is_dealt_equally_often():
    hands = [tuple(sorted(hand)) for hand in _hands(5, 20_000, 2, np.random.RandomState(0))]
    pairs, times = np.unique(hands, axis=0, return_counts=True)
    assert len(pairs) == 10 and (pairs[:, 0] < pairs[:, 1]).all()
    assert (np.abs(times - 2000) < 5 * np.sqrt(20_000 * 0.1 * 0.9)).all()


# ---- quantity skew


def test_log_normal_sizes_have_the_asked_sigma_and_shape():
    for sigma in (0.3, 1.0):
        logarithms = np.log(sizes(log_normal(400_000, 1000, sigma, seed=1)).clip(1))
        standard = (logarithms - logarithms.mean()) / sigma
        assert standard.std() == pytest.approx(1, rel=0.06)
        assert np.mean(np.abs(standard) < 1) == pytest.approx(0.683, abs=0.04)
        assert np.mean(standard > 2) == pytest.approx(0.0228, abs=0.012)


def test_log_normal_without_deviation_is_iid():
    assert np.ptp(sizes(log_normal(997, 100, 0.0))) <= 1


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_power_law_sizes_have_the_asked_exponent(exponent):
    # P(size > c * smallest) = c ** (1 - exponent), for every c.
    found = sizes(power_law(500_000, 1000, exponent, seed=3))
    for factor in (1.5, 3, 9):
        expected = factor ** (1 - exponent)
        deviation = np.sqrt(expected * (1 - expected) / 1000)
        assert abs(np.mean(found > factor * found.min()) - expected) < 4 * deviation + 0.01


@pytest.mark.parametrize("asked", ["log-normal --sigma 1.5", "power-law --exponent 2"])
def test_skewed_sizes_are_filled_at_random(asked):
    # The mean row of a client of n is the middle row, with deviation N / sqrt(12 n).
    count = 20_000
    for rows in share(f"--partition {asked} --clients 50", None, None, count=count).train.values():
        assert abs(rows.mean() - count / 2) < 5 * count / np.sqrt(12 * len(rows))


def test_counts_are_divided_to_within_one_of_their_share():
    random = np.random.RandomState(0)
    for count in (0, 1, 10, 12345):
        logarithms = random.standard_normal(50) * 3
        weights = np.exp(logarithms)
        found = np.bincount(_divided(count, logarithms + 5000), minlength=50)  # a common factor cancels
        assert found.sum() == count
        assert (np.abs(found - count * weights / weights.sum()) < 1 + 1e-6).all()


# ---- by column


def test_by_column_makes_a_client_of_each_value():
    found = by_column(np.array(["zoë", "adam", "zoë", "", "adam"]))
    assert {name: rows.tolist() for name, rows in found.items()} == {"": [3], "adam": [1, 4], "zoë": [0, 2]}
    assert list(found) == ["", "adam", "zoë"]
    assert list(by_column(np.array([10, -1, 9, 10]))) == ["-1", "9", "10"]
    assert list(by_column(np.array(["b", "a"], object))) == ["a", "b"]


# ---- hold-out


@pytest.mark.parametrize("asked", ["iid --clients 30", "log-normal --sigma 1.5 --clients 30", "by-column"])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_examples_are_held_out_of_each_client(asked, fraction):
    whole = share(f"--partition {asked}").train
    found = share(f"--partition {asked} --hold-out {fraction}")
    assert list(found.train) == list(found.test) == list(whole)
    for name, rows in whole.items():
        train, test = found.train[name], found.test[name]
        assert len(test) == round(fraction * len(rows))
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), rows)
        assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()


def test_every_example_is_held_out_equally_often():
    draws = 400
    held = [share(f"--partition by-column --hold-out 0.25 --seed {s}", None, np.arange(8) % 2) for s in range(draws)]
    times = np.bincount(np.concatenate([np.concatenate([*found.test.values()]) for found in held]), minlength=8)
    assert (np.abs(times - draws / 4) < 5 * np.sqrt(draws * 0.25 * 0.75)).all()


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_clients_are_held_out_whole(fraction):
    whole = share("--clients 30").train
    train, test = share(f"--clients 30 --hold-out {fraction} --hold-out-by clients")
    assert len(test) == round(30 * fraction)
    assert sorted([*train, *test]) == list(whole)
    for found in (train, test):
        assert list(found) == sorted(found)
        for name, rows in found.items():
            np.testing.assert_array_equal(rows, whole[name])


def test_every_client_is_held_out_equally_often():
    draws = 400
    held = [
        name
        for s in range(draws)
        for name in share(f"--clients 8 --hold-out 0.25 --hold-out-by clients --seed {s}", LABELS[:8]).test
    ]
    times = np.unique(held, return_counts=True)[1]
    assert len(times) == 8 and (np.abs(times - draws / 4) < 5 * np.sqrt(draws * 0.25 * 0.75)).all()


# ---- options


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("--clients 0", "--clients 0: it must be at least 1$"),
        ("--per-client 0", "--per-client 0: "),
        ("--partition equal-labels --per-label 0", "--per-label 0: "),
        ("--partition dirichlet", "--partition dirichlet needs --alpha: concentration"),
        ("--partition dirichlet --alpha 0", "--alpha 0.0: it must be at least 0.01 and finite"),
        ("--partition dirichlet --alpha nan", "--alpha nan: "),
        ("--partition dirichlet-class --alpha inf", "--alpha inf: "),
        ("--partition dirichlet-class --alpha 1 --min-examples -1", "--min-examples -1: "),
        ("--partition shards --shards-per-client 0", "--shards-per-client 0: "),
        ("--partition shards --clients 500", "997 examples make no 1,000 shards; lower --clients or --shards"),
        ("--partition classes --classes-per-client 11", "of 10 labels: a client has at most all labels"),
        ("--partition classes --clients 4", "4 clients x 2 of 10 labels"),
        ("--partition classes --clients 900", r"label 0 has \d+ examples for 180 clients; lower --clients"),
        ("--partition log-normal", "needs --sigma: deviation"),
        ("--partition log-normal --sigma -1", "--sigma -1.0: "),
        ("--partition log-normal --sigma inf", "--sigma inf: "),
        ("--partition power-law --exponent 1", "--exponent 1.0: it must be at least 1.01 and finite"),
        ("--partition power-law --exponent nan", "--exponent nan: "),
        ("--alpha 0.3", "--partition iid does not take --alpha; leave it out"),
        ("--partition by-column --clients 3", "--partition by-column does not take --clients"),
        ("--seed -1", "--seed -1: it must be 0 to 4294967295"),
        ("--hold-out 1", "--hold-out 1.0: it must be at least 0 and below 1"),
        ("--hold-out nan", "--hold-out nan: "),
        ("--hold-out 0.01 --clients 100", r"--hold-out 0.01 of each client's examples rounds to none; raise it"),
        ("--hold-out 0.01 --hold-out-by clients --clients 9", "--hold-out 0.01 of 9 clients is 0"),
        ("--hold-out 0.99 --hold-out-by clients --clients 9", "--hold-out 0.99 of 9 clients is 9"),
        ("--hold-out-by clients", "--hold-out-by clients needs --hold-out"),
    ],
)
def test_mistakes_name_the_option_on_one_line(asked, problem):
    with pytest.raises(UserError, match=problem) as error:
        share(asked)
    assert "\n" not in str(error.value)


def test_a_source_without_labels_ids_or_rows_says_so():
    with pytest.raises(UserError, match="--partition shards needs labels, there is none here"):
        share("--partition shards", None)
    with pytest.raises(UserError, match="--partition by-column needs a column of client ids"):
        share("--partition by-column", LABELS, None)
    with pytest.raises(UserError, match="no examples to share out"):
        share("", LABELS[:0])
    assert_every_example_once(share("--clients 4", None, None, count=10).train.values(), 10)
    assert_every_example_once(share("--clients 4", None, np.arange(11)).train.values(), 11)


def test_every_option_is_refused_where_it_says_nothing():
    given = {"per_client": 1, "per_label": 1, "alpha": 1, "min_examples": 0, "sigma": 1, "exponent": 2}
    given |= {"shards_per_client": 2, "classes_per_client": 2, "clients": 5}
    assert given.keys() == OPTIONS.keys()
    needed = {"dirichlet": {"alpha"}, "dirichlet-class": {"alpha"}, "log-normal": {"sigma"}, "power-law": {"exponent"}}
    for name, function in PARTITIONS.items():
        takes = set(function.__annotations__) & given.keys()
        for option in given:
            words = [f"--{key.replace('_', '-')} {given[key]}" for key in {option} | needed.get(name, set())]
            asked = options(f"--partition {name} {' '.join(words)}")
            if option in takes:
                describe(asked)
            else:
                with pytest.raises(UserError, match=f"--partition {name} does not take --{option.replace('_', '-')}"):
                    describe(asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("--clients 1000", "1,000 clients, iid, seed 0"),
        ("--per-client 50", "100 clients, iid (per client 50), seed 0"),
        ("--partition dirichlet --alpha 0.3 --seed 7", "100 clients, dirichlet (alpha 0.3), seed 7"),
        ("--partition by-column", "by-column, seed 0"),
        ("--hold-out 0.2", "100 clients, iid, seed 0; 0.2 of each client's examples held out as split test"),
        (
            "--hold-out 0.2 --hold-out-by clients",
            "100 clients, iid, seed 0; 0.2 of the clients held out as split test",
        ),
    ],
)
def test_a_partition_is_described_for_provenance(asked, words):
    assert describe(options(asked)) == words


def test_help_lists_every_partition_and_who_takes_an_option(capsys):
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, default="shards")
    assert parser.parse_args([]).partition == "shards"
    printed = parser.format_help()
    for name, function in PARTITIONS.items():
        assert f"  {name} " in printed and function.__doc__.splitlines()[0] in printed
    words = " ".join(printed.split())
    assert "--alpha X dirichlet, dirichlet-class: concentration" in words
    assert "(default: shards)" in words
    assert max(map(len, printed.splitlines())) <= 120


# ---- a drawn test set


@pytest.mark.parametrize("count", [0, 1, 13, 360, 997])
def test_stratified_keeps_the_share_of_every_label(count):
    drawn = stratified(LABELS, count, seed=0)
    assert len(np.unique(drawn)) == count
    shares = counts(LABELS, slice(None)) * count / len(LABELS)
    assert (np.abs(counts(LABELS, drawn) - shares) < 1).all()


def test_stratified_depends_on_the_seed_and_refuses_more_than_there_are():
    np.testing.assert_array_equal(stratified(LABELS, 100, 0), stratified(LABELS, 100, 0))
    assert not np.array_equal(stratified(LABELS, 100, 0), stratified(LABELS, 100, 1))
    with pytest.raises(UserError, match="998 of 997"):
        stratified(LABELS, 998, 0)
