"""The model of a round obeys the limits that anyone can derive."""

from dataclasses import replace

import pytest

from mpifl.bench.prediction import SERVER_PASSES, Machine, predict

CLUSTER = Machine(alpha=1e-6, beta=1e-10, gamma=1e-11, ranks_per_node=4, server=0.01)
WAYS = ("flat", "node", "sharded")


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_sends_nothing(way):
    alone = predict(CLUSTER, way, 1, 1000, busy=3.0, imbalance=1.0)
    assert (alone.compute, alone.down, alone.up) == (3.0, 0.0, 0.0)
    assert alone.total == pytest.approx(3.0 + 0.01 + SERVER_PASSES * 4000 * 1e-11)


def test_hosts_share_the_work_until_the_cores_are_taken():
    seconds = [predict(CLUSTER, "flat", 1 + hosts, 0, busy=8.0, imbalance=1.5).compute for hosts in (1, 2, 8)]
    assert seconds == [12.0, 6.0, 1.5]
    crowded = replace(CLUSTER, cores=2)
    assert [predict(crowded, "flat", 1 + hosts, 0, 8.0, 1.0).compute for hosts in (1, 2, 8)] == [8.0, 4.0, 4.0]


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_model_costs_messages_and_a_model_is_proportional_to_its_size(way):
    def communication(parameters):
        found = predict(CLUSTER, way, 16, parameters, 1.0, 1.0)
        return found.down + found.up

    messages = communication(0)
    assert 0 < messages < 50 * CLUSTER.alpha
    assert communication(2_000_000) - messages == pytest.approx(2 * (communication(1_000_000) - messages))


def test_of_a_large_model_every_node_moves_it_once_each_way_when_nodes_add_first():
    """Flat moves r times that, as the ranks of a node share its network; sharded leaves out the way back."""
    free_memory = replace(CLUSTER, alpha=0.0, gamma=0.0)
    moved = {way: predict(free_memory, way, 400, 10**9, 0.0, 1.0) for way in WAYS}
    assert moved["node"].up == pytest.approx(2 * 0.99 * 8e9 * 1e-10)
    assert moved["node"].down == pytest.approx(moved["node"].up / 2)
    assert moved["sharded"].up == pytest.approx(moved["node"].up / 2)
    assert moved["flat"].up == pytest.approx(4 * moved["node"].up, rel=0.01)


def test_on_one_node_there_is_no_network():
    assert predict(replace(CLUSTER, alpha=0.0, beta=1e9), "node", 4, 10**6, 0.0, 1.0).total < 1.0


def test_a_sharded_server_does_its_part_on_every_rank():
    flat, sharded = (
        predict(replace(CLUSTER, server=0.0), way, 50, 10**9, 0.0, 1.0).server for way in ("flat", "sharded")
    )
    assert flat == pytest.approx(50 * sharded)
