"""Stateless randomness: uniform, without repetition, different for every word of the key, the same under vmap."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch

from mpifl.rand import as_tensor, dropout, fold, folds, integers_at, permutation, sample, uniform_int32


def unlikely(counts, expected):
    """Whether these counts are further from `expected` (each) than chance allows: chi-square, six deviations."""
    counts = np.asarray(counts, dtype=float)
    freedom = counts.size - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) > 6 * np.sqrt(2 * freedom)


# --- keys ------------------------------------------------------------------------------------------------


def test_every_word_of_a_key_matters_and_so_does_their_order():
    keys = [fold(*words) for words in itertools.product(range(8), range(8), range(8))]
    keys += [fold(0, "init"), fold(0, "visit"), fold(0, "init", 0), fold(0, 0, "init"), fold(0, 0, 0, 0)]
    keys += [fold(2**63, 0), fold(0, 2**63), fold(0, 2**32), fold(2**32, 0)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)


def test_folding_words_one_by_one_is_folding_them_at_once():
    assert fold(fold(7, "visit"), 3, 4) == fold(7, "visit", 3, 4)


def test_each_bit_of_a_word_flips_half_of_the_keys_bits():
    flips = [(fold(seed, 5) ^ fold(seed ^ (1 << bit), 5)).bit_count() for seed in range(40) for bit in range(64)]
    flips += [(fold(3, word) ^ fold(3, word ^ (1 << bit))).bit_count() for word in range(40) for bit in range(64)]
    assert abs(np.mean(flips) - 32) < 0.5 and min(flips) > 8


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_keys_become_tensors_bit_by_bit(key):
    tensor = as_tensor(key)
    assert tensor.dtype == torch.int64 and tensor.shape == ()
    assert int(tensor) % 2**64 == key


# --- permutations and samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2, 17, 1000])
def test_a_permutation_holds_each_index_once(n):
    order = permutation(fold(3, n), n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_all_permutations_are_equally_likely():
    counts = Counter(tuple(permutation(fold(0, i), 4).tolist()) for i in range(4800))
    assert len(counts) == 24 and not unlikely(list(counts.values()), 200)


@pytest.mark.parametrize(("population", "count"), [(5, 2), (5, 3), (6, 1), (6, 4), (40, 2)])
def test_all_cohorts_are_equally_likely(population, count):
    subsets = list(itertools.combinations(range(population), count))
    rounds = max(2000, 8 * len(subsets))
    counts = Counter(tuple(sample(fold(1, "cohort", r), population, count).tolist()) for r in range(rounds))
    assert set(counts) <= set(subsets)
    assert not unlikely([counts[s] for s in subsets], rounds / len(subsets))


def test_the_estimate_of_a_uniform_cohort_is_unbiased():
    # Sampling with replacement and dropping repetitions, or favouring low indices, would miss the mean.
    values = np.arange(50.0) ** 2
    means = [values[sample(fold(2, r), 50, 10)].mean() for r in range(4000)]
    assert abs(np.mean(means) - values.mean()) < 5 * np.std(means) / np.sqrt(4000)


@pytest.mark.parametrize(("population", "count"), [(10, 10), (10, 99), (10, 0), (1, 1), (100, 51), (100, 50)])
def test_a_sample_is_ascending_distinct_and_of_the_size_asked_for(population, count):
    ids = sample(5, population, count)
    assert ids.dtype == np.int64 and len(ids) == min(count, population)
    assert (np.diff(ids) > 0).all() and (ids >= 0).all() and (ids < population).all()


def test_a_thousand_of_ten_million_are_drawn_at_once():
    sample(0, 10**7, 1000)
    began = time.perf_counter()
    drawn = [sample(fold(0, r), 10**7, 1000) for r in range(20)]
    assert time.perf_counter() - began < 0.5
    ids = np.concatenate(drawn)
    assert all(len(set(d.tolist())) == 1000 for d in drawn)
    assert not unlikely(np.histogram(ids, bins=20, range=(0, 10**7))[0], 1000)


def test_seeds_and_rounds_differ_everywhere():
    samples = {sample(fold(s, "cohort", r), 1000, 10).tobytes() for s in range(20) for r in range(20)}
    orders = {permutation(fold(s, r), 30).tobytes() for s in range(20) for r in range(20)}
    assert len(samples) == len(orders) == 400


def test_neighbouring_keys_draw_independent_samples():
    drawn = [set(sample(key, 10**6, 500).tolist()) for key in range(2**40, 2**40 + 4)]
    assert max(len(a & b) for a, b in itertools.combinations(drawn, 2)) < 6


# --- numbers and dropout ---------------------------------------------------------------------------------


def test_numbers_are_uniform_over_all_of_int32_and_independent_of_their_neighbours():
    x = uniform_int32(as_tensor(fold(0)), (400, 500)).to(torch.float64) / 2**32 + 0.5
    assert not unlikely(torch.histc(x, bins=100, min=0, max=1).numpy(), 2000)
    assert not unlikely(torch.histc(x[:, 1:] * 2**8 % 1, bins=100, min=0, max=1).numpy(), 1996)
    for shift in (1, 2, 64, 500):
        flat = x.flatten()
        assert abs(float(torch.corrcoef(torch.stack([flat[shift:], flat[:-shift]]))[0, 1])) < 0.012


@pytest.mark.parametrize("other", [(1, 0), (0, 1), (2**40, 0), (2**63, 0)])
def test_numbers_of_another_key_or_salt_are_independent(other):
    key, salt = other
    one = uniform_int32(as_tensor(0), (100_000,)).double()
    two = uniform_int32(as_tensor(key), (100_000,), salt).double()
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.02
    assert int((one == two).sum()) < 3


def test_integers_of_an_example_are_uniform_below_each_bound_and_independent():
    below = (9, 1, 2, 2**31)
    draws = integers_at(as_tensor(fold(4)), torch.arange(20_000), below)
    for numbers, n in zip(draws, below):
        assert numbers.dtype == torch.int64 and numbers.shape == (20_000,)
        assert not unlikely(torch.histc(numbers.double(), bins=min(n, 100), min=0, max=n).numpy(), 20_000 / min(n, 100))
    varied = torch.stack([draws[0], draws[2], draws[3]]).double()
    neighbours = torch.cat([varied.roll(shift, dims=1) for shift in (0, 1, 3)])
    assert float((torch.corrcoef(neighbours) - torch.eye(9)).abs().max()) < 0.05


def test_integers_of_an_example_are_a_function_of_key_index_and_salt():
    key, index = as_tensor(fold(4)), torch.tensor([5, 0, 70_000])
    (drawn,) = integers_at(key, index, (10**6,))
    assert torch.equal(integers_at(key, index[[2, 0]], (10**6,))[0], drawn[[2, 0]])
    for other in (integers_at(as_tensor(fold(5)), index, (10**6,)), integers_at(key, index, (10**6,), salt=1)):
        assert not (other[0] == drawn).any()
    keys = torch.stack([as_tensor(fold(0, client)) for client in range(4)])
    together = torch.func.vmap(lambda key: integers_at(key, index, (7, 9)))(keys)
    for k in range(4):
        assert all(torch.equal(a[k], b) for a, b in zip(together, integers_at(keys[k], index, (7, 9))))


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate):
    kept = dropout(torch.full((200, 1000), 3.0), rate, as_tensor(fold(1)))
    share = float((kept == 0).double().mean())
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / 200_000)
    torch.testing.assert_close(kept[kept != 0].unique(), torch.tensor([3.0 / (1 - rate)]))


def test_dropout_is_a_function_of_key_and_salt_and_off_in_evaluation():
    x = torch.ones(1000)
    first = dropout(x, 0.5, as_tensor(1))
    assert torch.equal(first, dropout(x, 0.5, as_tensor(1)))
    assert not torch.equal(first, dropout(x, 0.5, as_tensor(2)))
    assert not torch.equal(first, dropout(x, 0.5, as_tensor(1), salt=1))
    assert dropout(x, 0.5, None) is x and dropout(x, 0.0, as_tensor(1)) is x


def test_dropout_of_each_client_is_the_same_under_vmap():
    keys = torch.stack([as_tensor(fold(0, client)) for client in range(5)])
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    together = torch.func.vmap(lambda row, key: dropout(row, 0.4, key, salt=2))(x, keys)
    for row, key, found in zip(x, keys, together):
        assert torch.equal(found, dropout(row, 0.4, key, salt=2))


def test_folds_are_the_folds_of_counters():
    for key in (0, 7, (1 << 64) - 1):
        assert folds(key, 5).tolist() == [fold(key, n) for n in range(5)]
    assert len(folds(3, 0)) == 0
