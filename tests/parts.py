"""Parts that test jobs name by dotted path: awkward data, a model with dropout, and clients that misbehave."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mpifl import saving
from mpifl.algorithms.fedavg import fedavg
from mpifl.algorithms.scaffold import scaffold
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Feature
from mpifl.work import Algorithm, Batching, ClientWork, Cohort, Upload

SIZES = (7, 10, 5, 0, 11, 13, 1, 4, 9, 6, 3, 8)  # at batch size 4 the last batches hold 1, 2, 3 and 4 examples


def awkward_dataset(sizes=SIZES):
    """Unequal clients, an empty one, and a central test split; labels are a noisy linear map of the inputs."""
    rng = np.random.default_rng(5)
    truth = rng.normal(size=(6, 3))

    def draw(n):
        x = rng.normal(size=(n, 6)).astype(np.float32)
        return {"x": x, "y": (x @ truth + rng.normal(size=(n, 3))).argmax(axis=1).astype(np.int64)}

    features = {"x": Feature("float32", (6,)), "y": Feature("int64", (), classes=3)}
    return MemoryDataset([draw(n) for n in sizes], draw(1030), features)


def many_clients():
    return awkward_dataset([5] * 120)


def long_test_split():
    """2,148 test rows: four blocks and a fifth of 100."""
    plain = awkward_dataset()
    clients = [plain.client("train", index) for index in range(plain.clients)]
    rows = plain.rows("train", 0, plain.total("train"))
    picked = np.arange(2148) % len(rows["y"])
    return MemoryDataset(clients, {name: column[picked] for name, column in rows.items()}, plain.features)


def dataset_of_the_process():
    """What a generator seeded by the clock would do: other data on every rank."""
    return awkward_dataset([5 + os.getpid() % 1000, 4])


def dataset_that_stops_rank_1():
    if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return awkward_dataset()


def dataset_on_a_slow_disk():
    saving._make_durable = lambda descriptor: time.sleep(30)
    return awkward_dataset()


def token_dataset():
    """Unsigned 16-bit labels, as token ids come."""
    plain = awkward_dataset()
    clients = [plain.client("train", i) for i in range(plain.clients)]
    features = {"x": Feature("float32", (6,)), "y": Feature("uint16", (), classes=3)}
    return MemoryDataset([{**c, "y": c["y"].astype(np.uint16)} for c in clients], features=features)


def two_asks(model):
    """Keeps memory in its first ask; in the second, client 5's update is not a number in round 2."""

    def finish(shared, client, carry):
        return Upload({"one": torch.ones(())}, torch.ones(()), memory={"rounds": client.memory["rounds"] + 1})

    def spoil(shared, client, carry):
        bad = torch.where((client.id == 5) & (shared["round"] == 1), float("nan"), 1.0)
        return Upload({"one": bad}, torch.ones(()))

    start, step = lambda shared, client: {}, lambda shared, client, carry, batch: carry
    first = ClientWork(start, step, finish, Batching(size=4))
    second = ClientWork(start, step, spoil, Batching(size=4))

    def one_round(state, cohort):
        cohort.sum(first)
        cohort.sum(second, round=float(cohort.round))
        return state

    return Algorithm(
        lambda theta: {"theta": theta},
        one_round,
        (first, second),
        lambda state: {"model": state["theta"]},
        memory=lambda theta: {"rounds": torch.zeros(())},
    )


def fickle_upload(model):
    """Names its upload by the data, which no buffer can carry."""
    plain = fedavg(model)
    train = plain.works[0]

    def finish(shared, client, carry):
        upload = train.finish(shared, client, carry)
        name = "pseudo_grad" if int(client.id) < 0 else "other"
        return upload._replace(update={name: upload.update["pseudo_grad"]})

    worked = train._replace(finish=finish)

    def one_round(state, cohort):
        cohort.sum(worked, theta=state["theta"], lr=0.1)
        return state

    return plain._replace(works=(worked,), round=one_round)


def net_with_dropout(features, hidden=33):
    """A foreign module: its dropout draws from torch's own generator."""
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3))


class _Raises(nn.Linear):
    def forward(self, x):
        if torch.is_grad_enabled() and x.abs().sum():  # not for the zeros of a blank visit
            raise RuntimeError("planted failure")
        return super().forward(x)


def net_that_raises_in_training(features):
    return _Raises(6, 3)


def misbehaving(model, how="raise", client=2, round=1, scale=1.0):
    """FedAvg in which one client, in one round (from 0), does something terrible."""
    plain = fedavg(model)
    train = plain.works[0]

    def finish(shared, visitor, carry):
        upload = train.finish(shared, visitor, carry)
        if int(visitor.id) == client and float(shared["lr"]) and float(shared["round"]) == round:
            upload = _misbehave(how, upload)
        return upload

    worked = train._replace(finish=finish)

    def one_round(state, cohort):
        mean = cohort.mean(worked, theta=state["theta"], lr=0.1, round=float(cohort.round))
        return {"theta": state["theta"] - mean["pseudo_grad"], "opt": state["opt"]}

    return plain._replace(works=(worked,), round=one_round)


def dies_once(model, client=2, round=1, marker=""):
    """SCAFFOLD in which one client, in one round (from 0), kills its rank, unless a file says that it did."""
    plain = scaffold(model, batches=Batching(size=4))
    train = plain.works[0]

    def finish(shared, visitor, carry):
        if int(visitor.id) == client and float(shared["round"]) == round and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train.finish(shared, visitor, carry)

    worked = train._replace(finish=finish)

    def one_round(state, cohort):
        asked = Cohort(
            cohort.round,
            cohort.ids,
            cohort.population,
            cohort.total_weight,
            lambda work, ids, given, shared: cohort.sum(worked, round=float(cohort.round), **shared),
        )
        return plain.round(state, asked)

    return plain._replace(works=(worked,), round=one_round)


def _misbehave(how, upload):
    if how == "raise":
        raise RuntimeError("planted failure")
    if how == "exit":
        sys.exit(3)
    if how == "exit 0":
        sys.exit(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "thread":
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        time.sleep(60)
    if how == "sleep":
        time.sleep(60)
    values = {"nan": float("nan"), "inf": float("inf"), "huge": 1e6}
    bad = upload.update["pseudo_grad"].clone()
    bad[3] = values[how]
    return upload._replace(update={"pseudo_grad": bad})
