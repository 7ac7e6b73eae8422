"""Placement: longest processing time first, by its laws and against brute force; owners never change."""

from itertools import product

import numpy as np
import pytest
import torch

from mpifl.comm import Alone
from mpifl.data.memory import MemoryDataset
from mpifl.engine.clock import Clock
from mpifl.engine.host import Host
from mpifl.engine.store import ClientMemory
from mpifl.fleet import Fleet
from mpifl.placement import by_owner, longest_first
from mpifl.work import Batching, ClientWork


def busiest(steps, home, hosts):
    return int(np.bincount(home, weights=steps, minlength=hosts).max())


def optimum(steps, hosts):
    """Smallest possible load of the busiest host, by trying everything."""
    return min(busiest(steps, np.array(home), hosts) for home in product(range(hosts), repeat=len(steps)))


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_busiest_host_is_within_grahams_bound_of_the_optimum(seed, hosts):
    steps = np.random.default_rng(seed).integers(1, 30, size=6)
    home = longest_first(steps, hosts)
    assert busiest(steps, home, hosts) <= (4 / 3 - 1 / (3 * hosts)) * optimum(steps, hosts) + 1e-9


@pytest.mark.parametrize("hosts", [2, 3, 5])
def test_grahams_worst_case_meets_his_bound_exactly(hosts):
    """2m-1, 2m-1, ..., m+1, m+1, m, m, m: 3m is possible, longest first needs 4m - 1 (Graham 1969, section 3)."""
    steps = np.array([*np.repeat(np.arange(2 * hosts - 1, hosts, -1), 2), hosts, hosts, hosts])
    assert steps.sum() == 3 * hosts * hosts
    assert busiest(steps, longest_first(steps, hosts), hosts) == 4 * hosts - 1


@pytest.mark.parametrize("hosts", [1, 3, 8, 200])
def test_each_client_has_one_host_and_none_could_still_be_moved_to_advantage(hosts):
    steps = np.random.default_rng(1).integers(0, 1000, size=150)
    home = longest_first(steps, hosts)
    assert home.shape == (150,) and home.dtype == np.int64 and home.min() >= 0 and home.max() < hosts
    loads = np.bincount(home, weights=steps, minlength=hosts)
    top = loads.argmax()
    least = steps[(home == top) & (steps > 0)].min()
    assert loads.max() - least <= loads.min() or np.count_nonzero((home == top) & (steps > 0)) == 1


def test_ties_go_to_the_lower_host_and_the_earlier_client():
    assert longest_first(np.array([5, 5, 5, 5, 5]), 2).tolist() == [0, 1, 0, 1, 0]
    assert longest_first(np.array([1, 9, 1, 9, 1]), 3).tolist() == [2, 0, 2, 1, 2]


def test_more_hosts_than_clients_gives_each_client_a_host_of_its_own():
    assert longest_first(np.array([3, 7, 5]), 10).tolist() == [2, 0, 1]


def test_clients_without_a_step_cost_nothing_and_nobody_is_nobody():
    assert longest_first(np.array([0, 4, 0, 0]), 2).tolist() == [1, 0, 1, 1]
    assert longest_first(np.zeros(0, dtype=np.int64), 4).tolist() == []


def test_loads_are_added_without_rounding():
    big = 2**53  # big + 1 is no float64
    home = longest_first(np.array([big + 1, big, 1, 1]), 2)
    assert home.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("hosts", [1, 2, 7])
def test_an_owner_is_the_same_whoever_else_is_asked(hosts):
    everyone = by_owner(np.arange(50), hosts)
    some = np.array([3, 49, 8, 20])
    assert (by_owner(some, hosts) == everyone[some]).all()
    counts = np.bincount(everyone, minlength=hosts)
    assert len(counts) == hosts and counts.max() - counts.min() <= 1


class Recorder(Alone):
    """Looks like a world of five ranks to a Fleet that only places."""

    size = 5


def test_a_client_costs_all_its_steps_of_a_round_whichever_work_is_asked_first():
    sizes = [1000, 1000, 1000, *[20] * 17]
    dataset = MemoryDataset([{"x": np.zeros((n, 1), np.float32)} for n in sizes])
    nothing = lambda *arguments: {}  # noqa: E731
    whole = ClientWork(nothing, nothing, nothing, Batching())
    train = ClientWork(nothing, nothing, nothing, Batching(size=10))
    host = Host((whole, train), dataset, ClientMemory({}), 0, Clock())
    fleet = Fleet(Recorder(), host, of_a_round=(whole, train))
    fleet.begin(0)
    homes = fleet._place(whole, np.arange(20))
    steps = train.batches.steps_of(np.asarray(sizes))
    loads = [int(steps[homes == rank].sum()) for rank in range(1, 5)]
    assert max(loads) == 100 and min(loads) == 34  # three big clients alone, the small ones on the fourth host
    assert (fleet._place(train, np.arange(20)) == homes).all()


def test_clients_with_memory_stay_with_their_owner():
    dataset = MemoryDataset([{"x": np.zeros((n, 1), np.float32)} for n in (90, 1, 1, 1, 80, 1)])
    train = ClientWork(*[lambda *arguments: {}] * 3, Batching(size=1))
    host = Host((train,), dataset, ClientMemory({"kept": torch.zeros(2)}), 0, Clock())
    fleet = Fleet(Recorder(), host, of_a_round=(train,))
    homes = [fleet._place(train, ids).tolist() for ids in (np.arange(6), np.asarray([4, 0]))]
    assert homes[1] == [homes[0][4], homes[0][0]]
