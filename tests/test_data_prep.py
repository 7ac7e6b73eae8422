"""The digits that the package ships, and the command of all converters."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora_files import write_mnist

from data_prep.__main__ import CONVERTERS, TOOLS, main
from mpifl.data.shard import Dataset, embedded


def read(path):
    """Read every client of both splits: train columns per client, and all test rows."""
    dataset = Dataset(path)
    train = [dataset.client("train", index) for index in range(dataset.clients)]
    test = dataset.rows("test", 0, dataset.total("test"))
    assert dataset.central("test")
    dataset.close()
    return train, test


# ---- digits


def test_digits_are_made_again_as_they_are_shipped(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits' file (extra prep)")
    assert main(["digits", "--out", str(tmp_path / "digits")]) == 0
    made, shipped = Dataset(tmp_path / "digits"), Dataset(embedded("digits"))
    assert made.digest == shipped.digest
    made.close()
    shipped.close()


def test_shipped_digits_are_the_source_each_image_once():
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the digits' file (extra prep)")
    source = sklearn.load_digits()
    train, test = read(embedded("digits"))
    rows = [np.column_stack([c["x"].reshape(len(c["x"]), 64), c["y"]]) for c in [*train, test]]
    expected = np.column_stack([source.data, source.target])
    assert sorted(map(tuple, np.concatenate(rows).tolist())) == sorted(map(tuple, expected.tolist()))
    assert {len(columns["y"]) for columns in train} == {14, 15}
    shares = np.bincount(source.target) * 360 / 1797
    assert (np.abs(np.bincount(test["y"]) - shares) < 1).all()


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["digits", "--out", str(tmp_path / "d")]) == 2
    assert 'pip install -e ".[prep]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def source(tmp_path):
    return write_mnist(tmp_path / "source")


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["mnits"], "did you mean 'mnist'"),
        (["digits"], "required: --out"),
        (["digits", "--out", "{out}", "--clients", "3"], "unrecognized arguments: --clients 3"),
        (["mnist", "--out", "{out}"], "required: --source"),
        (["mnist", "--out", "{out}", "--source", "{source}", "--clients", "many"], "--clients: invalid int"),
        (["mnist", "--out", "{out}", "--source", "{source}", "--clients", "0"], "must be at least 1"),
        (["mnist", "--out", "{out}", "--source", "{source}", "--seed", "-1"], "--seed -1: it must be 0 to"),
        (
            ["mnist", "--out", "{out}", "--source", "{source}", "--per-label", "7"],
            "lower --clients or --per-label",
        ),
        (["mnist", "--out", "{out}", "--sour", "{source}"], "required: --source"),
        (["mnist", "--out", "{source}", "--source", "{source}"], "choose another --out"),
    ],
)
def test_mistakes_are_one_line_and_status_2(source, tmp_path, capsys, arguments, problem):
    filled = [word.format(out=tmp_path / "out", source=source) for word in arguments]
    try:
        status = main(filled)
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr().err
    assert status == 2 and problem in printed and printed.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_what_to_put_where(capsys, arguments):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (*CONVERTERS, *TOOLS, "train-images-idx3-ubyte.gz", "fed_emnist_train.h5", '".[prep]"'):
        assert text in printed


@pytest.mark.parametrize("name", [*CONVERTERS, *TOOLS])
def test_each_has_help_of_its_own(capsys, name):
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"python -m data_prep {name}" in printed
    if name in CONVERTERS and name not in ("digits", "leaf-synthetic"):
        assert "What to put where" in printed and "--jobs" in printed


def test_the_command_is_recorded_without_the_paths_of_a_machine(source, tmp_path):
    for number, words in enumerate((["--source", str(source)], [f"--source={source}"], ["--source", f"{source}/"])):
        out = tmp_path / f"out{number}"
        assert main(["mnist", *words, "--clients", "2", "--per-label", "1", "--jobs", "1", "--out", str(out)]) == 0
        dataset = Dataset(out)
        command = "python -m data_prep mnist --source source --clients 2 --per-label 1"
        assert dataset.provenance["command"] == command
        dataset.close()


def test_a_dataset_whose_picture_cannot_be_written_is_made_all_the_same(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the extra prep has it")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    words = ["--source", str(source), "--clients", "2", "--per-label", "1", "--jobs", "1", "--out", str(tmp_path / "o")]
    assert main(["mnist", *words]) == 0
    printed = capsys.readouterr().out
    assert "train        2      0" in printed and "no picture: " in printed and "No space left" in printed
    assert main(["verify", str(tmp_path / "o")]) == 0


def test_the_command_itself_exits_with_the_status():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "data_prep", "digits", "--out", str(root)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "choose another --out" in ended.stderr and "Traceback" not in ended.stderr
