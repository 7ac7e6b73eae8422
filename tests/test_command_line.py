"""The command line: a mistake is one line and status 2, with nothing printed, begun or written; the rest works."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import mpifl
from mpifl import evaluate, train
from mpifl.config import to_toml
from mpifl.data.shard import Feature, embedded
from mpifl.data.writer import ShardWriter

ROOT = Path(mpifl.__file__).parent.parent
TINY = ["rounds=1", "cohort=2", "baselines=false"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run in an empty folder, and leave the signal handler as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def contents():
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.fixture
def refusal(capsys):
    """Check all that holds of a refusal; returns its line."""

    def refusal(*arguments, main=train.main):
        before = contents()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("mpifl: ") and err.endswith("\n") and err.count("\n") == 1
        assert "Traceback" not in err
        assert contents() == before, "something was written"
        return err.removeprefix("mpifl: ").rstrip("\n")

    return refusal


@pytest.fixture
def job():
    """Write a job file with these sections changed; returns its path."""

    def job(**changes):
        table = {"rounds": 1, "cohort": 2, "model": {"name": "logistic"}, "algorithm": {"name": "fedavg"}} | changes
        Path("job.toml").write_text(to_toml(table))
        return "job.toml"

    return job


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("roundz=3", "there is no job key 'roundz'; did you mean 'rounds'?"),
        ("run.metric=[]", "there is no run option 'metric'; did you mean 'metrics'?"),
        (
            "algorithm.name=fedavgg",
            "there is no algorithm (or package.module:function) 'fedavgg'; did you mean 'fedavg'?",
        ),
        ("model.name=mpl", "there is no model (or package.module:function) 'mpl'; did you mean 'mlp'?"),
        ("algorithm.client_opt.name=sdg", "there is no optimizer for fedavg.client_opt 'sdg'; did you mean 'sgd'?"),
        ("algorithm.client_opt.lr.name=cosin", "override 'algorithm.client_opt.lr.name=cosin': lr is not a table"),
        (
            'run.metrics=["acuracy"]',
            "there is no metric (or package.module:function) 'acuracy'; did you mean 'accuracy'?",
        ),
        ("algorithm.batches.split=tset", "there is no split of the dataset 'tset'; did you mean 'test'?"),
        ("rounds=-1", "rounds is -1; it must be at least 1"),
        ("rounds=ten", "rounds is 'ten'; it must be an integer"),
        ("rounds", "no job file rounds"),
        ("=3", "'=3' is not an override; write key.path=value"),
        ("model.hidden=[-1]", "mlp hidden is [-1]; every layer must have at least 1 unit"),
        ("data.path=data/nowhere", "data.path is 'data/nowhere', and there is no such folder; make it with: "),
        ("data.path=nowhere:data", "dataset 'nowhere:data': no module 'nowhere' here"),
        ("model.name=torch:nothing", "there is no model in module torch 'nothing'"),
    ],
)
@pytest.mark.parametrize("how", [[], ["--dry-run"], ["seeds=3"]], ids=["run", "dry-run", "seeds"])
def test_a_wrong_job_is_refused_in_one_line_and_nothing_is_made(refusal, override, line, how):
    assert refusal(override, *how).startswith(line)


def test_a_wrong_job_file_is_refused_in_one_line_and_nothing_is_made(refusal, job):
    assert refusal("nothing.toml") == "no job file nothing.toml"
    Path("broken.toml").write_text("rounds = \n")
    assert refusal("broken.toml").startswith("broken.toml is not valid TOML: ")
    assert refusal("nothing.toml") == "no job file nothing.toml (there: broken.toml)"
    Path("headless.toml").write_text('[model]\nname = "mlp"\n[algorithm]\nname = "fedavg"\n')
    assert refusal("headless.toml").startswith("job needs rounds (options: ")
    assert refusal(job(model={})).startswith('[model] needs a name, e.g. name = "mlp"')
    assert refusal(job(), "model=5") == "model is 5; it must be a table"
    assert refusal(".").startswith("job file . cannot be read: ")


def test_a_value_with_a_line_break_is_refused_in_one_line(refusal):
    assert refusal("comm.reduce=a\nb").startswith("there is no comm.reduce 'a\\nb'")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.45 EiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.\nframe #0"),
    ],
)
def test_too_little_memory_is_told_in_one_line(refusal, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    with monkeypatch.context() as building:  # undoing all would also leave the test's own folder
        building.setattr("mpifl.session.build", fail)
        assert refusal(*TINY).startswith("not enough memory (")
    monkeypatch.setattr("mpifl.train.train", fail)
    assert train.main([*TINY, "run.out=out", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("mpifl: not enough memory (")


def test_a_full_disk_is_told_in_one_line(monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mpifl.train.train", fail)
    assert train.main([*TINY, "run.out=out", "--quiet"]) == 1
    assert capsys.readouterr().err == "mpifl: out cannot be used: No space left on device\n"


def test_what_is_no_word_of_the_command_line_is_refused(refusal, job):
    path = job()
    Path("other.toml").touch()
    assert refusal("--fast").startswith("unrecognized arguments: --fast; --help lists what there is")
    assert refusal(path, "--rounds", "3").startswith("unrecognized arguments: --rounds")
    assert refusal(path, "other.toml").startswith("'other.toml' is not an override; write key.path=value")
    assert refusal("rounds=3", path).startswith("'job.toml' is not an override; write key.path=value")


def test_a_model_with_changing_buffers_is_refused_with_what_to_use_instead(refusal, job):
    Path("own_nets.py").write_text(
        "from torch import nn\n"
        "def net(features):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))\n"
    )
    line = refusal(job(model={"name": "own_nets:net"}))
    assert "BatchNorm1d at '2'" in line and "use GroupNorm or LayerNorm" in line


@pytest.mark.parametrize("seeds", [1, 2])
def test_results_that_are_there_already_stay_as_they_are(refusal, seeds):
    Path("results/seed-1").mkdir(parents=True)
    Path("results/summary.json").write_text("precious")
    Path("file").write_text("precious")
    for out in ("results", "file"):
        line = refusal(*TINY, f"seeds={seeds}", f"run.out={out}")
        assert line == f"run.out is '{out}', which already exists; remove it or choose another run.out"
    assert "cannot be written" in refusal(*TINY, f"seeds={seeds}", "run.out=file/below")


def test_only_a_run_can_be_evaluated(refusal, job, capsys):
    assert refusal(main=evaluate.main).startswith("which run? python -m mpifl.evaluate RUN")
    assert refusal("nowhere", main=evaluate.main).startswith("nowhere is no run folder: it has no config.toml")
    assert refusal("a", "b", main=evaluate.main).startswith("unrecognized arguments: b")
    assert train.main([job(), "run.out=done", "--quiet"]) == 0
    model = Path("done/model.safetensors")
    tensors = load_file(model)
    save_file({"1.weight": tensors["1.weight"]}, model)
    assert refusal("done", main=evaluate.main).startswith(f"{model} has no parameter '1.bias'")
    save_file({"1.weight": tensors["1.weight"], "1.bias": tensors["1.bias"][:5].clone()}, model)
    assert refusal("done", main=evaluate.main) == f"{model} has 645 parameters, the job's model 650"
    model.write_bytes(b"not a model")
    assert refusal("done", main=evaluate.main).startswith(f"{model} cannot be read: ")
    model.unlink()
    assert refusal("done", main=evaluate.main).startswith("done holds no model (*.safetensors)")


# --- what works ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_help_and_version_end_with_status_0(main, capsys):
    for flag in ("--help", "-h"):
        assert main([flag]) == 0
        assert capsys.readouterr().out.startswith("usage: python -m mpifl.")
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"mpifl {mpifl.__version__}\n", "")
    assert contents() == {}


def test_help_names_every_flag(capsys):
    train.main(["--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("--dry-run", "--quiet", "--version", "--help", "key.path=value"))


def test_overrides_need_no_quotes_and_flags_may_stand_anywhere(job, capsys):
    arguments = [
        job(),
        "--quiet",
        "run.out=my results",
        "algorithm.client_opt.lr=1e-2",
        "algorithm.client_opt.name=sgd",
    ]
    assert train.main(arguments) == 0
    assert capsys.readouterr() == ("", "")
    written = Path("my results/config.toml").read_text()
    assert 'out = "my results"' in written and 'client_opt = {lr = 0.01, name = "sgd"}' in written


def test_without_a_job_digits_are_trained_into_a_folder_named_after_it(capsys):
    assert train.main(TINY) == 0
    out = capsys.readouterr().out
    [folder] = Path("runs").iterdir()
    assert folder.name.startswith("digits-") and str(folder) in out
    assert json.loads((folder / "summary.json").read_text())["digest"] in out
    assert (folder / "log.txt").read_text().splitlines()[0] == out.splitlines()[0]


def test_without_a_job_other_data_give_the_run_its_name(capsys):
    for given, name in ([], "copy"), (["name=mine"], "mine"):
        shutil.copytree(embedded("digits"), "data/copy", dirs_exist_ok=True)
        assert train.main([*TINY, "data.path=data/copy", *given]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: fedavg on 100 clients")
        assert len(list(Path("runs").glob(f"{name}-*"))) == 1


def test_a_run_without_test_data_says_whose_scores_it_prints(capsys):
    features = {"x": Feature("float32", (2,)), "y": Feature("uint8", (), classes=2)}
    with ShardWriter("data/all", features) as writer:
        writer.write("train", [("a", {"x": np.ones((9, 2), np.float32), "y": np.arange(9, dtype=np.uint8) % 2})])
    said = "there is no test split: test_loss and scores are of the training examples\n"
    for path, says in ("data/all", True), ("digits", False):
        assert train.main([*TINY, "cohort=0", f"data.path={path}"]) == 0
        assert (said in capsys.readouterr().out) == says


def test_a_dry_run_prints_the_plan_and_makes_nothing(capsys):
    assert train.main([*TINY, "--dry-run"]) == 0
    assert "round 1: 2 clients, " in capsys.readouterr().out
    assert contents() == {}


def test_evaluate_can_print_json(job, capsys):
    assert train.main([job(), "run.out=done", "--quiet"]) == 0
    assert evaluate.main(["done", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert {"loss", "accuracy", "accuracy, mean of clients", "accuracy, worst decile of clients"} <= set(
        scored["model"]
    )


# --- as a process ----------------------------------------------------------------------------------------


def process(*arguments):
    launched = ("PMI", "OMPI", "MPI", "HYDRA")
    own = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    environment = own | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_a_process_that_refuses_ends_with_status_2_and_one_line():
    done = process("mpifl.train", "roundz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mpifl: there is no job key 'roundz'") and done.stderr.count("\n") == 1
    assert contents() == {}


def test_a_process_whose_users_code_raises_shows_where(job):
    Path("own_broken.py").write_text("def net(features):\n    return features['no such column']\n")
    done = process("mpifl.train", job(model={"name": "own_broken:net"}))
    assert done.returncode == 1 and "own_broken.py" in done.stderr and "KeyError: 'no such column'" in done.stderr
    assert set(contents()) == {Path("job.toml"), Path("own_broken.py")}
