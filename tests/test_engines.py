"""Every engine gives what the serial one gives, for every algorithm and model: keyed dropout and masked tails, too."""

import json
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import mpifl
from mpifl.algorithms.fedavg import fedavg
from mpifl.algorithms.hypcluster import hypcluster
from mpifl.algorithms.mime import mime
from mpifl.algorithms.scaffold import scaffold
from mpifl.build import MODELS
from mpifl.comm import Alone
from mpifl.config import Engine, UserError, construct
from mpifl.data import blocks
from mpifl.data.batches import batches
from mpifl.data.format import Feature
from mpifl.data.memory import MemoryDataset
from mpifl.engine import host as host_module
from mpifl.engine.batched import Batched
from mpifl.engine.clients import on_leaves
from mpifl.engine.clock import Clock
from mpifl.engine.graph import as_cuda_graph, captured
from mpifl.engine.host import Host
from mpifl.engine.store import ClientMemory
from mpifl.engine.together import together, visit_together
from mpifl.fleet import Fleet
from mpifl.measure import accuracy, scoring
from mpifl.model import cross_entropy, from_module, token_cross_entropy, train_in
from mpifl.models import cnn, resnet
from mpifl.optim import momentum, sgd
from mpifl.schedule import constant
from mpifl.tree import leaves, tree_map
from mpifl.uplink import exact as uplink
from mpifl.uplink.exact import Accumulator, Wire
from mpifl.work import Batching, Client, ClientWork, Cohort, Upload

torch.set_num_threads(1)

SIZES = (7, 1, 33, 0, 20, 8)  # with batches of 8: tails of 7, 1, 1 and 4 rows, and a client without any
BATCHES = Batching(size=8)
ALGORITHMS = {
    "fedavg": lambda model: fedavg(model, BATCHES, momentum(0.1, clip_norm=1.0)),
    "scaffold": lambda model: scaffold(model, BATCHES, constant(0.05)),
    "mime": lambda model: mime(model, BATCHES, momentum(0.05), gradient_size=8),
    "hypcluster": lambda model: hypcluster(model, 2, BATCHES, sgd(0.05)),
}
CLASSES, VOCABULARY, LENGTH = 3, 7, 3
SHAPES = {"logistic": (6,), "mlp": (6,), "emnist_conv": (28, 28), "cifar_cnn": (3, 6, 6), "resnet18": (1, 16, 16)}
TEXT = ("char_lstm", "word_lstm", "transformer")
OPTIONS = {
    "mlp": {"hidden": [9, 5]},
    "resnet18": {"stem": 3},
    "char_lstm": {"embedding": 3, "hidden": 5},
    "word_lstm": {"embedding": 4, "hidden": 6, "tied": True},
    "transformer": {"embedding": 4, "heads": 2, "feedforward": 6, "layers": 1},
}
RECORDED = {("mlp", algorithm) for algorithm in ALGORITHMS} | {("cifar_cnn", "fedavg"), ("char_lstm", "fedavg")}
"""Cells whose graphs are really recorded: it takes a second where a net is deep."""


def recorded(function):
    """The Capture of a CPU: a list of tensor operations, which knows no more than a CUDA graph does of Python."""
    return make_fx(function)()


def features_of(name):
    if name in SHAPES:
        return {"x": Feature("float32", SHAPES[name]), "y": Feature("int64", (), classes=CLASSES)}
    tokens = Feature("int64", (LENGTH,), classes=VOCABULARY)
    return {"x": tokens, "y": tokens}


def dataset_of(features, sizes=SIZES):
    rng = np.random.default_rng(0)

    def draw(feature, n):
        shape = (n, *feature.shape)
        return rng.integers(feature.classes, size=shape) if feature.classes else rng.normal(size=shape).astype("f4")

    return MemoryDataset([{c: draw(f, n) for c, f in features.items()} for n in sizes], features=features)


@lru_cache
def model_of(name):
    features, loss = features_of(name), cross_entropy if name in SHAPES else token_cross_entropy
    return from_module(lambda: construct(MODELS[name], OPTIONS.get(name, {}), name, features=features), loss)


class Rounds:
    """What an algorithm was told in a round of all clients, and what these kept; clients have a past from the start."""

    def __init__(self, engine, algorithm, dataset, model, tolerate=0, rounds=1, device="cpu"):
        theta, self.lines = model.init(0), []
        memory = ClientMemory(algorithm.memory(theta))
        if memory.kept:
            for client, seed in ((0, 5), (2, 6)):
                row = {"control": 0.1 * model.init(seed)}
                memory.put(client, memory.layout.pack(row, memory.layout.empty()), 1)
        options = {"device": device, "engine": engine, "say": self.lines.append}
        self.host = Host(algorithm.works, dataset, memory, 0, Clock(), **options)
        self.fleet = Fleet(Alone(), self.host, tolerate, say=self.lines.append)
        self.sums, self.algorithm, self.state = [], algorithm, algorithm.init(theta)
        for round in range(rounds):
            self._run(round)
        self.traffic = self.fleet.read_traffic()
        self.host.settle(rounds, rounds - 1)
        self.memory = memory.read(range(dataset.clients)) if memory.kept else {}

    def _run(self, round):
        def ask(*arguments):
            self.sums.append(self.fleet.ask(*arguments))
            return self.sums[-1]

        self.fleet.begin(round)
        clients = self.host.dataset.clients
        self.state = self.algorithm.round(self.state, Cohort(round, np.arange(clients), clients, 99.0, ask))
        self.fleet.accepted = round


def assert_alike(found, expected, most=1e-5):
    """Two trees of tensors, numbers or lists, of one structure, relative to the largest value of each leaf."""
    found, expected = (dict(leaves(tree_map(torch.as_tensor, tree))) for tree in (found, expected))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        away = (found[name].double() - leaf.double()).abs().max()
        assert away <= most * leaf.double().abs().max(), f"{name}: {away}"


def assert_same_rounds(found, expected, most=1e-5):
    assert len(found.sums) == len(expected.sums) > 0
    for ours, theirs in zip(found.sums, expected.sums):
        assert (ours.count, ours.weight) == (theirs.count, theirs.weight)
        assert_alike(ours.update, theirs.update, most)
        assert_alike(ours.stats, theirs.stats, most)
    assert_alike(found.memory, expected.memory, most)
    ours, theirs = found.traffic, expected.traffic
    assert (ours.steps, ours.examples, ours.excluded) == (theirs.steps, theirs.examples, theirs.excluded)


# --- every algorithm x every model x every engine --------------------------------------------------------


SMOOTH = SimpleNamespace(relu=F.silu, max_pool2d=F.max_pool2d)
"""Where a net has 100,000 ReLUs, rounding alone moves one across its kink, and a gradient in its fourth digit."""


@pytest.fixture(autouse=True)
def _narrow_smooth_and_uncaptured(monkeypatch):
    for module in (resnet, cnn):
        monkeypatch.setattr(module, "F", SMOOTH)
    monkeypatch.setattr(resnet, "WIDTHS", (4, 4, 6, 8))
    monkeypatch.setattr(host_module, "as_cuda_graph", lambda function: function)


@lru_cache
def serial(name, algorithm):
    model = model_of(name)
    return Rounds(Engine("serial"), ALGORITHMS[algorithm](model), data_for(name), model)


@lru_cache
def data_for(name):
    return dataset_of(features_of(name), (7, 1) if name in ("emnist_conv", "resnet18") else SIZES)


@pytest.mark.parametrize("engine", ["batched", "graph"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", [*SHAPES, *TEXT])
def test_an_engine_gives_what_the_serial_one_gives(name, algorithm, engine, monkeypatch):
    if engine == "graph" and (name, algorithm) in RECORDED:
        monkeypatch.setattr(host_module, "as_cuda_graph", recorded)
    model, dataset = model_of(name), data_for(name)
    found = Rounds(Engine(engine, clients_at_once=2), ALGORITHMS[algorithm](model), dataset, model)
    assert_same_rounds(found, serial(name, algorithm))


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("mlp", algorithm) for algorithm in ALGORITHMS] + [(name, "fedavg") for name in (*SHAPES, *TEXT)][2:],
)
def test_a_works_tensors_stay_on_its_device_and_no_number_is_read_from_there(name, algorithm):
    model, there = model_of.__wrapped__(name), torch.device("meta")  # it has no values, and mixes with no other device
    model.module.to(there)

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=there)

    vector, number, whole = zeros(model.size), zeros(), zeros(2, dtype=torch.int64)
    shared = {"theta": vector, "control": vector, "c": vector, "lr": number, "thetas": zeros(2, model.size)}
    shared |= {"opt": {"m": vector, "lr": number}}
    memory = {"control": zeros(2, model.size)} if algorithm == "scaffold" else {}
    clients = Client(whole, whole, zeros(2), memory, whole, {"cluster": whole}, {})
    columns = {c: zeros(2, 8, *f.shape, dtype=getattr(torch, f.dtype)) for c, f in features_of(name).items()}
    batch = columns | {"index": zeros(2, 8, dtype=torch.int64), "mask": zeros(2, 8, dtype=torch.bool), "key": whole}
    for work in ALGORITHMS[algorithm](model).works:
        upload = visit_together(together(work, there), shared, clients, [batch, batch], [2, 1])
        for tree in (upload.update, upload.stats, upload.memory, upload.scratch, {"weight": upload.weight}):
            assert all(leaf.device == there for _, leaf in leaves(tree))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("engine", ["auto", "batched", "serial"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", [*SHAPES, *TEXT])
def test_an_engine_gives_on_a_gpu_what_the_serial_one_gives_on_a_cpu(name, algorithm, engine, monkeypatch):
    monkeypatch.setattr(host_module, "as_cuda_graph", as_cuda_graph)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = model_of(name)
    found = Rounds(Engine(engine), ALGORITHMS[algorithm](model), data_for(name), model, device="cuda")
    assert not found.lines, "nothing was refused"
    assert_same_rounds(found, serial(name, algorithm), most=1e-3)


def test_the_table_is_of_all_models_and_algorithms():
    from mpifl.build import ALGORITHMS as known

    assert set(known) == set(ALGORITHMS)
    assert set(MODELS) == {*SHAPES, *TEXT, "text_classifier"}


def test_models_of_transformers_are_refused(tmp_path):
    pytest.importorskip("transformers", reason='needs the extra hf: pip install -e ".[hf]"')
    sizes = {"embedding_size": 4, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "albert", "vocab_size": VOCABULARY, "intermediate_size": 4, "pad_token_id": 0, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    features = {"x": Feature("int64", (LENGTH,), classes=VOCABULARY, pad=0), "y": Feature("int64", (), classes=2)}
    options = {"checkpoint": str(tmp_path), "pretrained": False}
    model = from_module(lambda: construct(MODELS["text_classifier"], options, "text_classifier", features=features))
    with pytest.raises(UserError, match=r'"batched", but \w+ at .* cannot run on several clients at once'):
        Rounds(Engine("batched"), fedavg(model, BATCHES), dataset_of(features), model)


# --- what does not run ------------------------------------------------------------------------------------


def with_dropout():
    return nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Dropout(0.3)), nn.Linear(5, CLASSES))


def test_foreign_dropout_is_refused_by_its_path_if_the_job_asks_for_blocks():
    model = from_module(with_dropout)
    with pytest.raises(UserError, match=r"\"batched\", but Dropout at '1\.1' cannot .*use engine.name = \"serial\""):
        Rounds(Engine("batched"), fedavg(model, BATCHES), dataset_of(features_of("mlp")), model)


def test_without_being_asked_it_trains_one_by_one_with_the_same_bits_and_says_so(monkeypatch):
    model, dataset = from_module(with_dropout), dataset_of(features_of("mlp"))
    expected = Rounds(Engine("serial"), fedavg(model, BATCHES), dataset, model)
    monkeypatch.setattr(host_module, "_batched", as_auto_on_a_gpu)
    found = Rounds(Engine("auto"), fedavg(model, BATCHES), dataset, model, rounds=2)
    assert torch.equal(found.sums[0].update["pseudo_grad"], expected.sums[0].update["pseudo_grad"])
    assert len(found.lines) == 1 and "Dropout at '1.1' cannot run on several clients" in found.lines[0]


class Looped(nn.Module):
    """torch's own LSTM, for which vmap has no rule."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.lstm(x.unsqueeze(1))[0].squeeze(1))


def as_auto_on_a_gpu(clients, clock, engine, say):
    return Batched(clients, clock, say)


def test_what_vmap_could_only_loop_over_trains_one_by_one_unless_blocks_are_asked_for(monkeypatch):
    model, dataset = from_module(Looped), data_for("mlp")
    expected = Rounds(Engine("serial"), ALGORITHMS["fedavg"](model), dataset, model)
    asked = Rounds(Engine("batched", clients_at_once=2), ALGORITHMS["fedavg"](model), dataset, model)
    assert not asked.lines
    monkeypatch.setattr(host_module, "_batched", as_auto_on_a_gpu)
    found = Rounds(Engine("auto"), ALGORITHMS["fedavg"](model), dataset, model)
    assert len(found.lines) == 1 and "cannot run on several clients at once" in found.lines[0]
    for one in (asked, found):
        assert_same_rounds(one, expected)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_operation_of_a_language_model_is_looped_over(name, algorithm, monkeypatch):
    monkeypatch.setattr(host_module, "_batched", as_auto_on_a_gpu)
    model = model_of(name)
    found = Rounds(Engine("auto"), ALGORITHMS[algorithm](model), data_for(name), model)
    assert not found.lines
    assert_same_rounds(found, serial(name, algorithm))


@pytest.mark.parametrize("at_once", [0, 4])
def test_out_of_memory_halves_the_block_says_so_and_loses_nobody(at_once):
    model, dataset = model_of("mlp"), data_for("mlp")
    plain = ALGORITHMS["fedavg"](model)
    train = plain.works[0]

    def start(shared, client):
        if at_once_in(client.id) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return train.start(shared, client)

    hungry = train._replace(start=start)

    def one_round(state, cohort):
        cohort.mean(hungry, theta=state["theta"], lr=torch.tensor(0.1))
        return state

    def rounds(engine):
        return Rounds(engine, plain._replace(works=(hungry,), round=one_round), dataset, model, rounds=2)

    found = rounds(Engine("batched", clients_at_once=at_once))
    assert_same_rounds(found, rounds(Engine("serial")))
    (line,) = found.lines
    assert f"out of memory with {at_once or 5} clients at once, 2 from here on: the digest is no longer" in line


def at_once_in(id):
    """K of the block that this lane of a mapped function is in, 1 outside."""
    if not torch._C._functorch.is_batchedtensor(id):
        return 1
    return torch._C._functorch.get_unwrapped(id).numel()


def test_a_client_that_does_not_fit_alone_ends_the_job():
    def start(shared, client):
        if torch._C._functorch.is_batchedtensor(client.id) and at_once_in(client.id) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return {"one": torch.ones(())}

    work = ClientWork(start, lambda shared, client, carry, batch: carry, lambda *of: Upload({}, of[1].n), BATCHES)
    model = model_of("mlp")
    algorithm = fedavg(model)._replace(works=(work,), round=lambda state, cohort: cohort.sum(work))
    with pytest.raises(UserError, match="one client alone does not fit in memory"):
        Rounds(Engine("batched", clients_at_once=1), algorithm, data_for("mlp"), model)


# --- clients that differ ----------------------------------------------------------------------------------


def spoiling(model, client):
    """SCAFFOLD in which one client's control is not a number, without any control flow."""
    plain = ALGORITHMS["scaffold"](model)
    train = plain.works[0]

    def finish(shared, visitor, carry):
        upload = train.finish(shared, visitor, carry)
        bad = torch.where(visitor.id == client, torch.nan, upload.update["control_change"])
        return upload._replace(update=upload.update | {"control_change": bad})

    work = train._replace(finish=finish)
    zero = torch.zeros(model.size)

    def one_round(state, cohort):
        cohort.mean(work, theta=state["theta"], control=zero, lr=torch.tensor(0.1))
        return state

    return plain._replace(works=(work,), round=one_round)


@pytest.mark.parametrize("engine", ["batched", "graph"])
def test_one_client_that_is_not_finite_is_left_out_of_its_block_alone(engine):
    model, dataset = model_of("mlp"), data_for("mlp")
    run = lambda engine: Rounds(engine, spoiling(model, 2), dataset, model, tolerate=1)  # noqa: E731
    found, expected = run(Engine(engine, clients_at_once=3)), run(Engine("serial"))
    assert found.sums[0].count == 4 and found.traffic.excluded == 1
    assert_same_rounds(found, expected)
    with pytest.raises(UserError, match="control_change of client 2 is NaN"):
        Rounds(Engine(engine, clients_at_once=3), spoiling(model, 2), dataset, model)


@pytest.mark.parametrize("engine", ["batched", "graph"])
def test_clients_that_kept_different_things_are_in_blocks_of_their_own(engine):
    dataset = data_for("mlp")
    keep = ClientWork(
        lambda shared, client: {"sum": torch.zeros(())},
        lambda shared, client, carry, batch: {"sum": carry["sum"] + batch["x"].sum()},
        lambda shared, client, carry: Upload({}, client.n, scratch={"sum": carry["sum"]}),
        Batching(size=8, drop_last=True),  # the clients of 7 and 1 rows are not visited
    )

    def use(shared, client, carry):
        kept = client.scratch.get("sum", torch.full((), 5.0))
        return Upload({"twice": 2 * kept + client.given["more"]}, torch.ones_like(client.n))

    then = ClientWork(lambda *of: {"none": torch.zeros(())}, lambda shared, client, carry, batch: carry, use, BATCHES)

    def one_round(state, cohort):
        cohort.sum(keep)
        cohort.sum(then, given={"more": torch.arange(6.0) ** 3})
        return state

    model = model_of("mlp")
    algorithm = fedavg(model)._replace(works=(keep, then), round=one_round)
    run = lambda engine: Rounds(engine, algorithm, dataset, model)  # noqa: E731
    assert_same_rounds(run(Engine(engine, clients_at_once=2)), run(Engine("serial")))


def test_a_clients_result_does_not_depend_on_who_shares_its_block():
    model, dataset = model_of("cifar_cnn"), data_for("cifar_cnn")
    algorithm = ALGORITHMS["fedavg"](model)
    host = Rounds(Engine("batched", clients_at_once=4), algorithm, dataset, model).host
    shared, bits = {"theta": model.init(0), "lr": torch.tensor(0.1)}, set()
    for ids in ([4], [2, 4], [2, 4, 5, 0], [4, 5, 1]):  # longest first
        (visited,) = host.batched.visits(algorithm.works[0], shared, np.asarray(ids), {})
        upload = visited.upload_of(visited.ids.index(4))
        bits.add(upload.update["pseudo_grad"].numpy().tobytes())
    assert len(bits) == 1


@pytest.mark.mpi(ranks=3, timeout=90)
def test_blocks_of_a_stated_size_give_the_same_bits_on_any_ranks(tmp_path):
    def job(out):
        return {
            "rounds": 2,
            "data": {"path": "parts:awkward_dataset"},
            "model": {"name": "mlp", "hidden": [9]},
            "algorithm": {"name": "scaffold", "batches": {"size": 4, "epochs": 2}},
            "engine": {"name": "batched", "clients_at_once": 4},
            "run": {"out": str(tmp_path / out)},
        }

    world = mpifl.run(job("world"))
    if world is None:
        return  # a host: rank 0 compares
    alone = mpifl.run(job("alone"), comm=Alone())
    assert (world["ranks"], alone["ranks"]) == (3, 1)
    for name in ("digest", "memory_digest", "loss"):
        assert world[name] == alone[name]


@pytest.mark.parametrize("of", ["rows", "sums"])
def test_clients_are_scored_alike(of):
    model, dataset = model_of("mlp"), data_for("mlp")
    work = scoring(model, {"accuracy": accuracy}, "train", "client", size=16)
    algorithm = fedavg(model)._replace(works=(work,))
    hosts = [Rounds(Engine(name), algorithm, dataset, model, rounds=0) for name in ("batched", "serial")]
    shared = {"theta": model.init(0)}
    if of == "sums":
        found, expected = (one.fleet.ask(work, np.arange(6), None, shared) for one in hosts)
        assert (found.count, found.weight) == (expected.count, expected.weight) == (5, 69.0)
        assert_alike(found.stats, expected.stats)
    else:
        (ids, found), (same, expected) = (one.fleet.rows(work, np.arange(6), shared) for one in hosts)
        assert ids.tolist() == same.tolist() == [0, 1, 2, 4, 5]
        assert_alike(found, expected)


# --- blocks of batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batching",
    [
        Batching(size=4, epochs=2),
        Batching(size=4, shuffle=False),
        Batching(size=4, steps=7, max_examples=6),
        Batching(size=4, drop_last=True, max_steps=3, epochs=3),
        Batching(size=0, epochs=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_side_by_side_are_the_batches_of_each_client_and_nothing_else(batching, piece, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_BYTES", piece)
    features = {"x": Feature("uint8", (2,), mean=3.0, std=2.0), "y": Feature("int64", ())}
    stored = [{"x": torch.arange(2 * n, dtype=torch.uint8).view(n, 2), "y": torch.arange(n) + 1} for n in (5, 13, 4)]
    keys, size = [7, 8, 9], batching.size or 13
    found = list(blocks.side_by_side(stored, features, batching, keys, size))
    each = [list(batches(columns, features, batching, key)) for columns, key in zip(stored, keys)]
    assert len(found) == max(map(len, each))
    for step, of_all in enumerate(found):
        assert of_all["mask"].shape == of_all["index"].shape == (3, size) and of_all["key"].shape == (3,)
        for client, alone in enumerate(each):
            rows = {name: leaf[client][of_all["mask"][client]] for name, leaf in of_all.items() if name != "key"}
            rows.pop("mask")
            if step >= len(alone):
                assert not of_all["mask"][client].any()
                continue
            assert of_all["key"][client] == alone[step]["key"]
            for name, leaf in rows.items():
                assert torch.equal(leaf, alone[step][name]) and leaf.dtype == alone[step][name].dtype
    assert all((batch["y"] >= 1).all() for batch in found), "what is masked is a row of the client's, too"


# --- sums of blocks ---------------------------------------------------------------------------------------


def block_of(rng, clients, value=None):
    """Uploads of K clients, some elements of client 1 planted; (K, ...) and one by one."""
    update = {"a": torch.from_numpy(rng.normal(size=(clients, 7)).astype("f4")), "b": {"c": torch.ones(clients, 2, 3)}}
    update |= {"whole": torch.from_numpy(rng.integers(-9, 9, size=(clients, 2))), "none": torch.ones(clients, 0)}
    if value is not None:
        update["a"][1, 3] = value
    stats = {"loss": torch.from_numpy(rng.normal(size=clients)), "share": torch.ones(clients, 2)}
    upload = Upload(update, 2.0 * torch.arange(clients) + 3, stats=stats)
    return upload, [on_leaves(lambda leaf, k=k: leaf[k], upload) for k in range(clients)]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [None, np.nan, np.inf, 2.0**11, 2.0**14])
def test_a_block_is_summed_as_its_clients_are_one_by_one(value, exact, monkeypatch):
    monkeypatch.setattr(uplink, "_PIECE", 12)  # four columns of three clients at a time
    block, alone = block_of(np.random.default_rng(0), 5, value)
    wire = Wire.of(alone[0], 1, exact)
    limits = np.full(len(wire.names), 2.0**12)
    ours, theirs = (Accumulator(wire, limits, 9, 0) for _ in range(2))
    admitted = ours.add_block([4, 7, 5], block)
    assert admitted == [theirs.add(client, upload) for client, upload in zip([4, 7, 5], alone)]
    assert (ours.bad, ours.over, ours.excluded) == (theirs.bad, theirs.over, theirs.excluded)
    for total in (ours, theirs):
        total.report()
    if ours.over is not None:
        assert exact and ours.over == (7, 0)
        return  # asked again: nobody reads the sums
    for found, expected in zip(ours.buffers, theirs.buffers):
        torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-5)


def test_what_is_summed_on_another_device_is_fetched_by_the_report(monkeypatch):
    block, alone = block_of(np.random.default_rng(0), 3)
    wire = Wire.of(alone[0], 1, True)
    ours, theirs = (Accumulator(wire, wire.first_limits(), 3, 0) for _ in range(2))
    theirs.add_block([0, 1, 2], block)
    parts_on = Accumulator._parts_on  # "cpu" and "cpu:0" pass for two devices
    monkeypatch.setattr(Accumulator, "_parts_on", lambda total, device: parts_on(total, torch.device("cpu", 0)))
    ours.add_block([0, 1], block)
    assert not ours.buffers[0][: wire.size].any()
    ours.add_block([2], on_leaves(lambda leaf: leaf[2:], block))
    for total in (ours, theirs):
        total.report()
    assert torch.equal(ours.buffers[0], theirs.buffers[0])


def test_a_block_of_other_shapes_is_refused():
    block, alone = block_of(np.random.default_rng(0), 2)
    total = Accumulator(Wire.of(alone[0], 1, True), np.full(7, 2.0**12), 2, 0)
    with pytest.raises(ValueError, match="must not depend on the data"):
        total.add_block([0, 1], block._replace(update=block.update | {"a": torch.ones(2, 8)}))


# --- what is captured -------------------------------------------------------------------------------------


class Counted:
    """A Capture that counts what it records."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, function):
        self.recordings += 1
        again = recorded(function)

        def replay():
            self.replays += 1
            again()

        return replay


def test_a_work_is_recorded_once_for_all_rounds_and_replayed_for_every_step(monkeypatch):
    capture = Counted()
    monkeypatch.setattr(host_module, "as_cuda_graph", capture)
    model = model_of("mlp")
    run = lambda engine: Rounds(engine, ALGORITHMS["fedavg"](model), data_for("mlp"), model, rounds=3)  # noqa: E731
    found, expected = run(Engine("graph", clients_at_once=3)), run(Engine("serial"))
    assert_same_rounds(found, expected)
    # Blocks of clients with 5, 3, 1 and with 1, 1 steps; each is also started and finished.
    assert (capture.recordings, capture.replays) == (3, 3 * (5 + 2 + 1 + 2))


def test_a_cohort_of_another_size_is_recorded_for_itself():
    model, dataset = model_of("mlp"), data_for("mlp")
    algorithm = ALGORITHMS["scaffold"](model)
    shared = {"theta": model.init(0), "control": model.init(1), "lr": torch.tensor(0.1)}
    hosts = [Rounds(Engine(name), algorithm, dataset, model, rounds=0) for name in ("graph", "serial")]
    for ids in (np.arange(6), np.arange(2), np.arange(6)):
        found, expected = (one.fleet.ask(algorithm.works[0], ids, None, shared) for one in hosts)
        assert_alike(found.update, expected.update)


def test_a_carry_that_changes_places_or_comes_from_shared_is_repeated_as_it_was():
    def step(shared, clients, carry, batch):
        return {
            "a": carry["b"],
            "b": carry["a"],
            "e": carry["c"][1:],
            "c": carry["c"].add_(shared["step"]),
            "d": carry["c"] * batch["x"],
        }

    def start(shared, clients):
        return {"a": shared["a"], "b": shared["b"], "c": torch.zeros(2), "d": torch.zeros(2), "e": torch.zeros(1)}

    work = ClientWork(start, step, lambda shared, clients, carry: Upload(carry, clients.n), BATCHES)
    clients = Client(*[torch.ones(2)] * 3, {}, torch.ones(2), {}, {})
    for capture in (recorded, lambda function: function):
        replayed = captured(work, trees(0), clients, {"x": torch.ones(2)}, capture)
        for first in (10.0, 20.0):
            shared, expected = trees(first), work.start(trees(first), clients)
            carry = replayed.start(shared, clients)
            for number in range(3):
                batch = {"x": torch.full((2,), 1.0 + number)}
                carry = replayed.step(shared, clients, carry, batch)
                expected = work.step(shared, clients, expected, batch)
                assert_alike(carry, expected, most=0)
            assert_alike(replayed.finish(shared, clients, carry).update, expected, most=0)
            assert_alike(shared, trees(first), most=0)


def trees(first):
    return {"a": torch.full((2,), first), "b": torch.full((2,), first + 1), "step": torch.tensor(first)}


def test_a_carry_that_does_not_keep_its_shape_is_not_captured():
    work = scoring(model_of("mlp"), {}, "train", "client")
    grown = ClientWork(lambda *of: {"n": {}}, lambda *of: {"n": {"x": torch.ones(2)}}, work.finish, BATCHES)
    assert captured(grown, {}, Client(*[torch.ones(2)] * 3, {}, torch.ones(2), {}, {}), {}, recorded) is grown


def test_what_cannot_be_captured_is_called_and_told(monkeypatch):
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(host_module, "as_cuda_graph", refuse)
    model = model_of("mlp")
    found = Rounds(Engine("graph", clients_at_once=3), ALGORITHMS["fedavg"](model), data_for("mlp"), model)
    assert_same_rounds(found, serial("mlp", "fedavg"))
    (line,) = found.lines
    assert line.endswith("one cannot be captured (operation not permitted when stream is capturing)")


# --- smaller numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["serial", "batched"])
def test_bfloat16_gradients_are_near_and_their_vectors_and_scores_float32(engine):
    features = features_of("mlp")
    model = from_module(lambda: construct(MODELS["mlp"], {"hidden": [9]}, "mlp", features=features))
    run = lambda: Rounds(Engine(engine), fedavg(model, BATCHES, sgd(0.1)), data_for("mlp"), model).sums[0]  # noqa: E731
    batch = {"x": torch.ones(2, 6), "y": torch.zeros(2, dtype=torch.int64)}
    scores, exact = model.scores(model.init(0), batch), run().update["pseudo_grad"]
    train_in(model, torch.bfloat16)
    rough = run().update["pseudo_grad"]
    assert torch.equal(model.scores(model.init(0), batch), scores)
    assert model.grad_and_loss(model.init(0), batch | {"index": torch.arange(2)})[0].dtype == torch.float32
    away = float((rough - exact).norm() / exact.norm())
    assert 1e-4 < away < 2e-2, "8 bits are a relative error of 2e-3 a product"


def test_the_job_says_what_products_are_computed_in(tmp_path):
    found = {}
    for dtype in ("bf16", "tf32", "float32"):
        job = {"rounds": 1, "data": {"path": "parts:awkward_dataset"}, "model": {"name": "mlp"}}
        job |= {"algorithm": {"name": "fedavg"}, "engine": {"dtype": dtype}, "run": {"out": str(tmp_path / dtype)}}
        summary = mpifl.run(job)
        settings = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        assert settings == (("high", True) if dtype == "tf32" else ("highest", False))
        found[dtype] = summary["loss"]
    assert found["tf32"] == pytest.approx(found["float32"], rel=1e-5)
    assert 0 < abs(found["bf16"] / found["float32"] - 1) < 0.01


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"name": "graph"}, 'engine.name is "graph", which needs run.device = "cuda"'),
        ({"name": "batched", "check": True}, 'engine.check watches clients one by one; .* is "serial", not "batched"'),
        ({"clients_at_once": -1}, "engine.clients_at_once is -1; it must be at least 0"),
    ],
)
def test_engines_that_a_job_cannot_have(engine, message, tmp_path):
    job = {"rounds": 1, "model": {"name": "mlp"}, "algorithm": {"name": "fedavg"}, "run": {"out": str(tmp_path / "x")}}
    with pytest.raises(UserError, match=message):
        mpifl.run(job | {"engine": engine})
