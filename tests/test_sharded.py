"""comm.reduce = "sharded": slices of vectors over ranks and virtual nodes, and rounds that all ranks run alike."""

import json
import re

import numpy as np
import pytest
from test_same_everywhere import job, misbehaving, results

import mpifl
from mpifl import flat
from mpifl.comm import Alone, connect
from mpifl.config import UserError


@pytest.fixture
def world():
    return connect()


NODES = [0, 1, 2, 3]  # ranks of a pretended node; 0: all of them; 4 ranks in nodes of 3 are uneven


@pytest.mark.mpi(ranks=4)
@pytest.mark.parametrize("piece", [1 << 30, 96])
@pytest.mark.parametrize("nodes", NODES)
def test_slices_add_up_and_join_to_whole_vectors(world, monkeypatch, nodes, piece):
    monkeypatch.setenv("MPIFL_NODE_RANKS", str(nodes))
    monkeypatch.setattr(flat, "PIECE", piece)
    count, before = 50, (world.bytes_down, world.bytes_up)
    vectors = np.arange(2.0 * count).reshape(2, count)
    with world.using("sharded"):
        room = world.room(2 * count * 8).view(np.float64).reshape(2, count)
        room += world.rank * vectors  # rank 0 hosts nobody, and adds nothing
        world.arrive()
        slices = np.stack(world.sum_slices(list(room)))
        assert slices.shape == (2, 13)  # 50 in 4, rounded up
        padded = np.pad(6 * vectors, ((0, 0), (0, 2)))
        assert (slices == padded[:, 13 * world.slice : 13 * (world.slice + 1)]).all()
        memory = world.join(slices, count, [0, 448], 900)  # each vector on a cache line
        assert memory.ctypes.data % 64 == 0
        assert all((memory[s : s + 400].view(np.float64) == v).all() for s, v in zip((0, 448), 6 * vectors))
        world.arrive()
    used = (world.bytes_down - before[0], world.bytes_up - before[1])
    assert used == (2 * 13 * 8, 2 * 13 * 8)  # of a vector, its R-th part


@pytest.mark.mpi(ranks=3, timeout=60)
@pytest.mark.parametrize("how", ["huge", "nan", "raise"])
def test_asks_again_and_leaves_out_as_one_process_does(how, tmp_path):
    changes = misbehaving(how=how) | {"comm": {"reduce": "sharded"}, "faults": {"tolerate": 1}}
    run = {"out": str(tmp_path / "world")}
    summary = mpifl.run(job("fedavg", None, **changes | {"run": run}))
    if summary is None:
        return
    assert summary["repeated_asks" if how == "huge" else "excluded"] >= 1
    mpifl.run(job("fedavg", None, **changes | {"run": run | {"out": str(tmp_path / "alone")}}), comm=Alone())
    assert results(tmp_path / "world") == results(tmp_path / "alone")


@pytest.mark.mpi(ranks=3, timeout=60)
def test_rank_0_moves_a_part_and_scores_and_baselines_are_the_same(tmp_path):
    up = {}
    for way in ("flat", "sharded"):
        table = job("fedavg", tmp_path / way, comm={"reduce": way}, model={"name": "mlp", "hidden": [400]})
        summary = mpifl.run(table | {"data": {"path": "digits"}, "cohort": 4, "rounds": 2, "baselines": True})
        up[way] = summary and (summary["bytes_up"], summary["digest"], summary["baselines"])
    if world_is_mine := up["flat"]:
        assert up["sharded"][1:] == world_is_mine[1:]
        lines = (tmp_path / "sharded" / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["loss"] > 0 for line in lines)
        assert 0.3 < up["sharded"][0] / up["flat"][0] < 0.4


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"server_opt": {"name": "sgd", "lr": 1.0, "clip_norm": 1.0}}, "does not act on each coordinate by itself"),
        ({"name": "test_comm:keeps_what_was_shared"}, "elementwise=True"),
    ],
)
def test_refuses_rounds_that_need_whole_vectors(changes, says, tmp_path):
    table = job("fedavg", tmp_path / "out", comm={"reduce": "sharded"})
    table["algorithm"] = changes if "name" in changes else table["algorithm"] | changes
    with pytest.raises(UserError, match=re.escape(says)):
        mpifl.run(table)
    assert not (tmp_path / "out").exists()
