"""Whole jobs in one process, at the edges where a run must stop, go on, or leave somebody as it was."""

import math
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from parts import awkward_dataset

import mpifl
from mpifl.comm import Alone
from mpifl.config import UserError, load
from mpifl.data.shard import Dataset, Feature
from mpifl.data.writer import ShardWriter
from mpifl.engine.clock import Clock
from mpifl.fleet import Fleet
from mpifl.scoring import Scorer
from mpifl.session import Session


def job(tmp_path, **changes):
    return {
        "rounds": 3,
        "data": {"path": "parts:awkward_dataset"},
        "model": {"name": "parts:net_with_dropout"},
        "algorithm": {"name": "fedavg", "batches": {"size": 4}},
        "run": {"out": str(tmp_path / "out")},
    } | changes


def test_nobody_who_can_train_is_refused_before_training(tmp_path):
    table = job(tmp_path, algorithm={"name": "scaffold", "batches": {"size": 100, "drop_last": True}})
    with pytest.raises(UserError, match="none of the dataset's 12 clients has a batch"):
        mpifl.run(table)


@pytest.mark.parametrize("split", ["test", "more"])
def test_clients_are_not_sent_to_a_split_that_is_not_theirs(tmp_path, split):
    plain = awkward_dataset()
    with ShardWriter(tmp_path / "data", plain.features) as writer:
        writer.write("train", ((plain.client_id("train", i), plain.client("train", i)) for i in range(12)))
        writer.write("more", [("another", plain.client("train", 0))])
        writer.central("test", plain.rows("test", 0, 5))
    algorithm = {"name": "fedavg", "batches": {"size": 4, "split": split}}
    with pytest.raises(UserError, match=f"split '{split}' does not have the clients of split 'train'"):
        mpifl.run(job(tmp_path, data={"path": str(tmp_path / "data")}, algorithm=algorithm))


@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_population_counts_clients_with_a_batch_and_the_examples_they_use_however_many_are_looked_at(
    tmp_path, monkeypatch, at_once
):
    monkeypatch.setattr("mpifl.session._AT_ONCE", at_once)
    batches = {"size": 4, "drop_last": True, "max_examples": 7}
    session = Session.open(load(job(tmp_path, algorithm={"name": "fedavg", "batches": batches})), Alone(), Clock())
    able = [n for n in session.parts.dataset.sizes("train").tolist() if n >= 4]
    assert 0 < len(able) < session.parts.dataset.clients and max(able) > 7
    assert session.population == (len(able), sum(min(n, 7) for n in able))
    session.close()


def test_round_without_a_batch_is_reported_and_changes_nothing(tmp_path):
    table = job(tmp_path, cohort=1, rounds=40, algorithm={"name": "fedavg", "batches": {"size": 13, "drop_last": True}})
    summary = mpifl.run(table)
    said = (tmp_path / "out" / "log.txt").read_text()
    assert 0 < said.count("no client counted") < 40
    assert summary["steps"] == 40 - said.count("no client counted")


def test_excluded_client_keeps_its_memory_though_an_earlier_ask_of_the_round_staged_it(tmp_path):
    session = Session.open(load(job(tmp_path, algorithm={"name": "parts:two_asks"})), Alone(), Clock())
    algorithm, host = session.parts.algorithm, session.host
    fleet = Fleet(Alone(), host, 1, say=lambda text: None)
    for round in range(3):
        fleet.begin(round)
        algorithm.round({"theta": session.theta}, session.cohort(round, fleet))
        fleet.accepted = round
    host.settle(3, 2)
    assert fleet.read_traffic().excluded == 1  # client 5, in round 2
    assert [host.memory.visits(client) for client in (3, 4, 5)] == [0, 3, 2]
    assert host.memory.read([4, 5])["rounds"].tolist() == [3.0, 2.0]


def test_scaffold_survives_a_schedule_that_ends_at_zero(tmp_path):
    algorithm = {"name": "scaffold", "client_lr": {"name": "cosine", "value": 0.1, "rounds": 3}, "batches": {"size": 4}}
    assert math.isfinite(mpifl.run(job(tmp_path, algorithm=algorithm))["loss"])


def test_upload_named_by_the_data_is_refused_with_both_names(tmp_path):
    with pytest.raises(ValueError, match=r"holds .*other.*pseudo_grad"):
        mpifl.run(job(tmp_path, algorithm={"name": "parts:fickle_upload"}))


def test_wide_unsigned_labels_train(tmp_path):
    assert mpifl.run(job(tmp_path, data={"path": "parts:token_dataset"}))["accuracy"] > 0.2


def test_test_split_without_a_row_is_none_at_all(tmp_path):
    """Its loss and accuracy would be printed as 0."""
    plain, scores = awkward_dataset(), {}
    for name, rows_of_test in (("without", None), ("empty", 0), ("some", 4)):
        with ShardWriter(tmp_path / name, plain.features) as writer:
            writer.write("train", ((plain.client_id("train", i), plain.client("train", i)) for i in range(12)))
            if rows_of_test is not None:
                held = plain.rows("test", 0, rows_of_test)
                writer.write("test", [("0", held), ("3", plain.client("train", 3))])  # client 3 has no row
        data, run = {"path": str(tmp_path / name)}, {"out": str(tmp_path / f"{name} out")}
        scores[name] = mpifl.run(job(tmp_path, data=data, run=run))["scores"]
    assert scores["without"] == scores["empty"] != scores["some"]


def test_fewer_rows_are_scored_in_many_small_blocks_that_follow_from_the_seed(tmp_path):
    def blocks(rows, seed=0):
        table = job(tmp_path, data={"path": "parts:long_test_split"}, seed=seed, run={"eval_rows": rows})
        session = Session.open(load(table), Alone(), Clock())
        session.close()
        return session.scorer.central.batches.size, session.scorer.blocks.tolist()

    assert blocks(0) == blocks(10**6) == (512, [0, 1, 2, 3, 4])  # the last one has 100 rows
    for rows, (size, count) in {1: (1, 1), 40: (1, 40), 512: (8, 64), 530: (8, 67)}.items():
        found, chosen = blocks(rows)
        assert (found, len(set(chosen))) == (size, count) and max(chosen) < -(-2148 // size)
    assert blocks(513) == blocks(513)
    assert len({tuple(blocks(513, seed)[1]) for seed in range(8)}) > 1


def test_few_rows_stand_for_a_split_in_the_order_of_its_classes(tmp_path):
    labels = np.repeat(np.arange(10), 600)
    with ShardWriter(tmp_path / "data", {"y": Feature("uint8", (), classes=10)}) as writer:
        writer.write("train", [("a", {"y": labels[:1].astype(np.uint8)})])
        writer.central("test", {"y": labels.astype(np.uint8)})
    with closing(Dataset(tmp_path / "data")) as dataset:
        algorithm = SimpleNamespace(personal=None)
        scorer = Scorer.of(algorithm, None, {}, dataset, rows=640)
    size = scorer.central.batches.size
    drawn = np.concatenate([labels[block * size : (block + 1) * size] for block in scorer.blocks])
    assert len(drawn) == 640 and np.bincount(drawn, minlength=10).min() > 0


def test_blocks_that_are_left_out_are_not_scored(tmp_path):
    runs = [{"out": str(tmp_path / str(rows)), "eval_rows": rows} for rows in (0, 512)]
    table = job(tmp_path, data={"path": "parts:long_test_split"}, rounds=1)
    whole, part = (mpifl.run(table | {"run": run}) for run in runs)
    assert whole["digest"] == part["digest"] and whole["loss"] != part["loss"]
