"""What a run leaves behind: complete, consistent, readable without this package, and the same again when repeated."""

import json
import shutil
import statistics
import tomllib
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import mpifl
from mpifl import evaluate, results, train
from mpifl.config import UserError, load

ROUNDS, EVAL_EVERY = 3, 2
OVERRIDES = [f"rounds={ROUNDS}", "cohort=0", f"run.eval_every={EVAL_EVERY}", "baseline_epochs=2"]
DIGITS = Path(mpifl.__file__).parent / "data" / "digits"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of the digits job, all clients in every round: (folder, what `mpifl.run` returned)."""
    out = tmp_path_factory.mktemp("results") / "out"
    return out, mpifl.run(train.DEFAULT_JOB, [*OVERRIDES, f"run.out={out}"])


@pytest.fixture(scope="module")
def rounds(done):
    return [json.loads(line) for line in (done[0] / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def split():
    """Rows of a split as a plain program would read them: split(name) -> x float32, y, offsets of clients."""

    def split(name):
        with h5py.File(DIGITS / "index.h5", locking=False) as index:
            feature = json.loads(index["features"][()])["x"]
        [path] = DIGITS.glob(f"{name}-*.h5")
        with h5py.File(path, locking=False) as shard:
            x, y, offsets = shard["x"][:], shard["y"][:], shard["offsets"][:]
        x = (torch.from_numpy(x).float() - feature["mean"]) / feature["std"]
        return x, torch.from_numpy(y.astype(np.int64)), offsets

    return split


@pytest.fixture(scope="module")
def plain(done):
    """The trained model in a module made without this package."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    net.load_state_dict(load_file(done[0] / "model.safetensors"), strict=True)
    return net.requires_grad_(False)


# --- the folder ------------------------------------------------------------------------------------------


def test_the_folder_holds_what_a_finished_run_leaves(done):
    names = {str(path.relative_to(done[0])) for path in done[0].rglob("*")}
    files = {"config.toml", "metrics.jsonl", "summary.json", "log.txt", "model.safetensors"}
    assert names == files | {"status", "status/rank-00000", "status/stacks-00000.txt", "lock", "lock/00000001"}


def test_whoever_may_read_new_files_may_read_the_results(done, tmp_path):
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in done[0].glob("*.*")} == {(tmp_path / "new").stat().st_mode}


def test_its_configuration_gives_the_same_job(done):
    assert load(done[0] / "config.toml") == load(train.DEFAULT_JOB, [*OVERRIDES, f"run.out={done[0]}"])


def test_every_round_is_there_with_what_was_done_in_it(rounds, split):
    sizes = np.diff(split("train")[2])
    steps = 2 * int(np.ceil(sizes / 5).sum())  # two epochs in batches of five
    assert [r["round"] for r in rounds] == list(range(1, ROUNDS + 1))
    for r in rounds:
        assert (r["clients"], r["cohort"], r["examples"], r["steps"]) == (100, 100, sizes.sum(), steps)
        assert 0 < r["loss"] < 3 and r["imbalance"] == 1.0
        assert r["bytes_down"] == r["bytes_up"] == r["excluded"] == 0
    assert rounds[-1]["loss"] < rounds[0]["loss"]
    assert ["scores" in r for r in rounds] == [False, True, True]  # every second round, and the last
    assert set(rounds[-1]["scores"]) == {"test_loss", "accuracy"}


def test_seconds_by_phase_add_up_to_the_round(rounds):
    for r in rounds:
        total = r["seconds"].pop("total")
        assert 0.95 * total <= sum(r["seconds"].values()) <= 1.001 * total
        assert {"train", "load", "sum", "server"} <= set(r["seconds"]) and min(r["seconds"].values()) >= 0
        assert r["host_seconds"]["train"] == pytest.approx(r["seconds"]["train"], rel=0.05)


def test_the_summary_is_what_run_returns_and_adds_the_rounds_up(done, rounds):
    folder, summary = done
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {"digest", "rounds", "seconds", "accuracy", "loss", "ranks", "bytes_down", "bytes_up"} <= set(summary)
    assert {"imbalance", "versions", "hardware"} <= set(summary)
    assert (summary["job"], summary["rounds"], summary["ranks"], summary["seed"]) == ("digits", ROUNDS, 1, 0)
    for name in ("examples", "steps", "bytes_down", "bytes_up", "excluded", "repeated_asks"):
        assert summary[name] == sum(r[name] for r in rounds)
    assert summary["training_loss"] == rounds[-1]["loss"]
    assert (summary["loss"], summary["accuracy"]) == (
        rounds[-1]["scores"]["test_loss"],
        rounds[-1]["scores"]["accuracy"],
    )
    assert 0.95 <= sum(summary["phases"].values()) <= 1.001
    assert summary["versions"]["torch"] == torch.__version__ and summary["hardware"]
    assert len(summary["digest"]) == 64 and summary["memory_digest"] == ""
    assert Path(summary["out"]) == folder


def test_the_log_is_what_was_said(done):
    log = (done[0] / "log.txt").read_text()
    assert done[1]["digest"] in log and log.count("round 2/3") == log.count("round 3/3") == 1 and "round 1/3" not in log


def test_the_model_loads_without_this_package_and_scores_as_the_summary_says(done, plain, split):
    x, y, _ = split("test")
    scores = plain(x)
    assert done[1]["accuracy"] == (scores.argmax(1) == y).sum().item() / len(y)
    assert done[1]["loss"] == pytest.approx(F.cross_entropy(scores.double(), y).item(), rel=1e-5)


def test_a_run_that_fails_leaves_no_summary(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="NaN or infinite"):
        mpifl.run(train.DEFAULT_JOB, [*OVERRIDES, f"run.out={out}", "algorithm.client_opt.lr=1e38"])
    assert (out / "config.toml").exists() and not (out / "summary.json").exists()


@pytest.mark.parametrize("line", ['{"round": 2}', '{"round": 2, "seconds": 3}', "[]", "half"])
def test_records_end_where_one_cannot_be_added_up(done, tmp_path, line):
    whole = (done[0] / "metrics.jsonl").read_text().splitlines()
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([whole[0], line, *whole[2:]]))
    assert results._records(path) == [json.loads(whole[0])]


def test_a_folder_in_use_is_refused_and_an_empty_one_is_used(done, tmp_path):
    before = {path: path.read_bytes() for path in done[0].rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="which already exists"):
        mpifl.run(train.DEFAULT_JOB, [*OVERRIDES, f"run.out={done[0]}", "run.resume=never"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="which already exists"):
        mpifl.run(train.DEFAULT_JOB, [*OVERRIDES, f"run.out={tmp_path / 'other'}"])
    assert {path: path.read_bytes() for path in done[0].rglob("*") if path.is_file()} == before
    (tmp_path / "out").mkdir()
    summary = mpifl.run(train.DEFAULT_JOB, ["rounds=1", "cohort=1", "baselines=false", f"run.out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "summary.json").exists() and summary["baselines"] == {}


def test_files_of_the_dataset_are_closed_after_a_run_and_after_an_evaluation(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(DIGITS, data)
    mpifl.run(train.DEFAULT_JOB, ["rounds=1", "cohort=1", "baselines=false", f"data.path={data}", f"run.out={out}"])
    for path in data.iterdir():
        h5py.File(path, "r+").close()
    assert evaluate.main([str(out), "--json"]) == 0
    for path in data.iterdir():
        h5py.File(path, "r+").close()


# --- the same again --------------------------------------------------------------------------------------


def test_a_table_the_command_line_and_a_job_file_give_the_same_bits(done, tmp_path):
    table = tomllib.loads(train.DEFAULT_JOB.read_text()) | {"rounds": ROUNDS, "cohort": 0, "baselines": False}
    of_table = mpifl.run(table | {"run": {"out": str(tmp_path / "table"), "eval_every": ROUNDS}})
    assert train.main([*OVERRIDES, "baselines=false", f"run.out={tmp_path / 'line'}", "--quiet"]) == 0
    of_line = json.loads((tmp_path / "line" / "summary.json").read_text())
    assert of_table["digest"] == of_line["digest"] == done[1]["digest"]
    assert of_table["accuracy"] == of_line["accuracy"] == done[1]["accuracy"]
    assert of_table["loss"] == of_line["loss"] == done[1]["loss"]


def test_several_seeds_have_a_folder_each_and_a_mean_and_deviation(done, tmp_path):
    short = ["rounds=1", "baseline_epochs=1", "seeds=2", "seed=4"]
    both = mpifl.run(train.DEFAULT_JOB, [*short, f"run.out={tmp_path / 'both'}"])
    assert json.loads((tmp_path / "both" / "summary.json").read_text()) == both
    each = [json.loads((tmp_path / "both" / f"seed-{seed}" / "summary.json").read_text()) for seed in (4, 5)]
    assert both["seeds"] == each and [s["seed"] for s in each] == [4, 5]
    assert each[0]["digest"] != each[1]["digest"]
    for name, of in {"accuracy": lambda s: s["accuracy"], "test_loss": lambda s: s["loss"]}.items():
        values = [of(summary) for summary in each]
        assert both["scores"][name]["mean"] == pytest.approx(statistics.mean(values))
        assert both["scores"][name]["deviation"] == pytest.approx(statistics.stdev(values))
    alone = mpifl.run(train.DEFAULT_JOB, ["rounds=1", "baselines=false", "seed=5", f"run.out={tmp_path / 'alone'}"])
    assert alone["digest"] == each[1]["digest"]


# --- baselines and evaluation ----------------------------------------------------------------------------


def test_baselines_are_in_the_summary_and_change_nothing_else(done):
    baselines = done[1]["baselines"]
    assert set(baselines) == {"centralized", "mean client alone"}
    assert 0 < baselines["mean client alone"] < baselines["centralized"] <= 1


def test_evaluation_gives_the_summarys_figures_exactly_and_those_of_single_clients(done, plain, split, capsys):
    assert evaluate.main([str(done[0]), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["model"]
    assert (scored["accuracy"], scored["loss"]) == (done[1]["accuracy"], done[1]["loss"])
    x, y, offsets = split("train")  # the test rows belong to nobody
    right = (plain(x).argmax(1) == y).double().numpy()
    clients = np.array([right[start:stop].mean() for start, stop in pairwise(offsets) if stop > start])
    assert scored["accuracy, mean of clients"] == pytest.approx(clients.mean(), abs=1e-12)
    recorded = json.loads((done[0] / "evaluation.json").read_text())["model"]
    assert recorded["scores"] == scored and recorded["clients"]["accuracy"] == pytest.approx(clients.tolist())
    assert scored["accuracy, worst decile of clients"] == pytest.approx(np.sort(clients)[: len(clients) // 10].mean())


def test_evaluation_changes_nothing_in_the_folder_and_prints_tables(done, capsys):
    before = {path: path.read_bytes() for path in done[0].rglob("*") if path.is_file()}
    assert evaluate.main([str(done[0])]) == 0
    out = capsys.readouterr().out
    assert "model: scores are of split 'test'; those of clients, of 100 clients' own 'train' rows\n" in out
    assert f"{done[1]['accuracy']:.4f}" in out
    assert {path: path.read_bytes() for path in done[0].rglob("*") if path.is_file()} == before
