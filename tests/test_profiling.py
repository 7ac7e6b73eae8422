"""Profiles: traces open in viewers and miss nothing, and the verdict names the host and the reason that was planted."""

import json
from pathlib import Path

import numpy as np
import pytest

import mpifl
from mpifl import profiling
from mpifl.comm import Alone
from mpifl.profiling import Balance, Times, Trace, merge, phase_table, rank_file, verdict

MICROSECOND = 1e-6
JOB = {
    "rounds": 4,
    "cohort": 6,
    "data": {"path": "parts:awkward_dataset"},
    "model": {"name": "parts:net_with_dropout"},
    "algorithm": {"name": "fedavg", "batches": {"size": 4}},
}


def slices(path):
    """Slices of a trace, as viewers read it: a JSON array of events, of which "X" have a begin and a duration."""
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


# --- traces ----------------------------------------------------------------------------------------------


def test_a_trace_is_in_the_format_that_viewers_open(tmp_path):
    trace = Trace(tmp_path / "one.json", 5, 'a "node"', limit=10)
    trace.add("wait", "wait", 1e9, 1e9 + 0.25, -1, -1)
    trace.add("train", "evaluate", 1e9 + 0.25, 1e9 + 0.5, 2, -1)
    trace.close()
    events = json.loads((tmp_path / "one.json").read_text())
    assert {event["pid"] for event in events} == {5}
    [name] = [event for event in events if event["name"] == "process_name"]
    assert name["ph"] == "M" and name["args"] == {"name": 'rank 5 on a "node"'}
    first, second = slices(tmp_path / "one.json")
    assert first == {"name": "wait", "cat": "wait", "ph": "X", "pid": 5, "tid": 0} | {
        "ts": 1e15,
        "dur": 250_000,
        "args": {},
    }
    assert second["ts"] == first["ts"] + first["dur"]
    assert (second["name"], second["cat"], second["args"]) == ("train", "evaluate", {"round": 3})


def test_a_slice_belongs_to_a_client_that_was_at_work_from_its_begin_to_its_end(tmp_path):
    trace = Trace(tmp_path / "one.json", 0, "node", limit=10)
    for second, client in enumerate([-1, 8, 8, 8, 9, -1]):  # who is at work when the slice ends
        trace.add("load", "load", second, second + 1, 0, client)
    trace.close()
    assert [event["args"].get("client") for event in slices(tmp_path / "one.json")] == [None, None, 8, 8, None, None]


def test_a_trace_leaves_out_what_is_too_short_and_ends_at_its_limit(tmp_path):
    trace = Trace(tmp_path / "one.json", 0, "node", limit=3)
    for round in range(4):
        trace.add("train", "train", round, round + 0.5, round, -1)
        trace.add("sum", "sum", round + 0.5, round + 0.5 + profiling.SHORTEST / 2, round, -1)
    trace.close()
    assert [(event["name"], event["args"]["round"]) for event in slices(tmp_path / "one.json")] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
    ]
    assert trace.ended == 3
    size = (tmp_path / "one.json").stat().st_size
    assert size < 3 * 200 + 300


def test_of_a_rank_that_is_killed_all_rounds_but_the_last_can_be_read(tmp_path):
    trace = Trace(tmp_path / "one.json", 0, "node", limit=100)
    for round in range(3):
        for step in range(5):
            trace.add("train", "train", round + step / 10, round + (step + 1) / 10, round, -1)
    left = json.loads((tmp_path / "one.json").read_text() + "]")
    assert len([event for event in left if event["ph"] == "X"]) >= 10
    trace.close()


def test_the_joined_trace_has_all_ranks_events_in_order(tmp_path):
    for rank in range(3):
        trace = Trace(rank_file(tmp_path, rank), rank, f"node-{rank}", limit=10)
        for second in range(rank):
            trace.add("train", "train", second, second + 1, 0, -1)
        trace.close()
    merge(tmp_path, 3)
    each = [json.loads(rank_file(tmp_path, rank).read_text()) for rank in range(3)]
    assert json.loads((tmp_path / "trace.json").read_text()) == [event for events in each for event in events]


# --- who is slow, and why --------------------------------------------------------------------------------


def rows(**changes):
    """An ask's rows of a server and four hosts that are alike, with changes {figure: {rank: value}}."""
    even = {"load": 0.1, "train": 2.0, "sum": 0.2, "steps": 100.0}
    table = {name: np.array([0.0, *[value] * 4]) for name, value in even.items()}
    for name, values in changes.items():
        for rank, value in values.items():
            table[name][rank] = value
    return table | {"busy": table["load"] + table["train"] + table["sum"]}


def balance_of(*asks):
    balance = Balance(5)
    for ask in asks:
        balance.add(ask)
    return balance


def times(ranks, **seconds):
    return [Times(rank, "node", {"start": 1.0, **seconds}, None) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        ({"train": {3: 4.0}, "steps": {3: 200.0}}, "more steps (200, mean 125)"),
        ({"train": {3: 4.0}}, "slower steps (40 ms, mean 25)"),
        ({"load": {3: 2.0}}, "loading data"),
        ({"sum": {3: 2.0}}, "summing"),
    ],
)
def test_the_slowest_host_and_the_reason_are_those_that_were_planted(planted, reason):
    balance = balance_of(rows(**planted))
    assert balance.slowest == 3
    reasons = balance.reasons(3)
    assert max(reasons, key=reasons.get) == reason
    [(_, said), _] = verdict(times(5, wait=1.0, train=2.0), balance)
    assert said.startswith("rank 3, busy ") and f"s by {reason}" in said
    assert sum(f"s by {other}" in said for other in reasons) == 1


def test_reasons_add_up_to_all_that_a_host_was_busy_beyond_the_mean():
    random = np.random.RandomState(0)
    asks = [
        rows(**{name: dict(enumerate(random.rand(5))) for name in ("load", "train", "sum", "steps")}) for _ in "abc"
    ]
    balance = balance_of(*asks)
    busy = sum(ask["busy"] for ask in asks)
    for rank in range(1, 5):
        assert sum(balance.reasons(rank).values()) == pytest.approx(busy[rank] - busy[1:].mean())
    assert balance.slowest == 1 + busy[1:].argmax()
    each = np.array([ask["busy"][1:] for ask in asks])
    assert balance.waited == pytest.approx((each.max(axis=1) - each.mean(axis=1)).sum())
    assert balance.busiest.tolist() == np.bincount(1 + each.argmax(axis=1), minlength=5).tolist()


def test_hosts_that_take_turns_in_being_slow_are_even_but_wait_for_each_other():
    balance = balance_of(*(rows(train={rank: 4.0}) for rank in range(1, 5)))
    (_, said), (_, shares) = verdict(times(5, wait=8.0, train=10.0, load=0.4, sum=0.8, evaluate=0.8), balance)
    assert said.startswith("hosts are even: ") and said.endswith("busiest in 1 of 4 asks")
    assert shares == (  # of 20 seconds after the start; in each of 4 asks the busiest has 1.5 s more than the mean
        "load 2 %, train 50 %, sum 4 %, evaluate 4 %, wait for the busiest 30 %, wait for the server, and network 10 %"
    )


def test_a_node_is_named_when_there_are_several_and_nothing_is_said_of_one_process():
    balance = balance_of(rows(train={2: 4.0}))
    ranks = [Times(rank, f"node-{rank // 3}", {"wait": 1.0}, None) for rank in range(5)]
    assert verdict(ranks, balance)[0][1].startswith("rank 2 on node-0, busy")
    assert verdict(times(1), Balance(1)) == []


def test_the_table_has_all_seconds_and_the_busiest_host_first():
    balance = balance_of(rows(train={3: 4.0, 2: 3.0}, steps={4: 50.0}))
    ranks = [
        Times(rank, "node", {"wait": 2.0, "train": 10.0 - rank, "write": 0.004, "load": 0.5}, None) for rank in range(5)
    ]
    head, *lines = [line.split() for line in phase_table(ranks, balance)]
    assert head == ["rank", "train", "wait", "load", "rest", "total", "steps", "ms/step"]
    assert [line[0] for line in lines] == ["0", "3", "2", "1", "4"]
    for line in lines:
        assert sum(map(float, line[1:5])) == pytest.approx(float(line[5]), abs=0.021)
    assert lines[1] == ["3", "7.00", "2.00", "0.50", "0.00", "9.50", "100", "40.000"]
    assert lines[-1][6:] == ["50", "40.000"] and len(lines[0]) == 6


# --- whole runs ------------------------------------------------------------------------------------------


def seconds_of(table, rank):
    """{column: cell} of a rank's line in phases.txt."""
    head, *lines = [line.split() for line in table.read_text().splitlines() if ":" not in line]
    [cells] = [line for line in lines if line[0] == str(rank)]
    return dict(zip(head, cells))


def test_one_process_is_traced_without_a_gap_and_trains_the_same(tmp_path):
    plain = mpifl.run(JOB | {"run": {"out": str(tmp_path / "plain")}}, comm=Alone())
    summary = mpifl.run(JOB | {"run": {"out": str(tmp_path / "out"), "profile": True}}, comm=Alone())
    assert summary["digest"] == plain["digest"]
    assert not (tmp_path / "plain" / "profile").exists()
    found = slices(tmp_path / "out" / "profile" / "trace.json")
    ends = [event["ts"] + event["dur"] for event in found]
    gaps = np.array([event["ts"] for event in found[1:]]) - np.array(ends[:-1])
    assert gaps.min() > -1  # microseconds; what lies between two slices was left out as too short
    total = float(seconds_of(tmp_path / "out" / "profile" / "phases.txt", 0)["total"])
    assert (ends[-1] - found[0]["ts"]) * MICROSECOND == pytest.approx(total, abs=0.01)
    trained = [event["args"] for event in found if (event["name"], event["cat"]) == ("train", "train")]
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {args["round"] for args in trained} == {1, 2, 3, 4}
    clients = {(args["round"], args["client"]) for args in trained}
    assert len(clients) == sum(record["clients"] for record in records)
    assert {event["cat"] for event in found if event["name"] == "train"} == {"train", "evaluate"}
    assert "traces" in (tmp_path / "out" / "log.txt").read_text()


def test_a_trace_that_ended_early_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "SLICES", 40)
    mpifl.run(JOB | {"run": {"out": str(tmp_path / "out"), "profile": True}}, comm=Alone())
    assert len(slices(tmp_path / "out" / "profile" / "trace.json")) == 40
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "traces end" in log and "at 40 slices a rank" in log


@pytest.mark.mpi(ranks=3, timeout=60)
def test_three_ranks_are_traced_on_one_time_base_and_hosts_alone_are_compared(tmp_path):
    job = JOB | {"run": {"profile": True, "out": str(tmp_path / "out")}, "baselines": True, "baseline_epochs": 2}
    summary = mpifl.run(job)
    if summary is None:
        return
    folder = Path(summary["out"]) / "profile"
    found = [slices(folder / f"rank-{rank:05d}.json") for rank in range(3)]
    assert len(slices(folder / "trace.json")) == sum(map(len, found)) and all(found)
    assert [{event["pid"] for event in events} for events in found] == [{0}, {1}, {2}]
    train = [event for event in found[0] if event["name"] == "wait"]
    begin, end = train[0]["ts"], train[-1]["ts"] + train[-1]["dur"]
    for events in found[1:]:  # hosts train while the server waits for them
        assert all(begin - 1e5 < event["ts"] < end + 1e5 for event in events if event["name"] == "train")
    table = [seconds_of(folder / "phases.txt", rank) for rank in range(3)]
    assert "steps" not in table[0]
    assert int(table[1]["steps"]) + int(table[2]["steps"]) == summary["steps"]
    accounts = {event["cat"] for events in found[1:] for event in events if event["name"] == "train"}
    assert accounts == {"train", "evaluate", "baselines"}
    log = (Path(summary["out"]) / "log.txt").read_text()
    for line in (folder / "phases.txt").read_text().splitlines():
        assert line.replace("slowest host: ", "").replace("hosts' time: ", "") in log
    assert "slowest host" in log and "hosts' time" in log
