"""Benchmarks: the contestants do the same work, and table and JSON have the same rows. Never how fast."""

import fcntl
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mpifl
from mpifl.bench import __main__ as bench
from mpifl.bench import cases, data, datasets, exchange, messages, reading, rounds, step, training
from mpifl.comm import connect
from mpifl.config import UserError
from mpifl.data.shard import Dataset
from mpifl.data.writer import ShardWriter
from mpifl.models.cnn import EmnistConv
from mpifl.models.linear import mlp

STEP_CASES = [f"{net}, {extras}" for net in ("dense", "conv") for extras in ("bare", "mask", "key", "mask + key")]


# ---- what all families share


def test_contestants_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    ran, now = [], [0.0]
    costs = {"a": [100.0, 1.0, 5.0, 3.0], "b": [100.0, 8.0, 2.0, 4.0]}
    monkeypatch.setattr(cases.time, "process_time", lambda: now[0])

    def contestant(name):
        ran.append(name)
        now[0] += costs[name].pop(0)

    assert cases.medians(3, lambda: contestant("a"), lambda: contestant("b")) == [3.0, 4.0]
    assert "".join(ran) == "abababab"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_family_it_lists_them(arguments, capsys):
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    for name, family in bench.FAMILIES.items():
        assert f"  {name} " in out and family.__doc__.splitlines()[0] in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepp"], "there is no benchmark 'stepp'; did you mean 'step'?"),
        (["step", "--repeats", "0"], "--repeats: '0' is not a whole number of at least 1"),
        (["step", "--repeats", "many"], "--repeats: 'many' is not a whole number of at least 1"),
        (["step", "--json", "missing/cases.jsonl"], "--json is 'missing/cases.jsonl', which cannot be written"),
        (["step", "--fast"], "unrecognized arguments: --fast"),
        (["step", "--clients", "5"], "unrecognized arguments: --clients"),
        (["data", "--clients", "1e6"], "--clients: '1e6' is not a whole number of at least 1"),
        (["data", "--folder", "/dev/null/x"], "--folder is '/dev/null/x', which cannot be made: Not a directory"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_anything_is_measured(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("mpifl: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())


def table_and_lines(arguments, tmp_path, capsys):
    """What a family printed, and its JSON lines."""
    file = tmp_path / "cases.jsonl"
    file.write_text("earlier\n")
    assert bench.main([*arguments, "--json", str(file)]) == 0
    earlier, *lines = file.read_text().splitlines()
    assert earlier == "earlier"
    return capsys.readouterr().out.splitlines(), [json.loads(line) for line in lines]


# ---- step


@pytest.fixture
def two_steps(monkeypatch):
    few = {name: (net, plain, 2) for name, (net, plain, _) in step.STEP_NETS.items()}
    monkeypatch.setattr(step, "STEP_NETS", few)


@pytest.mark.parametrize(
    ("net", "mask", "key"),
    [
        ("dense", False, False),
        ("dense", True, False),
        ("dense", True, True),  # no dropout in this one
        ("conv", False, False),
        ("conv", True, False),
    ],
)
def test_both_loops_train_the_same_model(net, mask, key):
    factory, plain, _ = step.STEP_NETS[net]
    model, batches = step.from_module(factory), step.made_batches(3, mask, key)
    first = model.init(0)
    ours = first - step.engine_loop(model, batches)().update["pseudo_grad"]
    hand = torch.cat([p.detach().reshape(-1) for p in step.hand_loop(plain(), model, batches)()])
    assert (hand - first).abs().max() > 1e-4
    torch.testing.assert_close(ours, hand, rtol=1e-5, atol=1e-6)


def test_with_a_key_the_hand_written_conv_loop_drops_out_too():
    batches = step.made_batches(1, False, True)
    net = step.PlainConv()
    step.hand_loop(net, step.from_module(EmnistConv), batches)
    assert net.training and not torch.equal(net(batches[0]["x"]), net(batches[0]["x"]))


def test_masks_keep_every_row_and_keys_differ_from_step_to_step():
    batches = step.made_batches(3, True, True)
    assert all(batch["mask"].all() for batch in batches)
    assert len({int(batch["key"]) for batch in batches}) == 3


def test_each_hand_run_starts_from_the_same_parameters():
    net = mlp(step.EMNIST)
    loop = step.hand_loop(net, step.from_module(lambda: mlp(step.EMNIST)), step.made_batches(2, False, False))
    once = [p.detach().clone() for p in loop()]
    for first, again in zip(once, loop()):
        assert torch.equal(first, again.detach())


def test_step_prints_a_table_and_appends_the_same_cases_as_json_lines(two_steps, tmp_path, capsys):
    (header, *rows), lines = table_and_lines(["step", "--repeats", "1"], tmp_path, capsys)
    assert header.split() == ["step", "ms", "hand", "ms", "ours", "ratio"]
    width = bench.CASE_WIDTH
    assert [row[:width].strip() for row in rows] == STEP_CASES
    for row, case, line in zip(rows, STEP_CASES, lines, strict=True):
        assert line["family"] == "step" and line["case"] == case
        assert line["ms_hand"] > 0 and line["ratio"] == pytest.approx(line["ms_ours"] / line["ms_hand"])
        assert row[width:].split() == [f"{line[name]:.3f}" for name in ("ms_hand", "ms_ours", "ratio")]
        assert line["versions"]["torch"] == torch.__version__ and line["hardware"]


# ---- round


def test_round_prints_a_case_of_each_workload_and_each_cohort(monkeypatch, tmp_path, capsys):
    asked = []

    def noted(job, ranks):
        asked.append(job)
        return here(job)

    monkeypatch.setattr(rounds, "trained", noted)
    monkeypatch.setattr(rounds, "SMALL_CLIENTS", 30)
    monkeypatch.setattr(rounds, "COHORTS", (2, 20))
    monkeypatch.setattr(rounds, "NO_OP_COHORTS", (2, 5))
    only = {name: rounds.WORKLOADS[name]._replace(cohort=2) for name in ("dense", "lstm", "memory")}
    monkeypatch.setattr(rounds, "WORKLOADS", only)
    arguments = ["round", "--rounds", "2", "--only", *only, "no_op", "--folder", str(tmp_path / "kept")]
    rows, lines = table_and_lines(arguments, tmp_path, capsys)
    assert [line["case"] for line in lines] == [
        "dense, cohort 2",
        "lstm, cohort 2",
        "memory, cohort 2",
        "memory, cohort 20",
        "no_op, cohort 2",
        "no_op, cohort 5",
    ]
    assert [(job["cohort"], job["rounds"], job["algorithm"]["batches"]["size"]) for job in asked] == [
        (2, 2, 20),
        (2, 2, 4),
        (2, 2, 4),
        (20, 2, 4),
        (2, 2, 4),
        (5, 2, 4),
    ]
    for line in lines[:2]:
        shares = [line[f"percent_{phase}"] for phase in rounds.PHASES]
        assert all(share > 0 for share in shares) and sum(shares) <= 100 and line["examples_per_s"] > 0
    assert all(line["MB_host"] >= 50 for line in lines[2:4]) and len(rows) == 9
    for line in lines[4:]:
        assert 0 < line["ms_server"] < line["ms_round"] and line["us_client"] > 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "femnist",
        "many_small",
        "people_10",
        "people_4",
        "speech",
    ]


def test_clients_of_the_rounds_are_of_the_sizes_that_are_said(tmp_path):
    for make, few, least in ((datasets.femnist, 60, 16), (datasets.cifar, 3, 50), (datasets.speech, 3, 40)):
        [case] = make(tmp_path / make.__name__, few)
        with closing(Dataset(tmp_path / make.__name__)) as dataset:
            sizes = dataset.sizes("train")
            assert len(sizes) == case["clients"] == few and sizes.min() >= least
            columns = dataset.client("train", 1)
            for name, feature in dataset.features.items():
                assert columns[name].max() > 0.9 * ((feature.classes or 256) - 1)
                assert feature.pad is None or columns[name].min() == 1  # no pad, which would end a sequence
        assert sizes.max() <= 500 and (least > 16) == (sizes.min() == sizes.max())


# ---- comm


@pytest.mark.mpi(ranks=3)
def test_what_is_exchanged_is_the_payload_of_a_round():
    comm = connect()
    before = comm.bytes_down, comm.bytes_up
    figures = exchange.exchanged(comm, 1000, 2, ["flat", "node", "sharded"])
    trips = exchange.TURNS * 2  # turns, and trips of a turn, the first of which does not count
    down, up = (trips * (2 * 1000 + 334) * width for width in (4, 8))  # twice all parameters, and a third of them
    assert (comm.bytes_down - before[0], comm.bytes_up - before[1]) == (down, up)
    assert figures.keys() == {"flat", "node", "sharded"}
    for ms in figures.values():
        assert 0 < ms["down"] < 10_000 and 0 < ms["up"] < 10_000 and (ms["copy"] > 0) == (comm.rank == 0)


def test_comm_prints_a_case_for_each_number_of_ranks_and_parameters(monkeypatch, tmp_path, capsys):
    asked = []

    def noted(ranks, module, *words):
        asked.append((ranks, module, *words))
        return json.dumps({way: {"down": 2.0 * i, "up": 4.0 * i, "copy": 3.0} for i, way in enumerate(words[2:], 1)})

    monkeypatch.setattr(messages, "on_ranks", noted)
    monkeypatch.setattr(messages, "mpirun", lambda: "mpirun")
    arguments = ["comm", "--ranks", "2", "5", "--parameters", "10", "2000", "--repeats", "4"]
    rows, lines = table_and_lines(arguments, tmp_path, capsys)
    assert len(rows) == 1 + len(lines)
    named = [(line["case"], line["ms_round_trip"], line["times_copy"]) for line in lines]
    ways = [("flat", 6.0, 2.0), ("node", 12.0, 4.0), ("sharded", 18.0, 6.0)]
    assert named == [
        (f"{ranks} ranks, {size} parameters, {way}", *ms)
        for ranks in (2, 5)
        for size in ("10", "2,000")
        for way, *ms in ways
    ]
    words = ("4", "flat", "node", "sharded")
    assert asked == [(ranks, "mpifl.bench.exchange", size, *words) for ranks in (2, 5) for size in ("10", "2000")]
    rows, lines = table_and_lines([*arguments, "--reduce", "node"], tmp_path, capsys)
    assert {line["case"].split(", ")[-1] for line in lines} == {"node"}
    monkeypatch.setattr(messages, "mpirun", lambda: None)
    assert bench.main(arguments) == 2 and "needs mpirun" in capsys.readouterr().err


def test_the_exchange_prints_its_figures_as_json():
    command = [sys.executable, "-m", "mpifl.bench.exchange", "10", "1", "node"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert said.keys() == {"node"} and said["node"].keys() == {"down", "up", "copy"}


# ---- data


@pytest.fixture
def little(monkeypatch):
    """Datasets of a few clients, and training in this process."""
    sizes = {"IMAGE_CLIENTS": 12, "COHORT": 5, "WRITER_CLIENTS": 12, "WRITER_IMAGES": 6, "PEOPLE_COHORT": 20}
    for name, value in (sizes | {"READERS": 2, "PASSES": 2, "COMPRESSIONS": ("gzip", "zstd")}).items():
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(data, "WRITER_MODEL", "logistic")
    monkeypatch.setattr(data, "trained", here)


def here(job):
    """As training.trained, without a process of its own."""
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        summary = mpifl.run(job | {"run": job["run"] | {"out": str(out)}})
        lines = (out / "metrics.jsonl").read_text().splitlines()
    return training.Trained(summary, [json.loads(line) for line in lines])


def test_data_prints_a_table_and_appends_the_same_cases_as_json_lines(little, tmp_path, capsys):
    arguments = ["data", "--clients", "3000", "--repeats", "1", "--folder", str(tmp_path / "kept")]
    rows, lines = table_and_lines(arguments, tmp_path, capsys)
    width, shown = bench.CASE_WIDTH, []
    for line in lines:
        figures = {name: line[name] for name in line if name not in ("family", "case", "versions", "hardware")}
        assert all(np.isfinite(value) and value >= 0 for value in figures.values())
        if shown != [*figures]:  # the names come again when they change
            shown = [*figures]
            assert rows.pop(0).split() == ["data", *" ".join(shown).replace("_", " ").split()]
        row = rows.pop(0)
        assert row[:width].strip() == line["case"] and len(row[width:].split()) == len(figures)
    assert not rows
    expected = "write people, open people, sample, train, write images, read, 2 readers, write writers, conv net"
    begun = [line["case"].replace("-", " ") for line in lines]
    assert [word for word in expected.split(", ") if not any(case.startswith(word) for case in begun)] == []
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == sorted(
        ["people-3000", "images-12", "images-12-gzip", "images-12-zstd", "writers-12"]
    )


def test_people_are_as_many_as_asked_for_and_have_1_to_4_rows(tmp_path):
    (case,) = datasets.people(tmp_path / "people", 2500)
    dataset = Dataset(tmp_path / "people")
    assert case["clients"] == dataset.clients == 2500
    assert np.unique(dataset.sizes("train")).tolist() == [1, 2, 3, 4]
    assert case["MB_on_disk"] * 1e6 == sum(file.stat().st_size for file in (tmp_path / "people").iterdir())
    dataset.close()


def test_a_dataset_that_is_there_is_used_again(tmp_path):
    assert [case["case"] for case in datasets.images(tmp_path / "images", 3, 4)] == ["write images"]
    before = (tmp_path / "images" / "index.h5").stat().st_mtime_ns
    assert not [*datasets.images(tmp_path / "images", 3, 4)]
    datasets.evict(tmp_path / "images")
    assert (tmp_path / "images" / "index.h5").stat().st_mtime_ns == before


def test_enlarged_digits_use_all_of_a_byte_and_are_mostly_background():
    pixels = datasets.enlarged()
    assert pixels.shape[1:] == (28, 28) and pixels.dtype == np.uint8 and pixels.max() == 255
    assert 0.5 < (pixels == 0).mean() < 0.9


IDS = [0, 4, 7, 11]


@pytest.fixture(params=["", "gzip"])
def stored(request, tmp_path):
    """Twelve clients in several shards."""
    with ShardWriter(tmp_path / "images", datasets.IMAGES, shard_bytes=20_000, compression=request.param) as writer:
        writer.write("train", datasets._images(12, 6))
    return tmp_path / "images", request.param


def test_every_way_reads_the_same_bytes(stored):
    path, compression = stored
    dataset = Dataset(path)
    assert len(dataset.shards("train")) > 2
    wanted = [dataset.client("train", id)[name].tobytes() for id in IDS for name in ("x", "y")]
    dataset.close()
    with reading.ways_to_read(path, IDS, 1) as ways:
        found = {name: [array.tobytes() for array in read()] for name, read in ways.items()}
    without_a_place = {"h5py", "first touch", "verified"}
    assert found.keys() == without_a_place | (set() if compression else {"raw", "raw, one buffer", "memmap"})
    for name in found.keys() - {"raw, one buffer"}:
        assert found[name] == wanted, name


@pytest.mark.parametrize("stored", [""], indirect=True)
def test_raw_reads_the_same_ranges_with_and_without_memory_of_its_own(stored, monkeypatch):
    asked, preadv = [], os.preadv

    def noted(file, buffers, first):
        asked.append((first, memoryview(buffers[0]).nbytes))
        return preadv(file, buffers, first)

    with reading.ways_to_read(stored[0], IDS, 0) as ways:
        monkeypatch.setattr(os, "preadv", noted)
        calls = {}
        for way in ("raw", "raw, one buffer", "verified"):
            last, asked[:] = ways[way]()[-1], []
            ways[way]()
            calls[way] = asked[:]
        assert calls["raw"] == calls["raw, one buffer"] == calls["verified"] and len(asked) == 2 * len(IDS)
        assert ways["raw, one buffer"]()[0][: last.nbytes].tobytes() == last.tobytes()


def test_first_touch_compares_checksums_and_each_time_anew(tmp_path):
    [*datasets.images(tmp_path / "images", 12, 6)]
    with reading.ways_to_read(tmp_path / "images", IDS, 2) as ways:
        ways["first touch"]()
        place = ways["raw"]()[0]
        file = tmp_path / "images" / "train-00000.h5"
        content = file.read_bytes()
        at = content.index(place.tobytes())
        with open(file, "r+b") as damaged:
            damaged.seek(at)
            damaged.write(bytes([content[at] ^ 1]))
        ways["verified"]()
        with pytest.raises(UserError, match="does not match its checksum"):
            ways["first touch"]()


def test_a_read_only_locked_folder_is_put_back_as_it_was(tmp_path):
    [*datasets.images(tmp_path / "images", 3, 4)]
    paths = [tmp_path / "images", *(tmp_path / "images").iterdir()]
    modes = [path.stat().st_mode for path in paths]
    with data._read_only_and_locked(tmp_path / "images"):
        assert not any(path.stat().st_mode & 0o222 for path in paths)
        with open(paths[1]) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        Dataset(tmp_path / "images").close()
    assert [path.stat().st_mode for path in paths] == modes
    with open(paths[1]) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def record(load, total, evaluate):
    seconds = {"total": total} | ({"evaluate": evaluate} if evaluate else {})
    return {"host_seconds": {"load": load}, "seconds": seconds}


def test_a_run_is_judged_by_its_rounds_after_the_first_and_without_evaluation():
    run = training.Trained({}, [record(100.0, 100.0, 0), record(1.0, 10.0, 3.0), record(2.0, 5.0, 0)])
    assert run.host_seconds("load") == 1.5 and run.round_seconds == 6.0


def test_a_run_that_fails_is_an_error_with_what_it_said(monkeypatch):
    done = SimpleNamespace(returncode=2, stderr="mpifl: no such model\n")
    monkeypatch.setattr(training.subprocess, "run", lambda *command, **options: done)
    with pytest.raises(UserError, match=r"mpifl.train .* failed: mpifl: no such model"):
        training.trained({"rounds": 1})


def test_jobs_are_trained_by_a_server_and_two_hosts_in_an_environment_of_their_own(tmp_path, monkeypatch):
    launcher, said = tmp_path / "mpirun", tmp_path / "said"
    launcher.write_text(
        f'#!/bin/sh\necho "$1 $2 rank=$PMI_RANK $OMPI_ALLOW_RUN_AS_ROOT" > {said}\nshift 2\nexec "$@"\n'
    )
    launcher.chmod(0o755)
    monkeypatch.setattr(training, "mpirun", lambda: str(launcher))
    monkeypatch.setenv("PMI_RANK", "7")  # as under a launcher, which does not nest
    run = training.trained({"rounds": 2, "cohort": 4, "model": {"name": "logistic"}, "algorithm": {"name": "fedavg"}})
    assert said.read_text() == "-n 3 rank= 1\n"
    assert len(run.rounds) == 2 and run.summary["rounds"] == 2
