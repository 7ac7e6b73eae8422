"""Clients that drop out, are slow or fail: laws of the virtual clock, and runs that go on without them."""

import json
import math
import os
import re
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import SIZES, awkward_dataset
from test_same_everywhere import results

import mpifl
from mpifl.algorithms.scaffold import scaffold
from mpifl.comm import Alone
from mpifl.config import Device, Engine, Faults, UserError, load, resolved, to_toml
from mpifl.data.batches import epochs
from mpifl.data.memory import MemoryDataset
from mpifl.engine.clients import of_the_machine
from mpifl.engine.clock import Clock
from mpifl.engine.host import Host
from mpifl.engine.store import ClientMemory
from mpifl.faults import Visit, asked, devices, durations, examples_read, turnout
from mpifl.fleet import MOST_TOLD, Fleet
from mpifl.session import Session
from mpifl.work import Algorithm, Batching, ClientWork, Upload

TESTS = Path(__file__).parent
EVERYBODY = np.arange(20_000)
ALGORITHMS = [
    {"name": "fedavg", "mu": 0.1},
    {"name": "scaffold", "client_lr": 0.05, "weighting": "examples"},
    {"name": "mime", "gradient_size": 4},
    {"name": "hypcluster", "clusters": 2},
]
PHONES = [
    {"share": 2, "slowdown": 1, "down_mbps": 1},
    {"slowdown": 8, "spread": 0.5, "down_mbps": 0.1, "up_mbps": 0.05},
]


FAULTY = {"dropout": 0.3, "over_selection": 0.4, "deadline": 30.0, "seconds_per_example": 1.0, "devices": PHONES}


def job(out, **changes):
    return {
        "rounds": 4,
        "cohort": 5,
        "data": {"path": "parts:awkward_dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": "fedavg", "batches": {"size": 4}},
        "run": {"out": str(out)},
    } | changes


def opened(table):
    return closing(Session.open(load(table), Alone(), Clock()))


def of_each_round(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def close(found, expected, deviation, sigmas=4.5):
    assert abs(found - expected) < sigmas * deviation, (found, expected, deviation)


# --- the job file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("faults.dropout=1.5", "faults.dropout is 1.5; it must be between 0 and 1"),
        ("faults.dropout=nan", "faults.dropout is nan; it must be between 0 and 1"),
        ("faults.dropout=often", "faults.dropout is 'often'; it must be a number"),
        ("faults.drop=0.1", "there is no faults option 'drop'; did you mean 'dropout'? (allowed: deadline, devices, "),
        ("faults.over_selection=-0.1", "faults.over_selection is -0.1; it must be between 0 and 100"),
        ("faults.seconds_per_example=inf", "faults.seconds_per_example is inf; it must be between 0 and 1e+06"),
        ("faults.tolerate=-1", "faults.tolerate is -1; it must be at least 0"),
        ("faults.tolerate=0.5", "faults.tolerate is 0.5; it must be an integer"),
        ("faults.devices=3", "faults.devices is 3; it must be a list, each a table"),
        ("faults.devices=[3]", "faults.devices is 3; it must be a table"),
        (
            "faults.devices=[{slow = 2}]",
            "there is no faults.devices option 'slow'; did you mean 'slowdown'? (allowed: ",
        ),
        ("faults.devices=[{share = 0}]", "faults.devices.share is 0.0; it must be between 1e-06 and 1e+06"),
        ("faults.devices=[{slowdown = -1}]", "faults.devices.slowdown is -1.0; it must be between 1e-06 and 1e+06"),
        ("faults.devices=[{spread = 9}]", "faults.devices.spread is 9.0; it must be between 0 and 5"),
        ("faults.devices=[{up_mbps = -1}]", "faults.devices.up_mbps is -1.0; it must be between 0 and 1e+06"),
        (
            "faults.deadline=5",
            "faults.deadline is 5.0, but all visits take 0 virtual seconds; set faults.seconds_per_example, or "
            "down_mbps and up_mbps of faults.devices",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(override, line):
    with pytest.raises(UserError) as raised:
        load(job(""), [override])
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def test_more_than_everybody_cannot_be_asked():
    with pytest.raises(UserError, match=r"over_selection is 0.3, but cohort is 0: all clients are asked already"):
        load(job(""), ["cohort=0", "faults.over_selection=0.3"])


def test_faults_of_a_job_file_can_be_written_and_read_again(tmp_path):
    (tmp_path / "a.toml").write_text(to_toml(job("", faults=FAULTY)))
    read = load(tmp_path / "a.toml")
    assert read.faults.devices == tuple(Device(**phone) for phone in PHONES) and read.faults.simulated
    (tmp_path / "b.toml").write_text(to_toml(resolved(read)))
    assert load(tmp_path / "b.toml") == read
    assert not load(job("", faults={"tolerate": 3})).faults.simulated


# --- devices and durations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batching",
    [
        Batching(),
        Batching(size=4),
        Batching(size=4, epochs=3),
        Batching(size=4, epochs=2, drop_last=True),
        Batching(size=4, steps=5),
        Batching(size=4, steps=5, drop_last=True, max_examples=9),
        Batching(size=4, epochs=3, max_steps=4, max_examples=6),
        Batching(steps=3),
    ],
)
def test_examples_read_are_those_that_batches_hold(batching):
    counted = examples_read(batching, np.arange(25))
    assert counted.tolist() == [sum(map(len, epochs(n, batching, 0))) for n in range(25)]


def test_devices_are_shared_out_as_said_and_belong_to_a_client():
    faults = Faults(devices=(Device(1, 1), Device(0.5, 2), Device(2.5, 3, down_mbps=8, up_mbps=0.5)))
    own = devices(faults, 7, EVERYBODY)
    for slowdown, share in ((1, 0.25), (2, 0.125), (3, 0.625)):
        found = np.mean(own.slowdown == slowdown)
        close(found, share, math.sqrt(share * (1 - share) / len(EVERYBODY)))
    fast = own.slowdown < 3
    assert (own.down == np.where(fast, 0, 1e-6)).all() and (own.up == np.where(fast, 0, 16e-6)).all()
    some = np.array([3, 19_999, 5])
    assert (devices(faults, 7, some).slowdown == own.slowdown[some]).all()
    assert 0.3 < np.mean(devices(faults, 8, EVERYBODY).slowdown == own.slowdown) < 0.7


def test_spread_is_that_of_a_log_normal_around_the_tier():
    faults = Faults(devices=(Device(slowdown=3, spread=0.5),))
    logs = np.log(devices(faults, 0, EVERYBODY).slowdown / 3) / 0.5
    close(logs.mean(), 0, 1 / math.sqrt(len(logs)))
    close(logs.var(), 1, math.sqrt(2 / len(logs)))
    for sigmas, share in ((1, 0.6827), (2, 0.9545)):
        close(np.mean(abs(logs) < sigmas), share, math.sqrt(share * (1 - share) / len(logs)))


def test_a_duration_is_bytes_over_links_and_examples_times_seconds_summed_over_asks():
    visits = (Visit(Batching(size=5, epochs=2), 3_000_000, 500_000), Visit(Batching(max_examples=4), 1_000_000, 0))
    slow = Faults(seconds_per_example=0.1, devices=(Device(slowdown=2.5, down_mbps=8, up_mbps=2),))
    # 4 MB down at 1 MB/s, 0.5 MB up at 0.25 MB/s, and (2 * 12 + 4) or (2 * 3 + 3) examples of 0.25 s
    assert durations(slow, 0, visits, np.array([0, 1]), np.array([12, 3])) == pytest.approx([13.0, 8.25])
    links = Faults(devices=slow.devices)
    assert durations(links, 0, visits, np.array([0]), np.array([12])) == pytest.approx([6.0])
    assert durations(Faults(dropout=0.5), 0, visits, np.array([0]), np.array([12])).tolist() == [0.0]


@pytest.mark.parametrize(
    "algorithm, asks",  # bytes down and up, of P parameters and a few numbers, in vectors
    [
        ({"name": "fedavg"}, [(1, 1)]),
        ({"name": "scaffold"}, [(2, 2)]),
        ({"name": "mime"}, [(1, 1), (3, 1)]),
        ({"name": "hypcluster", "clusters": 3}, [(3, 0), (3, 3)]),
    ],
)
def test_bytes_of_a_visit_are_those_of_the_algorithms_vectors(tmp_path, algorithm, asks):
    with opened(job(tmp_path, algorithm=algorithm)) as session:
        vector = 4 * session.parts.model.size
        found = [(visit.down, visit.up) for visit in session.visits]
    assert len(found) == len(asks)
    for (down, up), (vectors_down, vectors_up) in zip(found, asks):
        assert 0 <= down - vectors_down * vector <= 16 and 0 <= up - vectors_up * vector <= 16


# --- who counts ------------------------------------------------------------------------------------------


def among(faults, seconds, cohort, round=0, able=None):
    seconds = np.asarray(seconds, float)
    able = np.ones(len(seconds), bool) if able is None else able
    return turnout(faults, 0, round, cohort, np.arange(len(seconds)), able, seconds)


@pytest.mark.parametrize(
    "cohort, over, count", [(30, 0, 30), (30, 0.1, 33), (30, 0.3, 39), (10, 0.25, 13), (3, 0.01, 4), (100, 0.07, 107)]
)
def test_so_many_more_are_asked(cohort, over, count):
    assert asked(cohort, over) == count


@pytest.mark.parametrize(
    "cohort, deadline, ids, late, seconds",
    [
        (6, 0, [0, 1, 2, 3, 4, 5], 0, 9.0),  # the last one
        (4, 0, [0, 2, 3, 5], 2, 4.0),  # the cohort is complete
        (4, 100, [0, 2, 3, 5], 2, 4.0),
        (4, 4, [0, 2, 3, 5], 2, 4.0),  # just in time
        (4, 3.5, [0, 2, 3], 3, 3.5),  # closed by the deadline
        (6, 0.5, [], 6, 0.5),
        (10, 100, [0, 1, 2, 3, 4, 5], 0, 9.0),  # there are no more
    ],
)
def test_a_round_by_hand(cohort, deadline, ids, late, seconds):
    faults = Faults(deadline=deadline, seconds_per_example=1)
    found = among(faults, [3, 9, 1, 2, 5, 4], cohort)
    assert (found.ids.tolist(), found.dropped, found.late, found.seconds) == (ids, 0, late, seconds)


def test_a_server_waits_until_the_deadline_for_clients_that_dropped_out():
    faults = Faults(deadline=50, seconds_per_example=1, dropout=0.5)
    found = [among(faults, np.arange(1.0, 21), 20, round) for round in range(20)]
    assert {turn.seconds for turn in found} == {50.0} and {turn.late for turn in found} == {0}
    told = among(Faults(dropout=0.5), np.arange(1.0, 21), 20, 3)
    assert told.ids.tolist() == found[3].ids.tolist() and told.seconds == told.ids[-1] + 1


def test_dropout_has_its_rate_and_neither_client_nor_round_matters():
    rate, rounds, clients = 0.2, 400, 500
    stays = np.zeros((rounds, clients))
    for round in range(rounds):
        found = among(Faults(dropout=rate), np.zeros(clients), clients, round)
        stays[round, found.ids] = 1
        assert found.dropped == clients - len(found.ids)
    variance = rate * (1 - rate)
    close(1 - stays.mean(), rate, math.sqrt(variance / stays.size))
    for axis, draws in ((0, rounds), (1, clients)):  # counts of independent draws vary by n p (1 - p)
        counts = stays.sum(axis=axis)
        close(counts.var(), draws * variance, draws * variance * math.sqrt(2 / len(counts)))
    more = among(Faults(dropout=0.5), np.zeros(clients), clients, 0).ids
    assert set(more) < set(np.flatnonzero(stays[0]))


def test_the_deadline_only_adds_clients_and_time():
    rng = np.random.default_rng(0)
    for round in range(30):
        seconds, able = rng.exponential(10, 40), rng.random(40) < 0.9
        found = [
            among(Faults(deadline=d, seconds_per_example=1, dropout=0.2), seconds, 25, round, able)
            for d in (0.01, 1, 3, 10, 20, 40, 1000)
        ]
        for sooner, later in pairwise(found):
            assert set(sooner.ids) <= set(later.ids) and sooner.seconds <= later.seconds
        none = among(Faults(dropout=0.2), seconds, 25, round, able)
        assert none.ids.tolist() == found[-1].ids.tolist()


def test_everybody_asked_is_accounted_for_and_the_fastest_count():
    rng = np.random.default_rng(1)
    for round in range(50):
        able, seconds = rng.random(39) < 0.9, rng.exponential(10, 39)
        faults = Faults(deadline=rng.uniform(1, 40), seconds_per_example=1, dropout=0.1)
        found = among(faults, seconds, 30, round, able)
        counted = found.ids[able[found.ids]]
        assert found.asked == 39 and len(counted) <= 30 and (np.diff(found.ids) > 0).all()
        assert set(np.flatnonzero(~able)) <= set(found.ids)
        assert len(found.ids) + found.dropped + found.late == 39
        faster = np.count_nonzero(able & (seconds <= seconds[counted].max(initial=0)))
        assert len(counted) <= faster <= len(counted) + found.dropped


def test_clients_that_are_equally_fast_take_turns():
    rounds, counted = 3000, np.zeros(20)
    for round in range(rounds):
        ids = among(Faults(), np.full(20, 2.0), 15, round).ids
        assert len(ids) == 15
        counted[ids] += 1
    spread = math.sqrt(rounds * 0.75 * 0.25)
    close(counted.max(), rounds * 0.75, spread)
    close(counted.min(), rounds * 0.75, spread)


# --- whole runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a["name"])
def test_time_that_leaves_nobody_out_changes_no_bit(tmp_path, algorithm):
    table = job(tmp_path / "plain", algorithm=algorithm | {"batches": {"size": 4}})
    plain = mpifl.run(table)
    faults = {"deadline": 1e6, "seconds_per_example": 0.1, "devices": PHONES, "tolerate": 3}
    slow = mpifl.run(table | {"faults": faults, "run": {"out": str(tmp_path / "slow")}})
    assert results(tmp_path / "plain") == results(tmp_path / "slow")
    assert plain["virtual_seconds"] == 0 < slow["virtual_seconds"]
    assert (slow["dropped"], slow["late"]) == (0, 0)


def test_a_run_reports_time_and_who_was_left_out_and_sums_them_up(tmp_path):
    phones = {"dropout": 0.2, "over_selection": 0.6, "deadline": 40.0, "seconds_per_example": 1.0, "devices": PHONES}
    table = job(tmp_path / "out", rounds=12, faults=phones)
    with opened(table) as session:
        expected = [session.turnout(round) for round in range(12)]
    summary, rounds = mpifl.run(table), of_each_round(tmp_path / "out")
    sizes = np.asarray(SIZES)
    for record, turn in zip(rounds, expected, strict=True):
        told = (record["cohort"], record["dropped"], record["late"], record["virtual_seconds"])
        assert told == (8, turn.dropped, turn.late, turn.seconds)
        assert record["clients"] == np.count_nonzero(sizes[turn.ids]) <= 5
        assert record["examples"] == sizes[turn.ids].sum()  # nobody else has trained
        assert record["virtual_seconds"] <= 40
    for name in ("dropped", "late", "virtual_seconds"):
        assert summary[name] == pytest.approx(sum(record[name] for record in rounds)) != 0
    said = (tmp_path / "out" / "log.txt").read_text()
    assert re.search(rf"^virtual time +{summary['virtual_seconds']:.1f} s$", said, re.M)
    assert re.search(rf"^dropped, late +{summary['dropped']}, {summary['late']} clients$", said, re.M)


def test_a_round_of_nobody_is_reported_and_changes_nothing(tmp_path):
    faults = {"dropout": 1.0, "deadline": 7.0, "seconds_per_example": 1.0}
    gone = [
        mpifl.run(job(tmp_path / str(rounds), rounds=rounds, faults=faults, algorithm=ALGORITHMS[1]))
        for rounds in (1, 3)
    ]
    assert gone[0]["digest"] == gone[1]["digest"]
    assert (gone[1]["virtual_seconds"], gone[1]["steps"], gone[1]["dropped"]) == (21.0, 0, gone[1]["dropped"])
    assert (tmp_path / "3" / "log.txt").read_text().count("no client counted") == 3


def rounds_of(session, rounds, algorithm=None):
    """Run rounds as `mpifl.train` does; returns the last state, the cohorts, and (round, ids) of every ask."""
    algorithm = algorithm or session.parts.algorithm
    fleet = Fleet(Alone(), session.host, session.job.faults.tolerate, lambda line: None, algorithm.works)
    state, cohorts, asks = algorithm.init(session.theta.clone()), [], []
    ask = fleet.ask

    def noted(work, ids, *rest):
        asks.append((fleet.round, ids.tolist()))
        return ask(work, ids, *rest)

    fleet.ask = noted
    for round in range(rounds):
        cohort = session.begin(round, fleet)
        new = algorithm.round(state, cohort)
        if cohort.latest.count:
            state, fleet.accepted = new, round
        cohorts.append(cohort)
    session.host.settle(rounds, fleet.accepted)
    return state, cohorts, asks


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_scaffolds_control_stays_the_mean_of_its_clients_controls(tmp_path, weighting):
    """c = sum_i (w_i / W) c_i holds only if |S| / N is of those who counted, and no other has moved its c_i."""
    algorithm = {"name": "scaffold", "weighting": weighting, "client_lr": 0.05, "batches": {"size": 4}}
    with opened(job(tmp_path, algorithm=algorithm, faults=FAULTY)) as session:
        state, cohorts, _ = rounds_of(session, 8)
        weights = np.asarray(SIZES, float) if weighting == "examples" else np.sign(SIZES).astype(float)
        controls = session.host.memory.read(range(12))["control"].double()
    mean = (torch.from_numpy(weights / weights.sum())[:, None] * controls).sum(dim=0)
    torch.testing.assert_close(state["control"].double(), mean, rtol=0, atol=1e-5 * float(mean.abs().max()))
    assert len({cohort.latest.count for cohort in cohorts}) > 1
    for cohort in cohorts:
        assert cohort.fraction == np.count_nonzero(np.asarray(SIZES)[cohort.ids]) / 11


def test_all_asks_of_a_round_are_to_the_same_clients(tmp_path):
    with opened(job(tmp_path, algorithm={"name": "mime", "batches": {"size": 4}}, faults=FAULTY)) as session:
        _, cohorts, asks = rounds_of(session, 6)
    assert asks == [(c.round, c.ids.tolist()) for c in cohorts for _ in range(2)]


@pytest.mark.parametrize("seed", range(4))
def test_clients_that_do_not_count_are_not_even_read(tmp_path, seed):
    data = {"path": "test_faults:noted_dataset", "cache_mb": 0}
    with opened(job(tmp_path, seed=seed, rounds=1, data=data, faults=FAULTY)) as session:
        turn = session.turnout(0)
        NOTED.clear()
        rounds_of(session, 1)
    assert turn.dropped + turn.late > 0
    assert set(turn.ids.tolist()) == NOTED


NOTED = set()


class Noting(MemoryDataset):
    def client(self, split, index):
        NOTED.add(index)
        return super().client(split, index)


def noted_dataset():
    plain = awkward_dataset()
    return Noting([plain.client("train", i) for i in range(12)], plain.rows("test", 0, 9), plain.features)


# --- failing clients -------------------------------------------------------------------------------------

FAILING = (1, 5, 8)


class Broken(MemoryDataset):
    """Clients 1, 5 and 8 cannot be read."""

    def client(self, split, index):
        if split == "train" and index in FAILING:
            raise ValueError(f"no picture of {index}\nin this folder")
        return super().client(split, index)


def broken_dataset():
    plain = awkward_dataset()
    return Broken([plain.client("train", i) for i in range(12)], plain.rows("test", 0, 1030), plain.features)


def dataset_without_them():
    plain = awkward_dataset()
    rows = [plain.client("train", i) for i in range(12)]
    left = [{name: c[:0] for name, c in client.items()} if i in FAILING else client for i, client in enumerate(rows)]
    return MemoryDataset(left, plain.rows("test", 0, 1030), plain.features)


def unreliable(model, batches: Batching = Batching(size=4)):  # noqa: B008
    """SCAFFOLD in which client 4 raises in rounds 1 and 2 (from 0), and client 9 gives NaN in round 2."""
    plain = scaffold(model, batches, weighting="examples")
    train = plain.works[0]

    def finish(shared, client, carry):
        upload = train.finish(shared, client, carry)
        round = float(shared["round"])
        if int(client.id) == 4 and round in (1, 2):
            raise RuntimeError("planted failure")
        if int(client.id) == 9 and round == 2:
            upload = upload._replace(weight=upload.weight * math.nan)
        return upload

    work = train._replace(finish=finish)

    def one_round(state, cohort):
        mean = cohort.mean(work, theta=state["theta"], control=state["control"], lr=0.1, round=float(cohort.round))
        control = state["control"] + cohort.weight_fraction * mean["control_change"]
        return {"theta": state["theta"] - mean["pseudo_grad"], "control": control}

    return plain._replace(works=(work,), round=one_round)


@pytest.mark.parametrize(
    "engine", [{}, {"name": "batched", "clients_at_once": 3}, {"name": "batched", "clients_at_once": 12}]
)
def test_clients_that_fail_are_like_clients_without_examples_to_the_last_bit(tmp_path, engine):
    digests = {}
    for name in ("broken_dataset", "dataset_without_them"):
        data, out = {"path": f"test_faults:{name}"}, tmp_path / name
        model = {"name": "mlp", "hidden": [9]}
        table = job(out, cohort=0, rounds=3, data=data, model=model, engine=engine, faults={"tolerate": 3})
        summary = mpifl.run(table)
        digests[name] = summary["digest"]
        assert summary["excluded"] == (9 if name == "broken_dataset" else 0)
    assert len(set(digests.values())) == 1
    said = (tmp_path / "broken_dataset" / "log.txt").read_text()
    for round in (1, 2, 3):
        line = rf"round {round}: client 1 raised ValueError: no picture of 1 (test_faults.py, line "
        assert line in said and "; left out, and 2 more\n" in said
    assert said.count("raised") == 3


def test_one_more_than_tolerated_ends_the_job_naming_client_round_and_reason(tmp_path):
    data = {"path": "test_faults:broken_dataset"}
    with pytest.raises(UserError) as raised:
        mpifl.run(job(tmp_path / "out", cohort=0, data=data, faults={"tolerate": 2}))
    line = str(raised.value)
    assert line.startswith("round 1: client 1 raised ValueError: no picture of 1 (test_faults.py, line ")
    assert line.endswith("or raise faults.tolerate: it is 2, and 3 of this round's clients failed")
    assert "\n" not in line and raised.value.in_training


@pytest.mark.parametrize("engine", [{}, {"name": "batched", "clients_at_once": 3}])
def test_without_tolerance_what_was_raised_comes_through_where_it_happened(tmp_path, engine):
    data, model = {"path": "test_faults:broken_dataset"}, {"name": "mlp", "hidden": [9]}
    with opened(job(tmp_path, cohort=0, data=data, model=model, engine=engine)) as session:
        with pytest.raises(ValueError, match="no picture of"):
            rounds_of(session, 1)
        clock = session.host.clock
        assert clock.phase == "load" and clock.client in FAILING


def test_the_clock_stays_where_a_client_failed_and_nowhere_else(tmp_path):
    data, engine = {"path": "test_faults:broken_dataset"}, {"name": "batched", "clients_at_once": 3}
    with opened(job(tmp_path, data=data, model={"name": "mlp", "hidden": [9]}, engine=engine)) as session:
        host, (work,) = session.host, session.parts.algorithm.works
        shared, ids = {"theta": session.theta, "lr": torch.tensor(0.1)}, np.array([0, 1, 2, 4, 11])
        host.wire(0, shared, {})
        for engine, order in ((host.serial, ids), (host.batched, ids[host.clients.longest_first(work.batches, ids)])):
            failed = []
            for visited in engine.visits(work, shared, order, {}):
                assert host.clock.phase == ("load" if visited.error else "start")
                if visited.error:
                    failed.append((*visited.ids, host.clock.client))
                    host.clock.enter("start")
            assert failed == [(1, 1)]


def test_tolerance_is_per_round_and_all_that_failed_keep_their_memory(tmp_path):
    table = job(tmp_path, cohort=0, algorithm={"name": "test_faults:unreliable"}, faults={"tolerate": 2})
    with opened(table) as session:
        _, cohorts, _ = rounds_of(session, 4)
        visits = [session.host.memory.visits(id) for id in range(12)]
        assert session.host.clock.phase == "start"
    assert [cohort.latest.count for cohort in cohorts] == [11, 10, 9, 11]
    assert visits == [4, 4, 4, 0, 2, 4, 4, 4, 4, 3, 4, 4]
    with pytest.raises(
        UserError, match=r"round 3: client 4 raised RuntimeError: planted.*it is 1, and 2 of this round"
    ):
        mpifl.run(table | {"faults": {"tolerate": 1}})


def two_asks(model):
    """The first ask fails for client 4; the second counts who is asked."""
    nothing = lambda shared, client: {}  # noqa: E731

    def finish(shared, client, carry):
        if int(client.id) == 4:
            raise RuntimeError("planted failure")
        return Upload({"one": torch.ones(())}, torch.ones(()))

    step = lambda shared, client, carry, batch: carry  # noqa: E731
    first = ClientWork(nothing, step, finish, Batching(size=4))
    own = lambda shared, client, carry: Upload({"given": client.given["id"] - client.id}, torch.ones(()))  # noqa: E731
    second = ClientWork(nothing, step, own, Batching(size=4))

    def one_round(state, cohort):
        cohort.sum(first)
        state["seen"].append(cohort.sum(second, given={"id": torch.from_numpy(cohort.ids)}))
        return state

    return Algorithm(
        lambda theta: {"theta": theta, "seen": []},
        one_round,
        (first, second),
        lambda state: {"model": state["theta"]},
    )


def test_who_failed_in_one_ask_is_not_asked_again_in_the_round(tmp_path):
    table = job(tmp_path, cohort=0, algorithm={"name": "test_faults:two_asks"}, faults={"tolerate": 1})
    with opened(table) as session:
        state, *_ = rounds_of(session, 3)
    assert [(sums.count, float(sums.update["given"])) for sums in state["seen"]] == [(10, 0.0)] * 3


@pytest.mark.parametrize(
    "error",
    [
        UserError("a shard is damaged"),
        MemoryError(),
        OSError(28, "No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_the_clients_fault_is_not_tolerated(error):
    assert of_the_machine(error)
    assert not any(map(of_the_machine, (RuntimeError("shapes differ"), ValueError(), KeyError("cluster"))))

    class Raising(MemoryDataset):
        def client(self, split, index):
            raise error

    plain = awkward_dataset()
    dataset = Raising([plain.client("train", i) for i in range(2)], features=plain.features)
    work = ClientWork(lambda *of: {}, lambda *of: of[2], lambda *of: Upload({}, torch.ones(())), Batching(size=4))
    for engine in (Engine(), Engine("batched", clients_at_once=2)):
        host = Host((work,), dataset, ClientMemory({}), 0, Clock(), engine=engine, tolerant=True)
        with pytest.raises((type(error), UserError)):  # the latter after blocks were halved to no avail
            Fleet(Alone(), host, 10).ask(work, np.arange(2), None, {})


def test_scores_are_not_tolerated_to_fail():
    def finish(shared, client, carry):
        if int(client.id) == 1:
            raise RuntimeError("planted failure")
        return Upload({}, torch.ones(()))

    of_clients, of_blocks = (
        ClientWork(lambda *of: {}, lambda *of: of[2], finish, Batching(size=4, of=of)) for of in ("client", "block")
    )
    host = Host((of_clients, of_blocks), awkward_dataset(), ClientMemory({}), 0, Clock(), tolerant=True)
    fleet = Fleet(Alone(), host, 10, lambda line: None)
    assert fleet.ask(of_clients, np.arange(12), None, {}).count == 10
    with pytest.raises(RuntimeError, match="planted"):
        fleet.ask(of_blocks, np.arange(12), None, {})
    fleet.begin(1)
    with pytest.raises(RuntimeError, match="planted"):
        fleet.rows(of_clients, np.arange(12), {})


def test_failures_fill_no_log(tmp_path):
    data = {"path": "test_faults:broken_dataset"}
    run = {"out": str(tmp_path / "out"), "eval_every": 100}
    summary = mpifl.run(job("", rounds=MOST_TOLD + 5, cohort=0, data=data, faults={"tolerate": 3}, run=run))
    said = (tmp_path / "out" / "log.txt").read_text()
    assert said.count("raised") == MOST_TOLD and said.count("from here on such clients are only counted") == 1
    assert summary["excluded"] == 3 * (MOST_TOLD + 5)


# --- on any number of ranks ------------------------------------------------------------------------------


def told(out):
    """What must be equal beside bits: who was left out, time, and what was said about it."""
    names = ("cohort", "dropped", "late", "virtual_seconds", "excluded")
    said = re.findall(r"^round \d+: .* left out.*$", (out / "log.txt").read_text(), re.M)
    return [{name: record[name] for name in names} for record in of_each_round(out)], said


@pytest.mark.parametrize(
    "ranks, reduce",
    [
        pytest.param(n, how, marks=pytest.mark.mpi(ranks=n, timeout=90))
        for n in (1, 3, 5)
        for how in ("auto", "sharded")
    ],
)
def test_same_bits_whoever_drops_out_is_late_or_fails(ranks, reduce, tmp_path):
    def table(out, **comm):
        faults = FAULTY | {"dropout": 0.1, "deadline": 60.0, "tolerate": 2}
        algorithm = {"name": "test_faults:unreliable"}
        # With this seed clients 4 and 9 are there in the rounds in which they fail.
        return job(tmp_path / out, seed=10, rounds=5, cohort=9, algorithm=algorithm, faults=faults, comm=comm)

    summary = mpifl.run(table("world", reduce=reduce))
    if summary is None:
        return  # a host: rank 0 compares
    assert summary["ranks"] == ranks
    mpifl.run(table("alone"), comm=Alone())
    assert results(tmp_path / "world") == results(tmp_path / "alone")
    assert told(tmp_path / "world") == told(tmp_path / "alone")
    first, second = told(tmp_path / "world")[1]
    assert first.startswith("round 2: client 4 raised RuntimeError: planted failure (test_faults.py, line ")
    assert second.startswith("round 3: client 4 raised ") and second.endswith("; left out, and 1 more")
    assert all(summary[name] > 0 for name in ("dropped", "late", "virtual_seconds")) and summary["excluded"] == 3


@pytest.mark.launches
def test_a_world_with_one_failure_too_many_ends_in_one_line(launch, tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(to_toml(job(tmp_path / "out", data={"path": "test_faults:broken_dataset"}, faults={"tolerate": 2})))
    done = launch(3, "-m", "mpifl.train", path, "cohort=0", env={"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"})
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if "mpifl" in line]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert said[0].startswith("mpifl: round 1: client 1 raised ValueError: no picture of 1 (")
    assert "faults.tolerate: it is 2, and 3 of this round's clients failed" in said[0]
