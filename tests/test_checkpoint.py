"""Checkpoints: a run that was stopped or killed goes on bit for bit, on any number of ranks, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_same_everywhere import job, results

import mpifl
from mpifl import saving
from mpifl.checkpoint import Damaged, complete, newest
from mpifl.comm import Alone
from mpifl.config import UserError
from mpifl.saving import Column, write_tensors
from mpifl.stopping import ASKED, Stopped

TESTS = Path(__file__).parent
ENV = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
ALGORITHMS = ["fedavg", "scaffold", "mime", "hypcluster"]


def table(algorithm, out, /, **changes):
    """Four rounds; changes of [run] beside others."""
    run = {"out": str(out)} | changes.pop("run", {})
    return job(algorithm, out, rounds=4) | changes | {"run": run}


def one_round(job, monkeypatch, comm=None):
    """Run until the next round is over, as a signal has it."""
    monkeypatch.setattr(ASKED, "name", "SIGUSR1")
    try:
        with pytest.raises(Stopped):
            mpifl.run(job, comm=comm)
    finally:
        monkeypatch.setattr(ASKED, "name", "")


def rounds_kept(out):
    return [found.rounds for found in complete(out / "checkpoints")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of an algorithm's four rounds at once: `whole(algorithm)`, in one process."""

    @cache
    def whole(algorithm):
        out = tmp_path_factory.mktemp("whole") / algorithm
        mpifl.run(table(algorithm, out), comm=Alone())
        return results(out)

    return whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rounds_one_by_one_are_the_rounds_at_once(algorithm, whole, tmp_path, monkeypatch):
    parts = table(algorithm, tmp_path / "parts")
    for done in (1, 2, 3):
        one_round(parts, monkeypatch)
        assert rounds_kept(tmp_path / "parts")[0] == done
    summary = mpifl.run(parts)
    assert results(tmp_path / "parts") == whole(algorithm)
    assert summary["examples"] == sum(of_round["examples"] for of_round in whole(algorithm)["rounds"])
    assert "going on after round 3 " in (tmp_path / "parts" / "log.txt").read_text()


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(ranks=n, timeout=60)) for n in (2, 3, 5)])
@pytest.mark.parametrize("algorithm, reduce", [("scaffold", "node"), ("hypcluster", "flat"), ("scaffold", "sharded")])
def test_goes_on_with_another_number_of_ranks(algorithm, reduce, ranks, whole, tmp_path, monkeypatch):
    parts = table(algorithm, tmp_path / "parts", comm={"reduce": reduce}, run={"scored_by": "server"})
    one_round(parts, monkeypatch)
    here = (tmp_path / "parts" / "config.toml").exists()  # on rank 0
    if here:  # hosts that are gone have left what they kept
        one_round(parts, monkeypatch, Alone())
    summary = mpifl.run(parts)
    if here:
        assert summary["ranks"] == ranks
        assert results(tmp_path / "parts") == whole(algorithm)


@pytest.mark.parametrize("ranks, more", [(3, 5), (4, None)])
@pytest.mark.launches
def test_killed_in_training_and_started_again_is_undisturbed(launch, tmp_path, ranks, more):
    train = {"name": "parts:dies_once", "client": 2, "round": 2, "marker": str(tmp_path / "died")}
    settings = {"save_every": 1, "out": str(tmp_path / "out")}
    path = tmp_path / "job.toml"
    path.write_text(mpifl.config.to_toml(table("scaffold", None, algorithm=train, cohort=0, run=settings)))
    died = launch(ranks, "-m", "mpifl.train", path, timeout=40, env=ENV)
    assert died.returncode != 0 and (tmp_path / "died").exists(), died.stderr
    assert not (tmp_path / "out" / "summary.json").exists()
    assert 1 in rounds_kept(tmp_path / "out")  # that of round 2 was being written
    done = launch(more, "-m", "mpifl.train", path, timeout=40, env=ENV)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on after round [12] ", done.stdout)
    mpifl.run(table("scaffold", tmp_path / "whole", algorithm=train, cohort=0), comm=Alone())
    assert results(tmp_path / "out") == results(tmp_path / "whole")


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    """The folder of an algorithm's run that was stopped twice, after a round each: `two_rounds(algorithm)`."""

    @cache
    def two_rounds(algorithm):
        out = tmp_path_factory.mktemp("stopped") / algorithm
        with pytest.MonkeyPatch.context() as monkeypatch:
            for _ in range(2):
                one_round(table(algorithm, out), monkeypatch)
        return out

    return two_rounds


@pytest.fixture
def stopped_after_two(two_rounds):
    """Have a copy of such a run at `out`: `stopped_after_two(algorithm, out)` -> the job that goes on with it."""

    def stopped_after_two(algorithm, out):
        shutil.copytree(two_rounds(algorithm), out)
        return table(algorithm, out)

    return stopped_after_two


@pytest.mark.parametrize("file", ["server.safetensors", "memory-00000.safetensors", "run.json", "COMPLETE"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(file, how, whole, tmp_path, stopped_after_two, capsys):
    parts = stopped_after_two("scaffold", tmp_path / "parts")
    path = tmp_path / "parts" / "checkpoints" / "round-00000002" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    {
        "flip": lambda: path.write_bytes(data),
        "cut": lambda: os.truncate(path, len(data) - 1),
        "remove": path.unlink,
    }[how]()
    mpifl.run(parts)
    assert "going on after round 1 " in (tmp_path / "parts" / "log.txt").read_text() or file == "COMPLETE"
    if file != "COMPLETE":
        assert f"round-00000002 is damaged: {file}" in capsys.readouterr().err
    assert results(tmp_path / "parts") == whole("scaffold")


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": 3},
        {"limits": {"0:theta": 5.0}},
        {"limits": {"0:theta": [float("nan")]}},
        {"branches": [3]},
        {"versions": {}},
        {"row": None},
    ],
)
def test_a_run_json_that_does_not_say_what_it_must_is_damage(change, whole, tmp_path, stopped_after_two, capsys):
    parts = stopped_after_two("fedavg", tmp_path / "parts")
    folder = tmp_path / "parts" / "checkpoints" / "round-00000002"
    text = json.dumps(json.loads((folder / "run.json").read_text()) | change).encode()
    (folder / "run.json").write_bytes(text)
    mark = json.loads((folder / "COMPLETE").read_text())
    (folder / "COMPLETE").write_text(json.dumps(mark | {"run.json": [len(text), zlib.crc32(text)]}))
    mpifl.run(parts)
    assert "round-00000002 is damaged: run.json: " in capsys.readouterr().err
    assert results(tmp_path / "parts") == whole("fedavg")


def test_a_state_of_another_layout_is_refused(tmp_path, stopped_after_two):
    parts = stopped_after_two("fedavg", tmp_path / "parts")
    found = newest(Alone(), tmp_path / "parts" / "checkpoints")
    (size,) = found.server(like={})["theta"].shape
    with pytest.raises(UserError, match=r"holds another state of the server than this program's \(control, theta\)"):
        found.server(like={"theta": torch.zeros(size + 1), "control": torch.zeros(size)})
    assert parts


def test_no_whole_checkpoint_is_an_error_that_says_so_and_changes_nothing(tmp_path, stopped_after_two):
    parts = stopped_after_two("fedavg", tmp_path / "parts")
    for path in tmp_path.glob("parts/checkpoints/*/server.safetensors"):
        path.write_bytes(b"")
    before = (tmp_path / "parts" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the checkpoints .* is as it was written; remove that folder"):
        mpifl.run(parts)
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == before


def test_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, monkeypatch):
    written = write_tensors

    def full(path, columns):
        if "round-00000003" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(path, columns)

    monkeypatch.setattr(saving, "write_tensors", full)
    mpifl.run(table("fedavg", tmp_path / "full", run={"save_every": 1, "keep": 9}))
    assert rounds_kept(tmp_path / "full") == [4, 2, 1]
    said = (tmp_path / "full" / "log.txt").read_text()
    assert "the checkpoint of round 3 could not be written" in said and "the last one is of round 2" in said
    assert not list(tmp_path.glob("full/checkpoints/.*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.launches
def test_a_disk_that_is_really_full(launch, tmp_path):
    (tmp_path / "disk").mkdir()
    if os.system(f"mount -t tmpfs -o size=600k tmpfs {tmp_path / 'disk'} 2>/dev/null"):
        pytest.skip("cannot mount a file system here")
    try:
        words = (f"run.out={tmp_path / 'disk' / 'out'}", "run.save_every=1", "run.keep=99", "rounds=40")
        done = launch(3, "-m", "mpifl.train", *words, timeout=40)
        kept = rounds_kept(tmp_path / "disk" / "out")
        assert "No space left" in done.stdout + done.stderr
        assert kept and newest(Alone(), tmp_path / "disk" / "out" / "checkpoints").rounds == kept[0]
    finally:
        os.system(f"umount -l {tmp_path / 'disk'}")


def test_the_last_k_are_kept_and_one_after_the_last_round(tmp_path):
    mpifl.run(table("fedavg", tmp_path / "out", run={"save_every": 1, "keep": 2}))
    assert rounds_kept(tmp_path / "out") == [4, 3]
    mpifl.run(table("fedavg", tmp_path / "none"))
    assert rounds_kept(tmp_path / "none") == []


def test_a_finished_run_is_told_of_and_may_be_given_more_rounds(tmp_path, capsys):
    short = table("scaffold", tmp_path / "more", run={"save_every": 3})
    first = mpifl.run(short)
    assert mpifl.run(short, quiet=False) == json.loads((tmp_path / "more" / "summary.json").read_text())
    assert "holds this job's results already" in capsys.readouterr().out
    assert mpifl.run(short | {"rounds": 6})["digest"] != first["digest"]
    mpifl.run(table("scaffold", tmp_path / "whole") | {"rounds": 6})
    assert results(tmp_path / "more") == results(tmp_path / "whole")
    plain = table("fedavg", tmp_path / "plain")
    mpifl.run(plain)
    with pytest.raises(UserError, match="finished with 4 rounds, and has no checkpoint to add more to"):
        mpifl.run(plain | {"rounds": 6})
    assert (tmp_path / "plain" / "summary.json").exists()
    with pytest.raises(UserError, match=r"rounds is 5, but the run in .* has done 6"):
        mpifl.run(short | {"rounds": 5})


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"seed": 4}, "seed is 3 there, now 4"),
        ({"algorithm": {"name": "fedavg"}}, "algorithm.mu is 0.1 there, now None"),
        ({"run": {"threads": 2}}, "run.threads is 1 there, now 2"),
        ({"run": {"resume": "never"}}, "already exists"),
    ],
)
def test_another_job_is_refused_with_what_differs(changes, says, tmp_path, stopped_after_two):
    parts = stopped_after_two("fedprox", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    settings = parts["run"] | changes.get("run", {})
    with pytest.raises(UserError, match=re.escape(says)):
        mpifl.run(parts | changes | {"run": settings})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_harmless_changes_and_the_same_data_elsewhere_go_on(tmp_path, stopped_after_two):
    parts = stopped_after_two("fedavg", tmp_path / "out")
    changes = {"comm": {"reduce": "flat"}, "data": parts["data"] | {"cache_mb": 1}, "name": "other"}
    mpifl.run(parts | changes | {"run": parts["run"] | {"eval_every": 2, "memory_mb": 1}})
    mpifl.run(table("fedavg", tmp_path / "whole"))
    found, whole = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "whole"))
    assert (found["digest"], found["scores"]) == (whole["digest"], whole["scores"])


def test_another_dataset_is_refused(tmp_path, stopped_after_two):
    parts = stopped_after_two("fedavg", tmp_path / "out")
    with pytest.raises(UserError, match="was made with another dataset"):
        mpifl.run(parts | {"data": {"path": "parts:many_clients"}, "model": parts["model"]})


def test_another_machine_is_said(tmp_path, stopped_after_two, monkeypatch):
    parts = stopped_after_two("fedavg", tmp_path / "out")
    monkeypatch.setattr("mpifl.train.hardware", lambda device: "Abacus 3000")
    mpifl.run(parts)
    said = (tmp_path / "out" / "log.txt").read_text()
    assert re.search(r"another machine than before \(processor .*, now Abacus 3000\): the last bits may differ", said)


def test_an_unfinished_run_without_checkpoint_starts_again(whole, tmp_path, stopped_after_two):
    parts = stopped_after_two("fedavg", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    mpifl.run(parts)
    assert results(tmp_path / "out") == whole("fedavg")


def test_seeds_go_on_each_by_itself(tmp_path, monkeypatch):
    both = table("fedavg", tmp_path / "both", seeds=2)
    mpifl.run(both | {"seeds": 1, "run": {"out": str(tmp_path / "both" / "seed-3")}})
    one_round(both, monkeypatch)
    again = mpifl.run(both)
    alone = mpifl.run(table("fedavg", tmp_path / "alone", seeds=2))
    assert [s["digest"] for s in again["seeds"]] == [s["digest"] for s in alone["seeds"]]


def test_warm_start_begins_where_a_plain_module_is(tmp_path):
    mpifl.run(table("fedavg", tmp_path / "first"))
    file = tmp_path / "first" / "model.safetensors"
    warm = table("fedavg", tmp_path / "warm", run={"warm_start": str(file)})
    still = {"client_opt": {"name": "sgd", "lr": 1e-30}, "server_opt": {"name": "sgd", "lr": 1e-30}}
    mpifl.run(warm | {"rounds": 1, "algorithm": warm["algorithm"] | still})
    first, then = load_file(file), load_file(tmp_path / "warm" / "model.safetensors")
    assert all(torch.equal(first[name], then[name]) for name in first)
    for wrong, says in ((tmp_path / "none.safetensors", "cannot be read"), (TESTS / "parts.py", "cannot be read")):
        with pytest.raises(UserError, match=says):
            mpifl.run(table("fedavg", tmp_path / "no", run={"warm_start": str(wrong)}))


@pytest.mark.parametrize("dtype", list(saving._KINDS))
def test_the_files_are_safetensors_as_others_read_them(dtype, tmp_path):
    tensors = {"a.b": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors["none"] = torch.zeros((0, 4), dtype=dtype)
    written = write_tensors(tmp_path / "x", {name: Column.of(leaf) for name, leaf in tensors.items()})
    found = load_file(tmp_path / "x")
    assert all(torch.equal(found[name], leaf) and found[name].dtype == dtype for name, leaf in tensors.items())
    assert written.bytes == (tmp_path / "x").stat().st_size


def test_only_what_is_marked_complete_is_a_checkpoint(tmp_path, stopped_after_two):
    stopped_after_two("fedavg", tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints"
    shutil.copytree(folder / "round-00000002", folder / ".round-00000003.part")
    shutil.copytree(folder / "round-00000002", folder / "round-00000004")
    (folder / "round-00000004" / "COMPLETE").unlink()
    assert rounds_kept(tmp_path / "out") == [2, 1]
    with pytest.raises(Damaged, match="has no bytes"):
        whole = complete(folder)[0]
        (whole.path / "run.json").unlink()
        whole.verify(0, 1)
