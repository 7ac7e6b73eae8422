"""Rounds written elsewhere too: the same numbers in order, by rank 0 alone, and never at training's expense."""

import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest

import mpifl
from mpifl import train, writers
from mpifl.comm import Alone
from mpifl.config import UserError, load
from mpifl.writers import numbers

ROOT = Path(__file__).parents[1]
ROUNDS, EVAL_EVERY = 4, 2
JOB = {
    "rounds": ROUNDS,
    "cohort": 5,
    "model": {"name": "logistic"},
    "algorithm": {"name": "fedavg", "client_opt": {"name": "sgd", "lr": 0.1}},
}


class Notes:
    """A writer that keeps what it is given; `told` is shared by all of a class."""

    told: list

    def __init__(self):
        self.told.append(("made",))

    def open(self, folder, job):
        self.told.append(("open", folder, job.rounds))

    def round(self, record):
        self.told.append(("round", json.loads(json.dumps(record))))

    def close(self, summary):
        self.told.append(("close", summary))


class Breaks(Notes):
    """Fails at the second round."""

    def round(self, record):
        super().round(record)
        if record["round"] == 2:
            raise OSError("the network is gone\nand more of it")


@pytest.fixture
def told(monkeypatch):
    """What two writers are told, {name: [...]}; the second one breaks."""
    kinds = {"tensorboard": type("Keeps", (Notes,), {"told": []}), "mlflow": type("Breaks", (Breaks,), {"told": []})}
    monkeypatch.setattr(writers, "WRITERS", kinds)
    return {name: kind.told for name, kind in kinds.items()}


def job(out, *names, **keys):
    return JOB | {"run": {"out": str(out), "eval_every": EVAL_EVERY, "writers": list(names)}} | keys


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.mpi(ranks=3, timeout=60)
def test_rank_0_alone_tells_a_writer_what_metrics_has_and_the_summary(tmp_path, told):
    out = tmp_path / "out"
    summary = mpifl.run(job(out, "tensorboard"))
    if summary is None:  # this is another rank
        assert told == {"tensorboard": [], "mlflow": []}
        return
    assert told["tensorboard"] == [
        ("made",),
        ("open", out, ROUNDS),
        *(("round", record) for record in lines(out)),
        ("close", json.loads((out / "summary.json").read_text())),
    ]


def test_a_writer_that_fails_is_left_out_and_nothing_else_is(tmp_path, told, capsys):
    out = tmp_path / "out"
    mpifl.run(job(out, "mlflow", "tensorboard", "mlflow"), comm=Alone(), quiet=False)
    assert [what[0] for what in told["mlflow"]] == ["made", "open", "round", "round"]
    assert [what[0] for what in told["tensorboard"]] == ["made", "open", *["round"] * ROUNDS, "close"]
    [said] = [line for line in capsys.readouterr().out.splitlines() if "mlflow" in line]
    assert "the network is gone" in said and "more of it" not in said
    assert (out / "summary.json").exists()


def test_a_run_that_breaks_off_is_closed_without_a_summary(tmp_path, told):
    diverging = {"name": "fedavg", "client_opt": {"name": "sgd", "lr": 1e38}}
    with pytest.raises(UserError, match="NaN or infinite"):
        mpifl.run(job(tmp_path / "out", "tensorboard", algorithm=diverging), comm=Alone())
    assert told["tensorboard"][1][0] == "open" and told["tensorboard"][-1] == ("close", None)


def test_a_writer_that_cannot_start_ends_the_run_with_its_reason(tmp_path, told, monkeypatch):
    def no_key(self, folder, job):
        raise ValueError("No API key.")

    monkeypatch.setattr(writers.WRITERS["tensorboard"], "open", no_key)
    with pytest.raises(UserError, match=r"tensorboard cannot start: No API key$"):
        mpifl.run(job(tmp_path / "out", "tensorboard"), comm=Alone())


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_package_is_refused_before_anything_is_written(name, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ["rounds=1", "baselines=false", f'run.writers=["{name}"]', f"run.out={tmp_path / 'out'}"]
    assert train.main(arguments) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert f'pip install "mpifl[{name}]"' in said and not list(tmp_path.iterdir())


def test_no_other_writer_is_known():
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        load(JOB | {"run": {"writers": ["tensorbord"]}})


def test_numbers_of_a_record_have_one_name_each():
    record = {
        "round": 7,
        "loss": None,
        "clients": 3,
        "seconds": {"wait": 0.5, "total": 1.0},
        "scores": {"accuracy": 0.25, "loss/cluster0": 1.5, "confusion": [[1.0, 0.0], [0.0, 1.0]]},
    }
    expected = {"clients": 3.0, "seconds/wait": 0.5, "seconds/total": 1.0}
    assert numbers(record) == expected | {"scores/accuracy": 0.25, "scores/loss/cluster0": 1.5}


# ---- the real ones: what their own readers find is what metrics.jsonl has


def needs(*modules):
    missing = [module for module in modules if not importlib.util.find_spec(module)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@pytest.fixture
def trained(launch, tmp_path):
    """Train half of the rounds, lose the last of these, and go on to the end, in two starts: the run folder."""

    def trained(name, **env):
        out = tmp_path / "out"
        code = "import json, sys, mpifl; mpifl.run(json.loads(sys.argv[1]), sys.argv[2:])"
        for rounds in (ROUNDS // 2, ROUNDS):
            arguments = json.dumps(job(out, name)), "run.save_every=1", "run.eval_every=1", f"rounds={rounds}"
            done = launch(None, "-c", code, *arguments, env={"PYTHONPATH": str(ROOT), **env}, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            shutil.rmtree(out / "checkpoints" / f"round-{rounds:08d}")
        return out

    return trained


def read(launch, code, *arguments, **env):
    """What a program of its own prints as JSON: these packages warn, which a test of ours may not."""
    done = launch(None, "-c", code, *arguments, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def expected(out):
    """Round and test accuracy of all rounds."""
    found = [[record["round"], record["scores"]["accuracy"]] for record in lines(out)]
    assert len(found) == ROUNDS and len({accuracy for _, accuracy in found}) > 1
    return found


@needs("tensorboard")
def test_tensorboard_reads_the_curves_back(trained, launch):
    code = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
print(json.dumps([[event.step, event.value] for event in found.Scalars("scores/accuracy")]))
"""
    out = trained("tensorboard")
    found = read(launch, code, out / "tensorboard")
    assert found == [[round, pytest.approx(value, rel=1e-6)] for round, value in expected(out)]


@needs("mlflow")
def test_mlflow_reads_the_curves_of_one_run_back(trained, launch):
    code = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
[run] = client.search_runs([client.get_experiment_by_name("job").experiment_id])
history = client.get_metric_history(run.info.run_id, "scores/accuracy")
curve = sorted({(one.step, one.value) for one in history})  # a round that was done again is there twice, the same
print(json.dumps([curve, run.info.status, run.data.tags["digest"]]))
"""
    out = trained("mlflow")
    uri, allow = (out / "mlflow").as_uri(), {"MLFLOW_ALLOW_FILE_STORE": "true"}
    digest = json.loads((out / "summary.json").read_text())["digest"]
    assert read(launch, code, uri, **allow) == [expected(out), "FINISHED", digest]


@needs("wandb")
def test_wandb_offline_has_the_curves(trained):
    from wandb.proto.wandb_internal_pb2 import Record

    out = trained("wandb", WANDB_MODE="offline")
    found = []
    for file in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        for content in logged(file.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                if "scores/accuracy" in items:
                    found.append([int(items["round"]), float(items["scores/accuracy"])])
    first = ROUNDS // 2
    assert found[:first] + found[first + 1 :] == expected(out) and found[first] == found[first - 1]  # done again


def logged(data):
    """Records of a file in LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB, parts of checksum (4),
    length (2), kind (1: whole, 2: first, 3: middle, 4: last)."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
