"""Models as functions of one flat vector: gradients are plain torch's, whichever path computes them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quadratics import simulate
from torch import nn
from torch.func import grad, vmap

from mpifl.algorithms.fedavg import fedavg
from mpifl.config import UserError
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Feature
from mpifl.model import Model, from_module, masked_mean, refuse_changing_buffers, rows_of
from mpifl.models.cnn import EmnistConv, emnist_conv
from mpifl.models.linear import logistic, mlp
from mpifl.optim import adam, sgd
from mpifl.rand import as_tensor, dropout, fold
from mpifl.work import Batching

IMAGES = {"x": Feature("uint8", (28, 28), mean=0.0, std=255.0), "y": Feature("uint8", (), classes=62)}


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, with a buffer and a frozen layer between."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("scale", torch.full((6,), 0.5))

    def forward(self, x):
        return self.decoder(torch.tanh(self.frozen(self.encoder(x)))) * self.scale


class Unused(nn.Module):
    """Holds a layer that its forward does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


class Keyed(nn.Module):
    """Dropout by key, in two places."""

    def forward(self, x, key=None):
        return dropout(dropout(self.linear(x), 0.5, key, salt=0), 0.5, key, salt=1)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 100)


class Mixed(Keyed):
    """Dropout by key, and a foreign one."""

    def forward(self, x, key=None):
        return F.dropout(super().forward(x, key), 0.5, self.training)


FOREIGN = {
    "nn.Dropout": lambda: nn.Sequential(nn.Linear(6, 100), nn.Dropout(0.5)),
    "F.dropout": lambda: Mixed(),
    "keyed": lambda: Keyed(),
}
PLAIN = lambda scores, batch: scores  # noqa: E731
SQUARE = lambda scores, batch: scores.flatten(1).square().sum(dim=1)  # noqa: E731


def small(x=5, classes=3):
    return {"x": Feature("float32", (x,)), "y": Feature("int64", (), classes=classes)}


CASES = {
    "logistic": (lambda: logistic(small()), (5,), 3),
    "mlp": (lambda: mlp(small(), (8, 7)), (5,), 3),
    "emnist_conv": (lambda: emnist_conv(IMAGES), (28, 28), 62),
    "tied, frozen, buffer": (Tied, (6,), 6),
    "unused": (Unused, (6,), 4),
    "one parameter": (lambda: nn.Linear(6, 4, bias=False), (6,), 4),
}


def batch_of(shape, classes, rows=4, seed=0, **reserved):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *shape, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    return {"x": x, "y": y, "index": torch.arange(rows), **reserved}


def by_hand(factory, theta, batch):
    """Scores, loss and flat gradient from a plain module, a plain backward and no mpifl."""
    module = factory()
    trainable = [p for p in module.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frozen = {n: p for n, p in factory().named_parameters() if not p.requires_grad}
    module.load_state_dict(frozen, strict=False)
    torch.nn.utils.vector_to_parameters(theta.clone(), trainable)
    scores = module(batch["x"])
    loss = F.cross_entropy(scores, batch["y"])
    loss.backward()
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
    return scores.detach(), loss.detach(), torch.cat([g.flatten() for g in flat])


# --- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_scores_losses_and_gradients_are_plain_torchs(case):
    factory, shape, classes = CASES[case]
    model, batch = from_module(factory), batch_of(shape, classes)
    theta = model.init(3)
    scores, loss, gradient = by_hand(factory, theta, batch)
    torch.testing.assert_close(model.scores(theta, batch), scores)
    torch.testing.assert_close(model.losses(theta, batch).mean(), loss)
    found, mean = model.grad_and_loss(theta, batch)
    torch.testing.assert_close(mean, loss)
    torch.testing.assert_close(found, gradient)
    assert found.shape == theta.shape == (model.size,)


@pytest.mark.parametrize("case", CASES)
def test_the_functional_path_is_the_bound_path(case):
    factory, shape, classes = CASES[case]
    model, batch = from_module(factory), batch_of(shape, classes, key=as_tensor(5))
    theta = model.init(3)
    expected, loss = model.grad_and_loss(theta, batch)
    torch.testing.assert_close(grad(model.mean_loss)(theta, batch), expected)
    torch.testing.assert_close(model.mean_loss(theta.clone().requires_grad_(), batch).detach(), loss)
    thetas = torch.stack([theta, 2 * theta])
    together, losses = vmap(model.grad_and_loss, (0, None))(thetas, batch)
    torch.testing.assert_close(together[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[0], loss)
    torch.testing.assert_close(together[1], model.grad_and_loss(2 * theta, batch)[0], rtol=1e-4, atol=1e-5)


def test_one_theta_for_clients_with_batches_of_their_own_under_vmap():
    model = from_module(CASES["mlp"][0])
    theta, rows = model.init(0), [batch_of((5,), 3, seed=s) for s in range(3)]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    together, _ = vmap(model.grad_and_loss, (None, 0))(theta, stacked)
    for row, found in zip(rows, together):
        torch.testing.assert_close(found, model.grad_and_loss(theta, row)[0])


def test_two_gradients_are_two_vectors_that_may_be_written_to():
    model, batch = from_module(CASES["mlp"][0]), batch_of((5,), 3)
    theta, other = model.init(0), model.init(1)
    first, _ = model.grad_and_loss(theta, batch)
    before = first.clone()
    second, _ = model.grad_and_loss(other, batch)
    assert torch.equal(first, before) and not torch.equal(first, second)
    second.add_(1.0)
    assert torch.equal(model.grad_and_loss(theta, batch)[0], before)
    assert torch.equal(first, before)


def test_the_gradient_of_a_plain_function_of_theta_may_be_written_to_as_well():
    rows = {"x": torch.ones(2, 3), "index": torch.arange(2)}
    model = Model(3, lambda seed: torch.zeros(3), lambda theta, batch: theta.sum() + batch["x"][:, 0], PLAIN)
    gradient, _ = model.grad_and_loss(torch.zeros(3), rows)
    gradient.add_(torch.arange(3.0))  # the gradient of a sum is one number, broadcast
    assert gradient.tolist() == [1.0, 2.0, 3.0]


def test_moving_theta_in_place_is_seen_and_so_is_another_vector_at_another_address():
    model, batch = from_module(CASES["mlp"][0]), batch_of((5,), 3)
    theta = model.init(0)
    model.grad_and_loss(theta, batch)
    theta.mul_(2.0)
    other = model.init(5)
    expected = [by_hand(CASES["mlp"][0], t, batch)[2] for t in (theta, other)]
    for t, gradient in [(theta, expected[0]), (other, expected[1]), (theta, expected[0])]:
        torch.testing.assert_close(model.grad_and_loss(t, batch)[0], gradient)


def test_short_lived_vectors_never_take_each_others_place():
    model, batch = from_module(CASES["mlp"][0]), batch_of((5,), 3)
    for seed in range(30):
        found = model.scores(model.init(seed), batch)  # freed at once: its address may come again
        torch.testing.assert_close(found, by_hand(CASES["mlp"][0], model.init(seed), batch)[0])


def test_rows_of_one_matrix_are_bound_one_by_one():
    model, batch = from_module(CASES["mlp"][0]), batch_of((5,), 3)
    thetas = torch.stack([model.init(s) for s in range(4)])
    for row in (*thetas.unbind(), *reversed(thetas.unbind())):
        torch.testing.assert_close(model.scores(row, batch), by_hand(CASES["mlp"][0], row, batch)[0])


# --- batches ---------------------------------------------------------------------------------------------


def test_masked_rows_count_neither_in_the_loss_nor_in_the_gradient():
    model = from_module(CASES["mlp"][0])
    theta, full = model.init(0), batch_of((5,), 3, rows=6)
    kept = {name: leaf[:4] for name, leaf in full.items()}
    padded = full | {"mask": torch.tensor([True] * 4 + [False] * 2)}
    padded["x"] = full["x"].clone()
    padded["x"][4:] = math.inf
    found = model.grad_and_loss(theta, full | {"mask": padded["mask"]})
    torch.testing.assert_close(found, model.grad_and_loss(theta, kept))
    torch.testing.assert_close(model.mean_loss(theta, padded), model.mean_loss(theta, kept))
    assert int(rows_of(padded)) == 4 and rows_of(kept) == 4


def test_a_batch_of_padding_alone_has_loss_and_gradient_zero():
    model = from_module(CASES["mlp"][0])
    batch = batch_of((5,), 3, mask=torch.zeros(4, dtype=torch.bool))
    gradient, loss = model.grad_and_loss(model.init(0), batch)
    assert float(loss) == 0.0 and not gradient.any()
    assert float(masked_mean(torch.tensor([math.nan] * 4), batch)) == 0.0


# --- dropout ---------------------------------------------------------------------------------------------


def zeros_of(model, key, seed=0):
    theta, batch = model.init(0), batch_of((6,), 100, rows=50, seed=seed)
    return model.scores(theta, batch | ({} if key is None else {"key": as_tensor(key)})) == 0


@pytest.mark.parametrize("kind", FOREIGN)
def test_dropout_is_a_function_of_the_steps_key_and_off_in_evaluation(kind):
    model = from_module(FOREIGN[kind], SQUARE)
    first, again, other = zeros_of(model, 1), zeros_of(model, 1), zeros_of(model, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not zeros_of(model, None).any()
    assert torch.equal(first, zeros_of(model, 1)), "evaluation in between changes nothing"
    expected = {"nn.Dropout": 0.5, "keyed": 0.75, "F.dropout": 0.875}[kind]
    assert abs(float(first.double().mean()) - expected) < 0.03
    assert abs(float((first == other).double().mean()) - expected**2 - (1 - expected) ** 2) < 0.03


@pytest.mark.parametrize("kind", FOREIGN)
def test_dropout_does_not_depend_on_the_state_of_torchs_generator(kind):
    model = from_module(FOREIGN[kind], SQUARE)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(seed)
        found.append(zeros_of(model, 7))
    assert torch.equal(*found)


@pytest.mark.parametrize("key", [-(2**63), -1, 0, 2**63 - 1])
def test_any_64_bit_key_seeds_foreign_dropout(key):
    model = from_module(FOREIGN["nn.Dropout"], SQUARE)
    batch = batch_of((6,), 100, key=torch.tensor(key))
    model.grad_and_loss(model.init(0), batch)


def test_loss_and_gradient_of_a_step_share_one_mask():
    model = from_module(FOREIGN["nn.Dropout"], SQUARE)
    batch, theta = batch_of((6,), 100, key=as_tensor(3)), model.init(0)
    gradient, loss = model.grad_and_loss(theta, batch)
    moved = theta + 1e-3 * gradient / gradient.norm()
    torch.testing.assert_close(model.mean_loss(moved, batch) - loss, 1e-3 * gradient.norm(), rtol=0.02, atol=0)


def test_initial_vectors_are_functions_of_the_seed_and_leave_the_generator_alone():
    model = from_module(CASES["mlp"][0])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = model.init(1), model.init(1), model.init(fold(0, "init"))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    plain = torch.cat([p.detach().flatten() for p in CASES["mlp"][0]().parameters()])
    assert torch.equal(first, plain)


# --- what is refused -------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its training forwards in a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.linear(x)


class RunningMean(nn.Module):
    """Keeps a running mean of its inputs, from zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(dim=0), 0.1)
        return x - self.mean


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(8, track_running_stats=True)],
)
def test_norms_with_running_statistics_are_refused_by_path_with_a_remedy(norm):
    factory = lambda: nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), norm))  # noqa: E731
    with pytest.raises(UserError, match=r"Norm\w* at '1\.1'.*use GroupNorm or LayerNorm"):
        from_module(factory)


def test_batch_norm_without_running_statistics_works():
    factory = lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))  # noqa: E731
    model = from_module(factory)
    refuse_changing_buffers(factory, batch_of((6,), 3))
    assert model.grad_and_loss(model.init(0), batch_of((6,), 3))[0].any()


@pytest.mark.parametrize(
    ("factory", "path"),
    [
        (lambda: nn.Sequential(nn.Identity(), nn.Sequential(Counting())), "1.0"),
        (lambda: nn.Sequential(RunningMean(), nn.Linear(6, 3)), "0"),
        (Counting, "seen"),
    ],
)
def test_any_module_whose_buffer_changes_in_training_is_refused_by_its_path(factory, path):
    blank = {"x": torch.zeros(2, 6), "key": as_tensor(0)}  # what is known of a dataset without reading it
    with pytest.raises(UserError, match=f"at '{path}'.*use GroupNorm or LayerNorm"):
        refuse_changing_buffers(factory, blank)


def test_constant_buffers_are_not_refused():
    refuse_changing_buffers(Tied, batch_of((6,), 6))
    refuse_changing_buffers(lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), batch_of((6,), 6))
    refuse_changing_buffers(Keyed, batch_of((6,), 6, key=as_tensor(1)))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: torch.zeros(3), "must return an nn.Module, got Tensor"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.Linear(2, 2).bfloat16(), "trains parameters of torch.bfloat16; theta is float32"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()),
            "trains parameters of torch.float32, torch.float64; theta is float32",
        ),
    ],
)
def test_what_cannot_be_one_flat_vector_is_refused(factory, message):
    with pytest.raises(UserError, match=message):
        from_module(factory)


# --- export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_exported_state_loads_into_a_plain_module_and_scores_the_same(case):
    factory, shape, classes = CASES[case]
    model, batch = from_module(factory), batch_of(shape, classes)
    theta = model.init(9)
    exported = model.state_dict(theta)
    module = factory().eval()
    module.load_state_dict(exported, strict=True)
    torch.testing.assert_close(module(batch["x"]).detach(), model.scores(theta, batch), rtol=0, atol=0)


def test_exported_tensors_are_copies_each_in_storage_of_its_own():
    model = from_module(Tied)
    theta = model.init(0)
    exported = model.state_dict(theta)
    assert len({tensor.untyped_storage().data_ptr() for tensor in exported.values()}) == len(exported)
    before = exported["encoder.weight"].clone()
    theta.zero_()
    assert torch.equal(exported["encoder.weight"], before)


def test_tied_weights_count_once_and_frozen_ones_not_at_all():
    model = from_module(Tied)
    assert model.size == 36
    frozen = model.state_dict(model.init(0))["frozen.weight"]
    run = simulate(fedavg(from_module(Tied), Batching(size=2), sgd(0.1)), tied_dataset(), 2, model=model)
    after = model.state_dict(run.state["theta"])
    assert torch.equal(after["frozen.weight"], frozen)
    assert torch.equal(after["encoder.weight"], after["decoder.weight"])
    assert not torch.equal(after["encoder.weight"], model.state_dict(model.init(fold(0, "init")))["encoder.weight"])


def tied_dataset():
    rows = [batch_of((6,), 6, rows=4, seed=s) for s in range(3)]
    return MemoryDataset([{"x": row["x"].numpy(), "y": row["y"].numpy()} for row in rows])


def test_sizes_are_the_published_ones():
    assert from_module(lambda: emnist_conv(IMAGES)).size == 1_206_590
    assert from_module(lambda: EmnistConv(10)).size == 1_206_590 - 52 * 129
    assert from_module(lambda: mlp(IMAGES)).size == 209_662  # 784-200-200-62
    assert from_module(lambda: logistic(IMAGES)).size == 785 * 62


def test_emnist_conv_drops_out_by_key_at_its_rates():
    model = from_module(lambda: emnist_conv(IMAGES))
    theta, batch = model.init(0), batch_of((28, 28), 62)
    scores = [model.scores(theta, batch | {"key": as_tensor(k)}) for k in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], model.scores(theta, batch))


# --- somebody else's model -------------------------------------------------------------------------------


def tiny_transformer():
    """A two-layer BERT classifier from a config, as a module from token ids to scores."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf (transformers)")
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=2,
    )

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertForSequenceClassification(config)

        def forward(self, tokens):
            return self.bert(input_ids=tokens).logits

    return Scores


def test_a_transformers_model_made_from_a_config_trains_through_the_contracts():
    factory = tiny_transformer()
    rng = np.random.default_rng(0)
    clients = []
    for n in (12, 5, 0, 20):
        tokens = rng.integers(12, size=(n, 6))
        clients.append({"tokens": tokens, "y": (tokens[:, 0] > 5).astype(np.int64)})
    model = from_module(factory, inputs="tokens")
    refuse_changing_buffers(factory, {"tokens": torch.zeros(2, 6, dtype=torch.int64)}, inputs="tokens")
    algorithm = fedavg(model, Batching(size=5, epochs=2), adam(5e-3))
    whole = {name: torch.from_numpy(np.concatenate([c[name] for c in clients])) for name in clients[0]}

    def train():
        return simulate(algorithm, MemoryDataset(clients), 4, model=model).state["theta"]

    first = train()
    losses = [float(model.losses(theta, whole).mean()) for theta in (model.init(fold(0, "init")), first)]
    assert losses[1] < 0.8 * losses[0]
    torch.manual_seed(99)
    assert torch.equal(train(), first), "its own dropout must come from the keys"
