"""The plan is what happens: steps, clients and bytes exactly, memory within a quarter."""

import json
import re
from pathlib import Path

import pytest

from mpifl.comm import Alone
from mpifl.config import load, to_toml
from mpifl.engine.clock import Clock
from mpifl.messages import NOBODY
from mpifl.plan import PlanFleet, expected_data
from mpifl.session import Session

TESTS = Path(__file__).parent
ENV = {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}

ALGORITHMS = {
    "fedavg": {"name": "fedavg", "batches": {"size": 4, "epochs": 2}},
    "scaffold": {"name": "scaffold", "batches": {"size": 4}},
    "mime": {"name": "mime", "batches": {"size": 4}},
    "hypcluster": {"name": "hypcluster", "batches": {"size": 4}},
}


def planned(text):
    """{(round, quantity): number} and the promised MiB, as printed."""
    figures = {}
    for match in re.finditer(r"round (\d+): (\d+) clients, (\d+) steps, (\d+) bytes down, (\d+) bytes up", text):
        round, *numbers = map(int, match.groups())
        figures |= {(round, name): n for name, n in zip(("clients", "steps", "bytes_down", "bytes_up"), numbers)}
    memory = [float(size) for size in re.findall(r"([\d.]+) MiB", text)]
    return figures, memory


@pytest.mark.launches
@pytest.mark.parametrize("algorithm, ranks", [*((algorithm, 4) for algorithm in ALGORITHMS), ("mime", None)])
def test_plan_equals_what_the_run_counts(launch, tmp_path, algorithm, ranks):
    job = tmp_path / "job.toml"
    table = {
        "rounds": 2,
        "cohort": 7,
        "data": {"path": "parts:awkward_dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": ALGORITHMS[algorithm],
        "run": {"out": str(tmp_path / "out")},
    }
    job.write_text(to_toml(table))
    plan = launch(ranks, "-m", "mpifl.train", job, "--dry-run", env=ENV)
    assert (plan.returncode, plan.stderr) == (0, "")
    assert not (tmp_path / "out").exists()
    assert launch(ranks, "-m", "mpifl.train", job, env=ENV).returncode == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    figures, memory = planned(plan.stdout)
    counted = {(r["round"], name): r[name] for r in records for name in ("clients", "steps", "bytes_down", "bytes_up")}
    assert figures == counted
    resident = json.loads((tmp_path / "out" / "summary.json").read_text())["resident_bytes"]
    for expected, measured in zip(memory, resident):
        assert expected * 2**20 == pytest.approx(measured, rel=0.25)


@pytest.mark.launches
def test_planned_memory_holds_where_client_memory_dominates(launch, tmp_path):
    """100 clients that keep 4.3 MB each: two hosts hold half of them, and a round's new rows beside them."""
    job = tmp_path / "job.toml"
    table = {
        "rounds": 6,
        "cohort": 50,
        "model": {"name": "mlp", "hidden": [1000, 1000]},
        "algorithm": {"name": "scaffold", "batches": {"size": 10}},
        "run": {"out": str(tmp_path / "out"), "eval_every": 6},
    }
    job.write_text(to_toml(table))
    _, memory = planned(launch(3, "-m", "mpifl.train", job, "--dry-run", env=ENV).stdout)
    assert launch(3, "-m", "mpifl.train", job, "--quiet", env=ENV).returncode == 0
    resident = json.loads((tmp_path / "out" / "summary.json").read_text())["resident_bytes"]
    assert resident[1] > resident[0] + 250 * 2**20
    for expected, measured in zip([*memory, memory[1]], resident, strict=True):
        assert expected * 2**20 == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("rounds", [1, 5, 40])
@pytest.mark.parametrize("cohort", [12, 0])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_planned_data_is_what_hosts_get_to_hold_as_cohorts_change(tmp_path, algorithm, cohort, rounds):
    algorithm = {"name": algorithm, "batches": {"size": 4}}
    data, model = {"path": "parts:many_clients"}, {"name": "parts:net_with_dropout"}
    table = {"rounds": rounds, "cohort": cohort, "data": data, "model": model, "algorithm": algorithm}
    session = Session.open(load(table), Alone(), Clock())
    fleet = PlanFleet(session.host, 5, session.parts.algorithm.works)
    place, seen = fleet._place, {rank: set() for rank in range(1, 5)}

    def noted(work, ids):
        homes = place(work, ids)
        for id, rank in zip(ids.tolist(), homes.tolist()):
            seen[rank].add(id)
        return homes

    fleet._place = noted
    state = session.parts.algorithm.init(session.theta)
    for round in range(rounds):
        fleet.plan(session.parts.algorithm, state, session.cohort(round, fleet), NOBODY)
    source, test = session.host.source, session.scorer.central
    clients = sum(source.kept_bytes(5 * len(ids), len(ids)) for ids in seen.values()) / 4
    blocks = source.kept_bytes(1030, 3) / 4  # 512, 512 and 6 rows
    assert expected_data(fleet, test, rounds) == pytest.approx(clients + blocks, rel=0.1)
    session.close()
