"""Family scale: measured beside predicted, in a table and a picture."""

import csv
import json

import pytest

from mpifl.bench import datasets, rounds
from mpifl.bench.__main__ import main
from mpifl.bench.scale import imbalance, model_size
from mpifl.bench.training import job

MLP = {"name": "mlp", "hidden": [10]}


def few(path):
    return datasets.femnist(path, 12)


@pytest.mark.launches
def test_a_table_and_a_picture_of_what_was_measured_and_predicted(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(rounds.WORKLOADS, "dense", rounds.Workload(few, MLP, 4, 20))
    file, out = tmp_path / "scale.jsonl", tmp_path / "out"
    words = ["--ranks", "1", "3", "--cohort", "4", "--rounds", "3", "--repeats", "3", "--out", str(out)]
    assert main(["scale", *words, "--json", str(file)]) == 0
    cases = [json.loads(line) for line in file.read_text().splitlines()]
    named = [
        f"{way}, {ranks} ranks, cohort {c}"
        for way, ranks, c in [("strong", 1, 4), ("strong", 3, 4), ("weak", 1, 4), ("weak", 3, 8)]
    ]
    assert [case["case"] for case in cases] == named
    for case in cases:
        hosts = 2 if "3 ranks" in case["case"] else 1
        assert case["percent_efficiency"] == pytest.approx(100 * case["speedup"] / hosts)
        assert (case["s_exchange"] > 0) == (hosts > 1)
        assert case["s_predicted"] > case["s_exchange"]
    assert cases[1]["s_predicted"] - cases[1]["s_exchange"] < cases[0]["s_predicted"]
    rows = list(csv.DictReader((out / "scale.csv").read_text().splitlines()))
    assert [float(row["s_round"]) for row in rows] == [case["s_round"] for case in cases]
    assert (out / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert named[3] in capfd.readouterr().out


def test_paper_needs_no_ranks(capfd):
    assert main(["scale", "--paper"]) == 0
    assert "1,024 GPUs, 1,000,000,000 parameters" in capfd.readouterr().out


def test_one_host_is_even_and_as_many_as_clients_are_as_uneven_as_their_steps(tmp_path):
    list(few(tmp_path / "few"))
    table = job(tmp_path / "few", MLP, 12, 2, 20)
    assert imbalance(table, 1) == 1.0
    sizes = [max(1, -(-n // 20)) for n in sizes_of(tmp_path / "few")]
    assert imbalance(table, 12) == pytest.approx(max(sizes) / (sum(sizes) / 12))
    assert model_size(table) == 784 * 10 + 10 + 10 * 62 + 62


def sizes_of(path):
    from mpifl.data.shard import Dataset

    dataset = Dataset(path)
    try:
        return dataset.sizes("train").tolist()
    finally:
        dataset.close()
