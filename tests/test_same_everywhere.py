"""The law of the same bits: the result does not depend on how many ranks ran, nor on who hosted whom."""

import json
from pathlib import Path

import pytest

import mpifl
from mpifl.comm import Alone

ALGORITHMS = {
    "fedavg": {"client_opt": {"name": "adam", "lr": 0.01}, "server_opt": {"name": "fedadam", "lr": 0.05}},
    "fedprox": {"name": "fedavg", "mu": 0.1, "client_opt": {"name": "momentum", "lr": 0.05}},
    "scaffold": {"weighting": "examples", "client_lr": 0.05},
    "mime": {"base_opt": {"name": "momentum", "lr": 0.05}, "gradient_size": 4},
    "hypcluster": {"clusters": 3, "client_opt": {"name": "sgd", "lr": 0.1, "clip_norm": 1.0}},
}
RANKS = [pytest.param(n, marks=pytest.mark.mpi(ranks=n, timeout=90), id=f"{n} ranks") for n in (1, 2, 3, 5, 9)]

FEW = [ranks for ranks in RANKS if ranks.values[0] in (1, 3, 5)]


def job(algorithm, out, /, **changes):
    return {
        "seed": 3,
        "rounds": 3,
        "cohort": 7,
        "data": {"path": "parts:awkward_dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": algorithm, "batches": {"size": 4, "epochs": 2}} | ALGORITHMS[algorithm],
        "engine": {"check": True},
        "run": {"out": str(out)},
    } | changes


def misbehaving(**options):
    return {"cohort": 0, "algorithm": {"name": "parts:misbehaving", "client": 5} | options}


def results(out: Path):
    """What must be equal: digests, and every loss and score of every round."""
    summary = json.loads((out / "summary.json").read_text())
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    counted = ("round", "loss", "scores", "clients", "examples", "steps", "repeated_asks")
    return {
        "digest": summary["digest"],
        "memory": summary["memory_digest"],
        "rounds": [{name: record[name] for name in counted} for record in rounds],
    }


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_same_bits_as_in_one_process(algorithm, ranks, tmp_path):
    summary = mpifl.run(job(algorithm, tmp_path / "world"))
    if summary is None:
        return  # a host: rank 0 compares
    assert summary["ranks"] == ranks
    mpifl.run(job(algorithm, tmp_path / "alone"), comm=Alone())
    world, alone = results(tmp_path / "world"), results(tmp_path / "alone")
    assert world == alone
    assert (world["memory"] != "") == (algorithm == "scaffold")
    assert len({record["loss"] for record in world["rounds"]}) == 3


def test_seed_changes_the_bits_and_repetition_does_not(tmp_path):
    digests = [
        mpifl.run(job("fedavg", tmp_path / str(number), seed=seed))["digest"] for number, seed in enumerate((3, 3, 4))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.mpi(ranks=3, timeout=90)
def test_bytes_up_do_not_depend_on_the_cohort(tmp_path):
    sizes = {}
    for cohort in (10, 100):
        changes = {"cohort": cohort, "rounds": 2, "data": {"path": "parts:many_clients"}}
        summary = mpifl.run(job("fedavg", tmp_path / str(cohort), **changes))
        sizes[cohort] = summary and summary["bytes_up"]
    assert sizes[10] == sizes[100]


@pytest.mark.mpi(ranks=5, timeout=90)
def test_float32_sums_halve_the_uplink_and_say_that_the_law_is_off(tmp_path):
    wide = {"model": {"name": "parts:net_with_dropout", "hidden": 500}}
    exact = mpifl.run(job("fedavg", tmp_path / "exact", **wide))
    rough = mpifl.run(job("fedavg", tmp_path / "rough", comm={"sum": "float32"}, **wide))
    if rough is None:
        return
    assert (exact["same_bits"], rough["same_bits"]) == (True, False)
    assert "depend on the number of ranks" in (tmp_path / "rough" / "log.txt").read_text()
    assert rough["loss"] == pytest.approx(exact["loss"], rel=1e-3)
    assert 0.5 < rough["bytes_up"] / exact["bytes_up"] < 0.6
    assert rough["examples"] == exact["examples"]


@pytest.mark.parametrize("ranks", FEW)
@pytest.mark.parametrize("how", ["nan", "inf"])
def test_planted_nonfinite_update_names_the_same_client_everywhere(how, ranks, tmp_path):
    changes = misbehaving(how=how) | {"faults": {"tolerate": 1}, "run": {"out": str(tmp_path / "world")}}
    summary = mpifl.run(job("fedavg", None, **changes))
    if summary is None:
        return
    assert summary["excluded"] == 1
    said = (tmp_path / "world" / "log.txt").read_text()
    assert "round 2: pseudo_grad of client 5 is NaN or infinite; left out\n" in said


@pytest.mark.parametrize("ranks", FEW)
def test_planted_overflow_names_the_same_client_and_is_asked_again_everywhere(ranks, tmp_path):
    summary = mpifl.run(job("fedavg", tmp_path / "world", **misbehaving(how="huge")))
    if summary is None:
        return
    said = (tmp_path / "world" / "log.txt").read_text()
    assert "round 2: pseudo_grad of client 5 is beyond the sum's grid" in said
    assert summary["repeated_asks"] >= 1
    mpifl.run(job("fedavg", tmp_path / "alone", **misbehaving(how="huge")), comm=Alone())
    assert results(tmp_path / "world") == results(tmp_path / "alone")
