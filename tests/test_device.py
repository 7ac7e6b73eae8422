"""Rank to GPU: hosts spread evenly, the server joins the least busy or has its own, bindings of a launcher are kept."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mpifl
from mpifl.comm import Alone, World, connect
from mpifl.config import UserError, load
from mpifl.engine.device import Seat, gpu_of
from mpifl.session import _device

ENV = {"PYTHONPATH": str(Path(mpifl.__file__).parent.parent)}
JOB = {"rounds": 1, "model": {"name": "mlp"}, "algorithm": {"name": "fedavg"}, "run": {"device": "cuda"}}


def company(hosts, with_server):
    """All seats of ranks that see the same GPUs, the server's first."""
    places = [-1] * with_server + list(range(hosts))
    return [Seat(place, hosts, with_server) for place in places]


@pytest.mark.parametrize("server_gpu", ["share", "own"])
@pytest.mark.parametrize("with_server", [False, True])
@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 5, 7, 8, 9, 16])
def test_hosts_spread_evenly_and_the_server_takes_the_least_used(hosts, gpus, with_server, server_gpu):
    kept = with_server and server_gpu == "own"
    if kept and gpus == 1:
        with pytest.raises(UserError, match=rf"rank 0 and {hosts} hosts .* one GPU.*run.server_gpu=share"):
            gpu_of(company(hosts, with_server)[0], gpus, server_gpu)
        return
    chosen = [gpu_of(seat, gpus, server_gpu) for seat in company(hosts, with_server)]
    indices = [index for index, _ in chosen]
    assert all(0 <= index < gpus for index in indices)
    load_of = Counter(indices[with_server:])
    loads = [load_of[gpu] for gpu in range(gpus)]
    if with_server:
        assert loads[indices[0]] == (0 if kept else min(loads))
    if kept:
        loads.pop(indices[0])
    assert max(loads) - min(loads) <= 1
    said = {line for _, line in chosen}
    assert len(said) == 1, "all ranks of a node see the same, so that any one may say it"
    assert bool(said.pop()) == (hosts > gpus - kept), "said just when hosts share"


@pytest.mark.parametrize(
    ("seat", "gpus", "server_gpu", "index"),
    [
        (Seat(), 1, "share", 0),  # one process
        (Seat(), 4, "own", 0),
        (Seat(-1, 8, True), 8, "share", 0),  # nine ranks, eight GPUs: none is wasted on the server
        (Seat(0, 8, True), 8, "share", 0),
        (Seat(7, 8, True), 8, "share", 7),
        (Seat(-1, 7, True), 8, "share", 7),  # the idle one
        (Seat(-1, 7, True), 8, "own", 7),
        (Seat(6, 7, True), 8, "own", 6),
        (Seat(7, 8, True), 8, "own", 0),  # seven GPUs for eight hosts
        (Seat(7, 8, False), 8, "own", 7),  # a node without the server
        (Seat(-1, 0, True), 1, "share", 0),  # Slurm has bound the server alone to one
        (Seat(-1, 0, True), 1, "own", 0),
        (Seat(0, 1, False), 1, "own", 0),
    ],
)
def test_examples(seat, gpus, server_gpu, index):
    assert gpu_of(seat, gpus, server_gpu)[0] == index


def test_what_is_said_names_hosts_and_gpus():
    assert gpu_of(Seat(0, 8, True), 3)[1].startswith("8 hosts of a node share 3 GPUs, up to 3 a GPU")
    assert gpu_of(Seat(0, 2, True), 1)[1].startswith("2 hosts of a node share 1 GPU, all of them one")
    bound = gpu_of(Seat(0, 2, True), 1, visible="5")[1]
    assert "CUDA_VISIBLE_DEVICES=5" in bound and "mpifl.doctor" in bound  # may be another GPU for each


def test_session_takes_that_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    comm, job = Alone(), load(JOB)
    comm.seat = Seat(4, 5, True)
    assert _device(job, comm) == (torch.device("cuda", 1), "5 hosts of a node share 3 GPUs, up to 2 a GPU: there are "
                                  "more ranks than GPUs")  # fmt: skip
    own = replace(job, run=replace(job.run, server_gpu="own"))
    assert _device(own, comm)[0] == torch.device("cuda", 0)
    comm.seat = Seat(-1, 5, True)
    assert _device(own, comm)[0] == torch.device("cuda", 2)


@pytest.mark.parametrize("unset", [True, False])
@pytest.mark.mpi(ranks=5)
def test_seats_are_among_ranks_that_see_the_same_gpus(monkeypatch, unset):
    rank = connect().rank
    if unset:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        expected = [Seat(place, 4, True) for place in (-1, 0, 1, 2, 3)]
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ["0", "1", "0", "1", "0"][rank])
        expected = [Seat(-1, 2, True), Seat(0, 2), Seat(0, 2, True), Seat(1, 2), Seat(1, 2, True)]
    world = World()
    assert (world.seat, world.node) == (expected[rank], 0)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == (None if unset else str(rank % 2))


@pytest.mark.launches
def test_only_rank_of_a_launcher_hosts(launch):
    done = launch(1, "-c", "from mpifl.comm import World; print(World().seat)", env=ENV)
    assert done.stdout.strip() == repr(Seat(0, 1, False))
