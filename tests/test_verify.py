"""`python -m data_prep verify` and `info`: each planted defect is named, and nothing else is."""

import os

import h5py
import numpy as np
import pytest
from shard_files import FEATURES, arrays, clients, flip, plant, replace_text

from data_prep.__main__ import main
from mpifl.data.shard import embedded

BORDERS = (0, 2, 6, 7)


def planted(tmp_path, held=None, features=FEATURES, alter=None):
    splits = {
        "train": (held or clients(), BORDERS, False),
        "test": ([("block-00000-000000", arrays(5))], (0, 1), True),
    }
    return plant(tmp_path / "d", splits, features, alter)


def verify(path, capsys):
    """Exit status, and the lines of problems or the one line that says that there are none."""
    status = main(["verify", str(path)])
    printed = capsys.readouterr()
    return status, (printed.err if status else printed.out).splitlines()


def test_healthy_dataset_is_as_it_was_written(tmp_path, capsys):
    status, [line] = verify(planted(tmp_path), capsys)
    assert status == 0 and line.startswith(f"{tmp_path / 'd'} is as it was written: 21 rows, 7 clients, digest ")
    assert verify(embedded("digits"), capsys)[0] == 0


def the_only_problem(path, capsys):
    status, lines = verify(path, capsys)
    assert status == 2  # like every error that a user can mend: by copying or converting again
    assert lines[0] == f"mpifl: {path} is damaged:"
    assert len(lines) == 2, lines
    return lines[1]


@pytest.mark.parametrize("column", ["t", "lengths/t", "x", "y"])
def test_checksum_of_one_client(tmp_path, capsys, column):
    path = planted(tmp_path)
    flip(path / "train-00001.h5", column, 0)
    line = the_only_problem(path, capsys)
    name = column.removeprefix("lengths/")
    assert f"train-00001.h5: column '{name}' of client 'c2' does not match its checksum" in line


def test_checksums_of_two_clients_are_two_problems(tmp_path, capsys):
    path = planted(tmp_path)
    flip(path / "train-00001.h5", "x", 0)
    flip(path / "train-00001.h5", "y", 9)
    status, lines = verify(path, capsys)
    assert status == 2 and ["'x' of client 'c2'" in lines[1], "'y' of client 'c5'" in lines[2]] == [True, True]
    assert len(lines) == 3


def only_in(number, change):
    def alter(split, shard, tables):
        if split == "train" and shard == number:
            change(tables)

    return alter


def test_reversed_offsets(tmp_path, capsys):
    def reverse(tables):
        tables["offsets"] = tables["offsets"][::-1].copy()

    line = the_only_problem(planted(tmp_path, alter=only_in(1, reverse)), capsys)
    assert "train-00001.h5: offsets must start at 0 and never decrease" in line


def test_size_that_only_the_index_has(tmp_path, capsys):
    path = planted(tmp_path)
    with h5py.File(path / "index.h5", "r+") as index:
        index["splits/train/sizes"][3] = 2
    assert "index.h5: its sizes of split 'train' are not those" in the_only_problem(path, capsys)


def test_rows_that_belong_to_another_client(tmp_path, capsys):
    # The shard alone, as a whole and with a digest of its own: only the index knows better.
    path = planted(tmp_path)
    with h5py.File(path / "train-00001.h5", "r+") as file:
        file["offsets"][1] = 2
    assert "train-00001.h5: offsets do not give the sizes" in the_only_problem(path, capsys)


@pytest.mark.parametrize(("value", "client"), [(np.nan, 2), (np.inf, 6)])
def test_number_that_is_not_finite(tmp_path, capsys, value, client):
    held = [(name, {**columns, "x": columns["x"].astype("f4")}) for name, columns in clients()]
    held[client][1]["x"][1, 0, 2] = value
    features = {**FEATURES, "x": {"dtype": "float32", "shape": [2, 3]}}
    line = the_only_problem(planted_floats(tmp_path, held, features), capsys)
    assert line == f"split 'train', client 'c{client}', column 'x': row 1 is not finite"


def planted_floats(tmp_path, held, features):
    return plant(tmp_path / "d", {"train": (held, BORDERS, False)}, features)


@pytest.mark.parametrize(
    ("column", "client", "row", "value", "labels"),
    [("y", 5, 3, 5, "0 to 4"), ("y", 0, 0, -1, "0 to 4"), ("t", 5, 2, 90, "0 to 89")],
)
def test_label_out_of_range(tmp_path, capsys, column, client, row, value, labels):
    held = clients()
    held[client][1][column][row] = value
    line = the_only_problem(planted(tmp_path, held), capsys)
    said = f"split 'train', client 'c{client}', column '{column}': row {row} holds {value}, labels must be {labels}"
    assert line == said


@pytest.mark.parametrize("twin", [1, 3, 6])  # in the same shard, in others
def test_client_id_that_is_there_twice(tmp_path, capsys, twin):
    held = clients()
    held[0] = (held[twin][0], held[0][1])
    line = the_only_problem(planted(tmp_path, held), capsys)
    assert line == f"split 'train': client id 'c{twin}' is there twice"


def test_digest_of_other_checksums(tmp_path, capsys):
    # A whole other shard with the same clients and sizes, which the index vouches for, but not the dataset's digest.
    path, other = planted(tmp_path), clients()
    (tmp_path / "other").mkdir()
    other[5][1]["x"][0] += 1
    replacement = planted(tmp_path / "other", other)
    shard = path / "train-00001.h5"
    shard.write_bytes((replacement / shard.name).read_bytes())
    entries = []
    with h5py.File(replacement / "index.h5", "r+") as index:
        replace_text(index["splits/train"], "shards", entries.extend)
    with h5py.File(path / "index.h5", "r+") as index:
        replace_text(index["splits/train"], "shards", lambda shards: shards.__setitem__(1, entries[1]))
    assert "checksums are not those that its digest was made of" in the_only_problem(path, capsys)


def test_shard_as_a_whole_is_one_problem_however_many_clients_it_has(tmp_path, capsys):
    def lose(tables):
        del tables["crc32/y"]

    assert "train-00001.h5: a table is missing" in the_only_problem(planted(tmp_path, alter=only_in(1, lose)), capsys)


def test_truncated_or_missing_shard_is_found_at_open(tmp_path, capsys):
    path = planted(tmp_path)
    size = (path / "train-00001.h5").stat().st_size
    os.truncate(path / "train-00001.h5", size - 1)
    status, [line] = verify(path, capsys)
    assert status == 2 and f"train-00001.h5: this shard is {size - 1} bytes" in line
    (path / "train-00001.h5").unlink()
    status, [line] = verify(path, capsys)
    assert status == 2 and "train-00001.h5: this shard is missing" in line


def test_only_the_first_problems_are_listed(tmp_path, capsys):
    held = [(f"c{i:02d}", arrays(1, seed=i)) for i in range(30)]
    path = plant(tmp_path / "d", {"train": (held, (0, 30), False)})
    for row in range(30):
        flip(path / "train-00000.h5", "x", row)
    status, lines = verify(path, capsys)
    assert status == 2 and len(lines) == 22 and lines[-1] == "... and 10 more"


# ---- info


def test_info_says_what_it_is_and_where_from(tmp_path, capsys):
    assert main(["info", str(planted(tmp_path))]) == 0
    printed = capsys.readouterr().out
    for text in (
        "source    planted",
        "column    t: uint8, 6, 90 classes, sequences of at most 6, padded with 0",
        "column    x: uint8, 2x3, mean 0, std 16",
        "column    y: int32, number, 5 classes",
        "split     test: 5 rows of no client (central); 1 shard of",
        "split     train: 7 clients with 16 rows (min 0, median 2, max 6); 3 shards of",
    ):
        assert text in printed


def test_info_names_means_per_channel(tmp_path, capsys):
    features = {"x": {"dtype": "uint8", "mean": [1.5, 2.0], "shape": [2, 3], "std": [1.0, 0.25]}, "y": FEATURES["y"]}
    held = [(name, {"x": c["x"], "y": c["y"]}) for name, c in clients()]
    assert main(["info", str(plant(tmp_path / "d", {"train": (held, BORDERS, False)}, features))]) == 0
    assert "column    x: uint8, 2x3, mean 1.5/2, std 1/0.25" in capsys.readouterr().out
