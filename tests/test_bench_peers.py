"""Family peers: everybody does the work that ours does, and who cannot take part is told of. Never how fast."""

import importlib
import io
import json
import os
import sys
from argparse import Namespace
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_bench import table_and_lines

from mpifl.bench import datasets, peers, rounds, turns
from mpifl.bench.contestants import ours
from mpifl.comm import Alone, connect
from mpifl.config import UserError, load, to_toml
from mpifl.data.shard import Feature
from mpifl.engine.clock import Clock
from mpifl.model import from_module
from mpifl.models.cnn import cifar_cnn, emnist_conv
from mpifl.models.linear import mlp
from mpifl.models.lstm import char_lstm
from mpifl.results import RunFolder
from mpifl.session import Session

NOBODY = Namespace(fedjax=None, pfl=None, flower=None)


@pytest.fixture
def alone(monkeypatch):
    """Ours without mpirun, and the plain loop on one thread."""
    everyone = peers.contestants
    monkeypatch.setattr(peers, "mpirun", lambda: None)
    monkeypatch.setattr(peers, "contestants", lambda folder, options, alone: everyone(folder, options, alone)[:2])


def femnist(path):
    return datasets.femnist(path, 8)


def little(path, **changes):
    list(femnist(path))
    workload = rounds.Workload(femnist, {"name": "mlp", "hidden": [20]}, 3, 20)._replace(**changes)
    return peers.job_of(workload, path, 2)


def opened(table):
    return closing(Session.open(load(table), Alone(), Clock(0)))


def script(monkeypatch, name):
    monkeypatch.syspath_prepend(str(peers.SCRIPTS))
    return importlib.import_module(name)


def test_a_plain_loop_trains_what_ours_trains_and_table_and_json_have_the_same_rows(
    alone, monkeypatch, tmp_path, capsys
):
    workload = rounds.Workload(femnist, {"name": "mlp", "hidden": [20]}, 3, 20)
    monkeypatch.setattr(peers, "WORKLOADS", {"dense": workload})
    arguments = ["peers", "--only", "dense", "--rounds", "2", "--repeats", "1", "--folder", str(tmp_path / "kept")]
    (header, *rows), (own, loop) = table_and_lines(arguments, tmp_path, capsys)
    assert header.split("  ")[0] == "peers" and len(rows) == 2
    assert [own["case"], loop["case"]] == ["dense, mpifl, alone", "dense, torch loop, threads: 1"]
    assert (own["times_ours"], own["moved"], own["apart"]) == (1, 1, 0)
    assert 0 < loop["apart"] < 1e-4 and loop["moved"] == pytest.approx(1, abs=1e-5)
    assert loop["loss"] == pytest.approx(own["loss"], rel=1e-6) and loop["s_first_round"] > 0
    assert loop["times_ours"] == pytest.approx(loop["s_round"] / own["s_round"])
    assert loop["contestant"] == {"torch": torch.__version__} and own["contestant"].keys() == {"mpifl"}
    assert own["examples_per_s"] * own["s_round"] == pytest.approx(loop["examples_per_s"] * loop["s_round"])


def test_the_workload_is_the_clients_and_cohorts_of_the_job(monkeypatch, tmp_path):
    with opened(little(tmp_path / "data")) as session:
        examples = peers.write_workload(session, tmp_path / "workload.npz")
        found = script(monkeypatch, "protocol").Workload(str(tmp_path / "workload.npz"))
        assert (found.net, found.classes, found.hidden, found.batch, found.lr) == ("mlp", 62, [20], 20, 0.01)
        assert np.array_equal(found.start, session.theta.numpy())
        counted = 0
        for round, cohort in enumerate(found.cohorts):
            for id, client in zip(session.sampled(round).tolist(), cohort, strict=True):
                x, y = found.clients[client]
                stored = session.parts.dataset.client("train", id)
                assert np.array_equal(y, stored["y"]) and np.allclose(x, stored["x"] / np.float32(255))
                assert (x.dtype, y.dtype) == (np.float32, np.int64)
                counted += len(y)
    assert examples == counted and len(found.clients) == len(np.unique(found.cohorts))


@pytest.mark.parametrize(
    ("net", "factory", "shape", "draws"),
    [
        ("mlp", partial(mlp, hidden=(9, 7)), (28, 28), False),
        ("emnist_conv", emnist_conv, (28, 28), True),
        ("cifar_cnn", cifar_cnn, (3, 32, 32), True),
        ("char_lstm", char_lstm, (11,), False),
    ],
)
def test_the_nets_that_peers_get_are_ours(monkeypatch, net, factory, shape, draws):
    text = net == "char_lstm"
    features = {
        "x": Feature("uint8", shape, classes=62) if text else Feature("float32", shape),
        "y": Feature("uint8", shape if text else (), classes=62),
    }
    x = torch.randint(62, (3, *shape)) if text else torch.randn(3, *shape)
    own = from_module(lambda: factory(features))
    theta = own.init(1)
    workload = SimpleNamespace(net=net, classes=62, hidden=[9, 7], clients=[(x.numpy(), None)], device="cpu")
    theirs = script(monkeypatch, "torch_net").make_net(workload)
    torch.nn.utils.vector_to_parameters(theta.clone(), theirs.parameters())
    scores = own.scores(theta, {"x": x, "index": torch.arange(3)})
    assert torch.allclose(theirs.eval()(x), scores, atol=1e-6)
    assert torch.equal(theirs.train()(x), theirs(x)) != draws  # dropout


@pytest.mark.mpi(ranks=3)
def test_on_three_ranks_each_line_is_a_turn_from_the_start(monkeypatch, tmp_path, capsys):
    comm = connect()
    folder = Path(comm.share(str(tmp_path)))
    file, model, out = folder / "job.toml", folder / "model.npy", folder / "out"
    if comm.rank == 0:
        table = little(folder / "data")
        file.write_text(to_toml(table | {"run": table["run"] | {"out": str(out)}}))
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    comm.arrive()
    ours._command(comm, [str(file), str(model)])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if comm.rank > 0:
        assert not said
        return
    assert said[0].keys() == {"versions"} and [len(turn["seconds"]) for turn in said[1:]] == [2, 2]
    assert all(second > 0 for turn in said[1:] for second in turn["seconds"])
    first, _, again, _ = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert first["loss"] == again["loss"]
    with opened(table) as session:
        _, theta = ours.turn(session, RunFolder(load(table, [f"run.out={folder / 'alone'}"])))
    assert np.array_equal(theta, np.load(model))


def test_evaluation_is_no_part_of_a_round(tmp_path):
    table = little(tmp_path / "data")
    with opened(table | {"run": table["run"] | {"out": str(tmp_path / "out")}}) as session:
        folder = RunFolder(session.job)
        seconds, _ = ours.turn(session, folder)
    records = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert seconds[1] == records[1]["seconds"]["total"] - records[1]["seconds"]["evaluate"] > 0


def contestant(tmp_path, *command, environments=({},)):
    return turns.Contestant("peer", [*command], tmp_path / "model.npy", environments)


def test_a_python_that_is_not_there_and_a_script_that_fails_are_told_with_what_they_said(tmp_path):
    with pytest.raises(UserError, match="peer: '/no/python' cannot be run: No such file"):
        contestant(tmp_path, "/no/python").start()
    for code in ("raise SystemExit('no such peer')", "print('{\"versions\": 1}'); raise SystemExit('no such peer')"):
        with closing(contestant(tmp_path, sys.executable, "-c", code)) as broken:
            broken.start()
            with pytest.raises(UserError, match=r"peer ended; .* said: no such peer"):
                turns.take_turns([broken], 1)


SPEAKER = """
import json, os, sys
print(json.dumps({"versions": {"peer": os.environ["WHO"]}}), flush=True)
for turn, _ in enumerate(sys.stdin):
    with open(sys.argv[1], "a") as file:
        file.write(os.environ["WHO"])
    print(json.dumps({"seconds": [[9, 9], [1, 3], [5, 5], [3, 5]][turn]}), flush=True)
"""


def test_processes_of_a_contestant_take_their_turn_together_and_the_first_turn_does_not_count(tmp_path):
    said = str(tmp_path / "said")
    both = contestant(tmp_path, sys.executable, "-c", SPEAKER, said, environments=({"WHO": "a"}, {"WHO": "a"}))
    single = contestant(tmp_path, sys.executable, "-c", SPEAKER, said, environments=({"WHO": "b"},))
    with closing(both), closing(single):
        both.start()
        single.start()
        turns.take_turns([both, single], 3)
        pids = [process.pid for process in (*both.processes, *single.processes)]
    assert (tmp_path / "said").read_text() == "aab" * 4
    assert both.versions == {"peer": "a"} and both.round_seconds == single.round_seconds == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"versions": {}}', flush=True)
time.sleep(60)
"""


def test_a_contestant_that_does_not_end_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    stubborn = contestant(tmp_path, sys.executable, "-c", DEAF)
    with closing(stubborn):
        stubborn.start()
        stubborn.ready()
    assert stubborn.processes[0].returncode == -9


def test_peers_take_part_when_their_python_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "mpirun", lambda: "mpirun")
    own, *loops = peers.contestants(tmp_path, NOBODY)
    assert own.command[:3] == ["mpirun", "-n", "3"] and len(loops) == 2
    everyone = peers.contestants(tmp_path, Namespace(fedjax="/f", pfl="/p", flower="/w"))
    added = [c for c in everyone if c.command[0] in ("/f", "/p", "/w")]
    assert [c.command[0] for c in added] == ["/f", "/p", "/p", "/w"] and len(everyone) == 7
    assert len({c.model for c in everyone}) == 7
    assert [len(c.environments) for c in added] == [1, 1, 2, 1]
    first, second = added[2].environments
    assert first["PFL_WORKER_ADDRESSES"] == second["PFL_WORKER_ADDRESSES"]
    assert len(first["PFL_WORKER_ADDRESSES"].split(",")) == 2
    assert (first["PFL_WORKER_RANK"], second["PFL_WORKER_RANK"]) == ("0", "1")
    for c in everyone[1:]:
        assert (peers.SCRIPTS / c.command[1].rsplit("/", 1)[1]).is_file()
