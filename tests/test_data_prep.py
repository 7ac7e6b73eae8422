"""The digits that the package ships, and the command of all converters."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora_files import idx, write_mnist

from data_prep import conversion
from data_prep.__main__ import CONVERTERS, TOOLS, WHERE, _module, main
from data_prep.writing import write_piece
from mpifl.data.shard import Dataset, embedded

pytestmark = pytest.mark.usefixtures("no_picture")


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
        (["mnist", "--out", "{source}", "--source", "{source}"], "choose another path (of data_prep: --out)"),
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
    assert printed.splitlines()[2].startswith("python -m data_prep NAME --help") and printed.count("\n") < 120


@pytest.mark.parametrize("name", CONVERTERS)
def test_what_to_put_where_is_a_whole_sentence(name):
    said = WHERE.search(_module(name).__doc__)[1]
    assert said[-1] == "." and said.count("\n") < 8 and ("nothing" in said or "--source" in said)


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

    monkeypatch.undo()  # of no_picture
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    words = ["--source", str(source), "--clients", "2", "--per-label", "1", "--jobs", "1", "--out", str(tmp_path / "o")]
    assert main(["mnist", *words]) == 0
    printed = capsys.readouterr().out
    assert "train        2      0" in printed and "no picture: " in printed and "No space left" in printed
    assert main(["verify", str(tmp_path / "o")]) == 0


ONE_JOB = ("--clients", "2", "--per-label", "1", "--jobs", "1")


@pytest.mark.parametrize("moment", ["__main__.describe", "__main__.report", "report._draw"])
def test_interrupted_when_complete_says_so_and_how_to_draw(source, tmp_path, monkeypatch, capsys, moment):
    pytest.importorskip("matplotlib", reason="the extra prep has it")

    def ctrl_c(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"data_prep.{moment}", ctrl_c)
    out = tmp_path / "out"
    assert main(["mnist", "--source", str(source), *ONE_JOB, "--out", str(out)]) == 130
    said = f"mpifl: interrupted, but {out} is complete; python -m data_prep report {out} --png FILE draws it"
    assert capsys.readouterr().err == f"{said} (with matplotlib)\n"
    monkeypatch.undo()
    assert main(["verify", str(out)]) == 0 and not (out / "report.png").exists()


@pytest.fixture
def larger(tmp_path):
    """MNIST of 1,500 test images, 1.1 MiB: three blocks of a central split."""
    folder, random = tmp_path / "larger", np.random.RandomState(0)
    folder.mkdir()
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(random.randint(0, 256, (1500, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(random.randint(0, 10, 1500)))
    return ["mnist", "--source", str(folder), "--partition", "iid", "--clients", "30", "--jobs", "1"]


def digest(path):
    dataset = Dataset(path)
    found = dataset.digest, [[len(dataset.shards(split)) for split in ("train", "test")]]
    dataset.close()
    return found


def test_a_digest_depends_neither_on_shards_nor_on_pieces(larger, tmp_path, monkeypatch):
    for megabytes in (256, 1):
        assert main([*larger, "--shard-mb", str(megabytes), "--out", str(tmp_path / f"out{megabytes}")]) == 0
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)
    assert main([*larger, "--out", str(tmp_path / "fine")]) == 0
    (whole, one), (cut, two), (fine, many) = (digest(tmp_path / name) for name in ("out256", "out1", "fine"))
    assert whole == cut == fine
    assert (one, two, many) == ([[1, 1]], [[2, 2]], [[30, 3]])


def test_interrupted_after_a_shard_goes_on_from_it_unless_cut_otherwise(larger, tmp_path, monkeypatch, capsys):
    written = []

    def first_only(folder, split, piece, *rest):
        if piece:
            raise KeyboardInterrupt
        written.append(split)
        write_piece(folder, split, piece, *rest)

    assert main([*larger, "--out", str(tmp_path / "whole")]) == 0
    for piece_bytes, kept in ((conversion.PIECE_BYTES, True), (1, False)):
        out = tmp_path / f"out{piece_bytes}"
        again = [*larger, "--shard-mb", "1", "--out", str(out)]
        with monkeypatch.context() as patch:
            patch.setattr("data_prep.writing.write_piece", first_only)
            assert main(again) == 130
        assert f"goes on from what is in {out}.partial" in capsys.readouterr().err
        monkeypatch.setattr(conversion, "PIECE_BYTES", piece_bytes)
        assert main(again) == 0
        assert ("1 pieces of an interrupted conversion are kept" in capsys.readouterr().err) == kept
        assert digest(out)[0] == digest(tmp_path / "whole")[0]
    assert written == ["train", "train"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--hold-out", "0.5"], ""),
        (
            [],
            "there is no split test, so scores will be of the training data; --hold-out FRACTION or --test PATH makes",
        ),
        (["--test", "{tmp}/a.csv"], ""),
    ],
)
def test_who_has_no_test_split_is_told(tmp_path, capsys, words, says):
    (tmp_path / "a.csv").write_text("who,v\n" + "a,1\nb,2\n" * 4)
    command = ["table", "--source", str(tmp_path / "a.csv"), "--client-column", "who", "--jobs", "1"]
    assert main([*command, *(word.format(tmp=tmp_path) for word in words), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert says in printed and ("no test" in printed) == bool(says)


def test_the_command_itself_exits_with_the_status():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "data_prep", "digits", "--out", str(root)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "choose another path" in ended.stderr and "Traceback" not in ended.stderr
