"""Every job file trains, on a few made-up clients in the format of its data."""

import shlex
from pathlib import Path

import numpy as np
import pytest

import mpifl
from data_prep import __main__ as data_prep
from mpifl import Feature, ShardWriter
from mpifl.config import load

JOBS = {path.stem: path for path in (Path(__file__).parent.parent / "jobs").glob("*.toml")}
TOKENS = {
    name: {key: Feature(dtype, (length,), classes=classes, pad=0) for key in ("x", "y")}
    for name, dtype, length, classes in (("shakespeare", "uint8", 80, 90), ("stackoverflow", "uint16", 20, 10004))
}
FEATURES = TOKENS | {
    name: {"x": Feature("uint8", shape, mean=mean, std=std), "y": Feature("uint8", (), classes=classes)}
    for name, shape, mean, std, classes in (
        ("mnist_iid", (28, 28), 0.0, 255.0, 10),
        ("emnist", (28, 28), 0.0, 255.0, 62),
        ("cifar10", (3, 32, 32), (125.0, 123.0, 114.0), (62.0, 62.0, 66.0), 10),
        ("cifar100", (3, 32, 32), (129.0, 124.0, 112.0), (68.0, 65.0, 70.0), 100),
    )
}
for name in ("emnist", "stackoverflow"):  # as their converters write them
    FEATURES[name] = FEATURES[name] | {"domain_id": Feature("uint8", (), classes=2)}
ELSEWHERE = {"imdb_albert"}  # needs a checkpoint: tests/test_hf.py makes one
ON_DIGITS = {"slow_phones"}  # which come with the package


def rows(features, count, seed):
    random = np.random.RandomState(seed)
    return {
        name: random.randint(0, feature.classes or 256, (count, *feature.shape)).astype(feature.dtype)
        for name, feature in features.items()
    }


def test_every_job_is_tried_somewhere():
    assert set(JOBS) == set(FEATURES) | ELSEWHERE | ON_DIGITS


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_a_job_trains(tmp_path, name):
    features = FEATURES[name]
    with ShardWriter(tmp_path / "data", features) as writer:
        writer.write("train", [(f"client-{i}", rows(features, 3, i)) for i in range(3)])
        writer.central("test", rows(features, 5, 9))
    small = ["rounds=1", "cohort=2", "seeds=1", "baselines=false", f"data.path={tmp_path / 'data'}"]
    summary = mpifl.run(JOBS[name], [*small, f"run.out={tmp_path / 'out'}"])
    assert summary["rounds"] == 1 and all(np.isfinite(np.ravel(score)).all() for score in summary["scores"].values())


@pytest.mark.parametrize("name", sorted(ON_DIGITS))
def test_a_job_on_digits_trains_as_it_is(tmp_path, name):
    summary = mpifl.run(JOBS[name], ["rounds=2", f"run.out={tmp_path / 'out'}"])
    assert summary["rounds"] == 2 and summary["late"] > 0 and 0.1 < summary["accuracy"] < 1


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_job_begins_with_what_it_reproduces_and_says_how_its_data_are_made(name):
    text = JOBS[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and "xpected" in text.split("rounds =")[0]
    assert 'made_by = "python -m data_prep ' in text or name in ON_DIGITS


@pytest.mark.parametrize("name", sorted(set(JOBS) - ON_DIGITS))
def test_the_command_that_makes_a_jobs_data_lacks_nothing_but_its_source(name, tmp_path, monkeypatch, capsys):
    data = load(JOBS[name]).data
    words = shlex.split(data.made_by)
    if "hf" in words:
        pytest.importorskip("datasets", reason='needs the extra prep: pip install -e ".[prep]"')
    assert words[:3] == ["python", "-m", "data_prep"] and words[-2:] == ["--out", data.path]
    monkeypatch.chdir(tmp_path)
    assert data_prep.main(words[3:]) == 2
    assert words[words.index("--source") + 1] in capsys.readouterr().err and not any(tmp_path.iterdir())
