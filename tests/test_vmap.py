"""The contracts do not name an engine: every work gives under vmap over clients what it gives one by one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quadratics import MODEL, Bench
from torch import nn
from torch.func import functional_call, grad, vmap

from mpifl.algorithms.fedavg import fedavg
from mpifl.algorithms.hypcluster import hypcluster
from mpifl.algorithms.mime import mime
from mpifl.algorithms.scaffold import scaffold
from mpifl.data.batches import batches
from mpifl.data.shard import Feature
from mpifl.engine.serial import checked_visit, visit
from mpifl.engine.together import loops_refused, together, visit_together
from mpifl.measure import accuracy, scoring
from mpifl.model import from_module
from mpifl.models.lstm import Lstm
from mpifl.optim import adam, fedadam, momentum, sgd
from mpifl.rand import as_tensor, dropout, fold
from mpifl.schedule import constant
from mpifl.tree import leaves, tree_map
from mpifl.work import Batching, Client, ClientWork, Upload

CLIENTS = 3
BATCHES = Batching(size=4, epochs=2)


class Net(nn.Module):
    """Two layers with keyed dropout between."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, key=None):
        return self.last(dropout(F.relu(self.first(x)), 0.3, key))


FEATURES = {"x": Feature("float32", (5,)), "y": Feature("int64", (), classes=3)}
NETWORK = from_module(Net)


def examples(client):
    generator = torch.Generator().manual_seed(client)
    return {"x": torch.randn(8, 5, generator=generator), "y": torch.randint(3, (8,), generator=generator)}


def quadratic_examples(client):
    bench = Bench.make(sizes=(8, 8, 8))
    return {
        "A": torch.tensor(np.tile(bench.A[client], (8, 1, 1)), dtype=torch.float32),
        "b": torch.tensor(np.tile(bench.b[client], (8, 1)), dtype=torch.float32),
    }


CASES = {"network": (NETWORK, FEATURES, examples), "quadratic": (MODEL, None, quadratic_examples)}


def algorithms(model):
    return {
        "fedavg": fedavg(model, BATCHES, momentum(0.1, clip_norm=1.0)),
        "fedprox": fedavg(model, BATCHES, adam(0.1), mu=0.5, weighting="uniform"),
        "scaffold": scaffold(model, BATCHES, constant(0.1)),
        "mime": mime(model, BATCHES, fedadam(0.1)),
        "mime in batches": mime(model, BATCHES, momentum(0.1), gradient_size=3),
        "hypcluster": hypcluster(model, 3, BATCHES, sgd(0.1), weighting="uniform"),
    }


def shared_of(name, model):
    """What the server would send to any of the algorithm's works."""
    theta, other = model.init(1), model.init(2)
    opt = fedadam(0.1).init(theta) if name == "mime" else momentum(0.1).init(theta)
    opt = opt | {"m": 0.1 * other}
    thetas = torch.stack([theta, other, 0.5 * other])
    shared = {"theta": theta, "lr": torch.tensor(0.1), "control": 0.1 * other, "c": 0.3 * other}
    return shared | {"opt": opt, "thetas": thetas}


def client_of(number, model):
    memory = {"control": 0.2 * model.init(10 + number)}
    scratch = {"cluster": torch.tensor(number % 3)}
    key = as_tensor(fold(0, number))
    return Client(torch.tensor(number), key, torch.tensor(8.0), memory, torch.tensor(1), scratch, {})


def streams(features, rows, batching):
    features = features or {name: Feature("float32", tuple(c.shape[1:])) for name, c in rows(0).items()}
    return [list(batches(rows(k), features, batching, fold(0, k))) for k in range(CLIENTS)]


def stacked(trees):
    return tree_map(lambda *rows: torch.stack(rows), *trees)


def assert_alike(work, shared, clients, streams):
    serial = [checked_visit(work, shared, client, stream) for client, stream in zip(clients, streams)]
    block = Client(*(stacked(f) if isinstance(f[0], dict) else torch.stack(f) for f in zip(*clients)))
    mapped, steps = together(work, torch.device("cpu")), [len(stream) for stream in streams]
    found = visit_together(mapped, shared, block, map(stacked, zip(*streams)), steps)
    for name in ("update", "memory", "scratch", "stats"):
        expected = stacked([getattr(upload, name) for upload in serial])
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.weight, torch.stack([upload.weight for upload in serial]))
    return serial


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", algorithms(MODEL))
def test_every_work_of_every_algorithm_runs_under_vmap_as_one_by_one(name, case):
    model, features, rows = CASES[case]
    shared = shared_of(name, model)
    clients = [client_of(k, model) for k in range(CLIENTS)]
    for work in algorithms(model)[name].works:
        uploads = assert_alike(work, shared, clients, streams(features, rows, work.batches))
        for _, leaf in leaves(uploads[0].update):
            assert float(leaf.abs().max()) > 0, "an upload of zeros proves nothing"


def test_scoring_runs_under_vmap_as_one_by_one():
    work = scoring(NETWORK, {"accuracy": accuracy}, "train", "client")
    clients = [client_of(k, NETWORK) for k in range(CLIENTS)]
    assert_alike(work, {"theta": NETWORK.init(1)}, clients, streams(FEATURES, examples, work.batches))


def test_a_vector_of_each_clients_own_is_scored_under_vmap_too():
    work = scoring(MODEL, {}, "train", "client", lambda shared, client: client.memory["control"])
    clients = [client_of(k, MODEL) for k in range(CLIENTS)]
    assert_alike(work, {}, clients, streams(None, quadratic_examples, work.batches))


def test_serial_visits_leave_shared_client_and_batches_as_they_were():
    work = algorithms(NETWORK)["fedprox"].works[0]
    shared, client = shared_of("fedprox", NETWORK), client_of(0, NETWORK)
    stream = streams(FEATURES, examples, work.batches)[0]
    copies = [tree_map(torch.clone, tree) for tree in (shared, client.memory, *stream)]
    upload = visit(work, shared, client, stream)
    for tree, copy in zip((shared, client.memory, *stream), copies):
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(leaves(tree), leaves(copy)))
    again = checked_visit(work, shared, client, stream)
    assert torch.equal(upload.update["pseudo_grad"], again.update["pseudo_grad"])


# --- layers that are written for vmap --------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "length"), [(1, 1), (1, 6), (2, 1), (3, 5)])
def test_an_lstm_gives_each_of_several_clients_the_outputs_and_gradients_of_torchs_own(layers, length):
    inputs, hidden = 3, 5
    ours, torchs = Lstm(inputs, hidden, layers), nn.LSTM(inputs, hidden, layers, batch_first=True)
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in torchs.named_parameters()}
    draw = torch.Generator().manual_seed(layers)
    weights = {n: 0.5 * torch.randn(CLIENTS, *p.shape, generator=draw) for n, p in ours.named_parameters()}
    x, factors = (torch.randn(CLIENTS, 4, length, size, generator=draw) for size in (inputs, hidden))

    def weighted(weights, x, factors):
        outputs = functional_call(ours, weights, (x,))
        return (outputs * factors).sum(), outputs

    with loops_refused(True):
        found, outputs = vmap(grad(weighted, argnums=(0, 1), has_aux=True))(weights, x, factors)
    for client in range(CLIENTS):
        own = {name: leaf[client].clone().requires_grad_() for name, leaf in weights.items()}
        read = x[client].clone().requires_grad_()
        expected = functional_call(torchs, own, (read,))[0]
        (expected * factors[client]).sum().backward()
        torch.testing.assert_close(outputs[client], expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1][client], read.grad, rtol=1e-5, atol=1e-6)
        for name, leaf in own.items():
            torch.testing.assert_close(found[0][name][client], leaf.grad, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(functional_call(ours, own, (read,)), functional_call(torchs, own, (read,))[0])


# --- the oracle ------------------------------------------------------------------------------------------


def _writes_to(what):
    """A work whose `what` (function and input) is written to."""

    def start(shared, client):
        if what == "shared in start":
            shared["theta"].add_(1)
        if what == "shared through an alias":
            return {"theta": shared["theta"]}
        return {"theta": shared["theta"].clone()}

    def step(shared, client, carry, batch):
        target = {
            "shared in step": shared["opt"]["m"],
            "client in step": client.memory["control"],
            "batch in step": batch["x"],
            "a view of the batch": batch["x"][0],
            "the batch's key": batch["key"],
        }.get(what, carry["theta"])
        target.add_(1)
        return carry

    def finish(shared, client, carry):
        if what == "client in finish":
            client.scratch["cluster"].mul_(2)
        return Upload({"theta": carry["theta"]}, client.n)

    return ClientWork(start, step, finish, BATCHES)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shared in start", "read-only input: shared.theta"),
        ("shared in step", "read-only input: shared.opt.m"),
        ("shared through an alias", "read-only input: shared.theta"),
        ("client in step", "read-only input: client.memory.control"),
        ("client in finish", "read-only input: client.scratch.cluster"),
        ("batch in step", "batch: x"),
        ("a view of the batch", "batch: x"),
        ("the batch's key", "batch: key"),
    ],
)
def test_the_oracle_names_what_a_work_wrote_to(what, message):
    work = _writes_to(what)
    stream = streams(FEATURES, examples, BATCHES)[0]
    with pytest.raises(AssertionError, match=message):
        checked_visit(work, shared_of("mime", NETWORK), client_of(0, NETWORK), stream)


def test_the_oracle_lets_a_work_write_to_its_carry():
    stream = streams(FEATURES, examples, BATCHES)[0]
    upload = checked_visit(_writes_to("carry"), shared_of("mime", NETWORK), client_of(0, NETWORK), stream)
    assert torch.allclose(upload.update["theta"], NETWORK.init(1) + len(stream))
