"""The networks that come with mpifl: sizes by arithmetic, what each score may depend on, and plain torch's sums."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from mpifl.config import UserError
from mpifl.data.shard import Feature
from mpifl.model import from_module, token_cross_entropy
from mpifl.models import cnn, resnet
from mpifl.models import transformer as transformers
from mpifl.models.cnn import cifar_cnn, emnist_conv
from mpifl.models.images import SALT
from mpifl.models.linear import logistic, mlp
from mpifl.models.lstm import char_lstm, word_lstm
from mpifl.models.resnet import ResNet18, resnet18
from mpifl.models.transformer import Transformer, sinusoids, transformer
from mpifl.rand import as_tensor, fold


def images(shape, classes):
    return {"x": Feature("uint8", shape, mean=0.0, std=255.0), "y": Feature("uint8", (), classes=classes)}


def tokens(vocabulary, length=20):
    column = Feature("int64", (length,), classes=vocabulary, pad=0)
    return {"x": column, "y": column}


def size(factory, features, **options):
    return from_module(lambda: factory(features, **options)).size


# --- sizes -----------------------------------------------------------------------------------------------


def small_conv(channels, side, classes):
    pooled = 64 * ((side - 4) // 2) ** 2
    return (9 * channels + 1) * 32 + (9 * 32 + 1) * 64 + (pooled + 1) * 128 + 129 * classes


@pytest.mark.parametrize(
    ("factory", "features", "known"),
    [
        (emnist_conv, images((28, 28), 62), 1_206_590),
        (emnist_conv, images((28, 28), 10), 1_199_882),
        (mlp, images((28, 28), 62), 209_662),
        (logistic, images((28, 28), 62), 48_670),
        (logistic, images((3, 24, 24), 100), 172_900),
        (cifar_cnn, images((3, 32, 32), 10), 1_626_442),
        (char_lstm, tokens(90, 80), 822_570),
        (word_lstm, tokens(10_004), 4_053_428),
        (transformer, tokens(10_004), 1_962_912),
        (resnet18, images((3, 32, 32), 100), 11_227_812),
    ],
)
def test_models_have_the_published_number_of_parameters(factory, features, known):
    assert size(factory, features) == known


def test_small_convolutional_nets_of_other_sizes_follow_from_their_layers():
    assert small_conv(1, 28, 62) == 1_206_590 and small_conv(3, 32, 10) == 1_626_442
    assert size(cifar_cnn, images((3, 24, 24), 100)) == small_conv(3, 24, 100)
    assert size(cifar_cnn, images((28, 28), 62)) == small_conv(1, 28, 62)
    assert size(cifar_cnn, images((1, 6, 10), 2)) == small_conv(1, 28, 2) - 64 * (144 - 1 * 3) * 128


def test_the_stem_is_what_two_resnets_differ_by():
    seven, three = 7 * 7 * 3 * 64, 3 * 3 * 3 * 64  # neither has a bias; a max-pool has no parameter
    assert size(resnet18, images((3, 32, 32), 100), stem=3) == 11_227_812 - seven + three == 11_220_132


def lstm(inputs, hidden, biases):
    return 4 * hidden * (inputs + hidden) + biases * 4 * hidden


def test_recurrent_nets_are_a_bias_per_gate_larger_than_fedjaxs():
    def char(biases):
        return 90 * 8 + lstm(8, 256, biases) + lstm(256, 256, biases) + 257 * 90

    def word(biases, tied):
        return 10_004 * 96 * (1 if tied else 2) + 10_004 + lstm(96, 670, biases) + 671 * 96

    assert (char(1), char(2)) == (820_522, 822_570)
    assert (word(1, False), word(2, False), word(1, True)) == (4_050_748, 4_053_428, 3_090_364)
    assert size(word_lstm, tokens(10_004), tied=True) == word(2, True) == 3_093_044
    assert size(char_lstm, tokens(50), embedding=4, hidden=6, layers=1) == 50 * 4 + lstm(4, 6, 2) + 7 * 50


def test_the_transformer_is_its_embedding_and_three_blocks_and_nothing_else():
    attention = 4 * (96 * 96 + 96)  # queries, keys, values, output, each with a bias
    feedforward = (96 * 1536 + 1536) + (1536 * 96 + 96)
    norms = 2 * (96 + 96)
    # no bias of the tied output, no learned positions, no norm after the last block
    assert 10_004 * 96 + 3 * (attention + feedforward + norms) == 1_962_912


# --- what a score may depend on --------------------------------------------------------------------------

LANGUAGE = {
    "char_lstm": lambda: char_lstm(tokens(11, 9), hidden=12),
    "word_lstm": lambda: word_lstm(tokens(11, 9), embedding=6, hidden=12),
    "word_lstm, tied": lambda: word_lstm(tokens(11, 9), embedding=6, hidden=12, tied=True),
    "transformer": lambda: transformer(tokens(11, 9), embedding=8, heads=2, feedforward=16, layers=2, dropout=0.3),
}
VISION = {
    "logistic": lambda: logistic(images((3, 10, 10), 5)),
    "mlp": lambda: mlp(images((3, 10, 10), 5)),
    "cifar_cnn": lambda: cifar_cnn(images((3, 10, 10), 5)),
    "resnet18, stem 3": lambda: resnet18(images((3, 10, 10), 5), stem=3),
    "resnet18, stem 7": lambda: resnet18(images((3, 10, 10), 5), stem=7, groups=4),
}
ALL = LANGUAGE | VISION


@pytest.fixture
def narrow(monkeypatch):
    """A residual net of 8 to 32 channels obeys the same laws 200 times as fast."""
    monkeypatch.setattr(resnet, "WIDTHS", (8, 16, 24, 32))


def batch_of(name, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name in LANGUAGE:
        x, y = torch.randint(1, 11, (2, rows, 9), generator=generator)
        y[0, 6:] = 0
    else:
        x, y = torch.randn(rows, 3, 10, 10, generator=generator), torch.randint(5, (rows,), generator=generator)
    return {"x": x, "y": y, "index": torch.arange(rows)}


def model_of(name):
    return from_module(ALL[name], token_cross_entropy) if name in LANGUAGE else from_module(ALL[name])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ALL)
def test_permuting_a_batch_permutes_its_scores_and_each_row_is_scored_as_if_alone(name):
    model, batch = model_of(name), batch_of(name)
    theta, order = model.init(3), torch.tensor([3, 0, 4, 1, 2])
    scores = model.scores(theta, batch)
    assert scores.shape == ((5, 9, 11) if name in LANGUAGE else (5, 5))
    assert float((scores[0] - scores[1]).abs().max()) > 1e-4, "alike rows prove nothing"
    permuted = model.scores(theta, batch | {"x": batch["x"][order]})
    torch.testing.assert_close(permuted, scores[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.scores(theta, batch | {"x": batch["x"][2:3]})[0], scores[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", [None, as_tensor(5)], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_token_changes_scores_from_its_place_on_and_none_before(name, key):
    model, batch = model_of(name), batch_of(name) | ({} if key is None else {"key": key})
    theta = model.init(3)
    scores = model.scores(theta, batch)
    for place in (0, 4, 8):
        x = batch["x"].clone()
        x[:, place] = x[:, place] % 10 + 1
        changed = (model.scores(theta, batch | {"x": x}) - scores).abs().amax(dim=(0, 2))
        assert torch.all(changed[:place] == 0) and torch.all(changed[place:] > 0)


@pytest.mark.parametrize("name", LANGUAGE)
def test_padding_at_the_end_changes_neither_scores_before_it_nor_loss_nor_gradient(name):
    model, batch = model_of(name), batch_of(name)
    theta = model.init(3)
    x, y = batch["x"].clone(), batch["y"].clone()
    x[:, 6:] = y[:, 6:] = 0
    short, padded = batch | {"x": x[:, :6], "y": y[:, :6]}, batch | {"x": x, "y": y}
    torch.testing.assert_close(model.scores(theta, padded)[:, :6], model.scores(theta, short), rtol=1e-5, atol=1e-6)
    for one, other in zip(model.grad_and_loss(theta, short), model.grad_and_loss(theta, padded)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("narrow")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # nn.LSTM has no rule for vmap: a loop over clients
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_plain_torchs_and_the_same_for_clients_together(name):
    model, batch = model_of(name), batch_of(name)
    thetas = torch.stack([model.init(seed) for seed in (1, 2)])
    keys = torch.stack([as_tensor(fold(7, client)) for client in (0, 1)])

    def one(theta, key):
        return model.grad_and_loss(theta, batch | {"key": key})

    together = vmap(one, randomness="error")(thetas, keys)
    for k in (0, 1):
        alone = one(thetas[k], keys[k])
        torch.testing.assert_close(alone[0], together[0][k], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(alone[1], together[1][k])
    module = ALL[name]()
    nn.utils.vector_to_parameters(thetas[0].clone(), module.parameters())
    loss = model.loss(module(batch["x"]), batch).mean()
    grads = torch.autograd.grad(loss, list(module.parameters()))
    mine = model.grad_and_loss(thetas[0], batch)
    torch.testing.assert_close(mine[0], nn.utils.parameters_to_vector(grads), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine[1], loss.detach())


@pytest.mark.usefixtures("narrow")
def test_dropout_is_keyed_where_a_model_has_it():
    for name, drops in {"cifar_cnn": True, "transformer": True, "char_lstm": False, "resnet18, stem 3": False}.items():
        model, batch = model_of(name), batch_of(name)
        theta = model.init(3)
        scores = [model.scores(theta, batch | {"key": as_tensor(key)}) for key in (1, 1, 2)]
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[0], scores[2]) != drops
        assert torch.equal(scores[0], model.scores(theta, batch)) != drops


@pytest.mark.parametrize(
    ("name", "rates"), [("cifar_cnn", [0.25, 0.5]), ("transformer", [0.3] * 5), ("emnist_conv", [0.25, 0.5])]
)
def test_each_dropout_draws_a_mask_of_its_own(monkeypatch, name, rates):
    drawn = []
    for module in (cnn, transformers):
        monkeypatch.setattr(module, "dropout", lambda x, rate, key, salt=0: drawn.append((rate, int(key), salt)) or x)
    known = ALL | {"emnist_conv": lambda: emnist_conv(images((28, 28), 5))}
    x = torch.zeros(2, 28, 28) if name == "emnist_conv" else batch_of(name)["x"]
    known[name]()(x, key=as_tensor(9))
    assert [rate for rate, _, _ in drawn] == rates
    assert {key for _, key, _ in drawn} == {9} and len({salt for _, _, salt in drawn}) == len(rates)
    assert all(salt != SALT for _, _, salt in drawn), "augmentation draws with the same key"


# --- what they compute -----------------------------------------------------------------------------------


def test_a_residual_net_keeps_no_statistics_and_norms_by_group():
    for stem in (3, 7):
        with torch.device("meta"):
            net = ResNet18(3, 100, stem)
        assert not list(net.buffers())
        kinds = [type(part).__name__ for part in net.modules() if "Norm" in type(part).__name__]
        assert kinds == ["GroupNorm"] * 20
        assert all(part.num_groups == 2 for part in net.modules() if isinstance(part, nn.GroupNorm))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("stem", "side", "left"), [(7, 64, 2), (3, 16, 2)])
def test_a_residual_net_halves_its_images_as_often_as_its_stem_says(stem, side, left):
    net = ResNet18(1, 4, stem).eval()
    shapes = []
    net.blocks.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    x = torch.randn(2, side, side)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net(x.unsqueeze(1)))
    assert shapes[0] == (2, 32, left, left)


@pytest.mark.usefixtures("narrow")
def test_a_residual_block_adds_its_input():
    block = ResNet18(1, 4, 3).blocks[1]
    for norm in (block.norm1, block.norm2):
        nn.init.zeros_(norm.weight)
    x = torch.rand(2, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_the_recurrence_is_the_papers_without_a_tanh_after_each_layer():
    net = char_lstm(tokens(11, 9), embedding=3, hidden=4).double()
    w = {name: p.detach().numpy() for name, p in net.named_parameters()}
    x = batch_of("char_lstm")["x"]
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    rows = w["embedding.weight"][x.numpy()]
    for layer in ("l0", "l1"):
        hidden = cell = np.zeros((5, 4))
        outputs = []
        for t in range(9):
            gates = rows[:, t] @ w[f"lstm.weight_ih_{layer}"].T + hidden @ w[f"lstm.weight_hh_{layer}"].T
            gates = gates + w[f"lstm.bias_ih_{layer}"] + w[f"lstm.bias_hh_{layer}"]
            i, f, g, o = np.split(gates, 4, axis=1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            outputs.append(hidden)
        rows = np.stack(outputs, axis=1)
    expected = rows @ w["out.weight"].T + w["out.bias"]
    np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=1e-9)


def test_the_transformer_is_torchs_own_encoder_with_a_causal_mask():
    ours = Transformer(vocabulary=11, length=9, embedding=8, heads=2, feedforward=16, layers=2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for block, other in zip(ours.blocks, theirs.layers):
        pairs = {
            block.queries_keys_values.weight: other.self_attn.in_proj_weight,
            block.queries_keys_values.bias: other.self_attn.in_proj_bias,
        }
        parts = [(block.out, other.self_attn.out_proj), (block.up, other.linear1), (block.down, other.linear2)]
        for mine, other_part in [*parts, (block.norm1, other.norm1), (block.norm2, other.norm2)]:
            pairs |= {mine.weight: other_part.weight, mine.bias: other_part.bias}
        with torch.no_grad():
            for mine, other_part in pairs.items():
                other_part.copy_(mine.normal_(0.0, 0.5))
    x = batch_of("transformer")["x"]
    inputs = F.embedding(x, ours.embedding.weight) * math.sqrt(8) + sinusoids(9, 8)
    hidden = theirs(inputs, mask=nn.Transformer.generate_square_subsequent_mask(9), is_causal=True)
    torch.testing.assert_close(ours(x), hidden @ ours.embedding.weight.T, rtol=1e-4, atol=1e-5)


def test_positions_are_the_papers_sines_and_cosines():
    table = sinusoids(40, 6).double()
    for position in (0, 1, 39):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    products = table @ table.T  # of two positions: a function of their distance
    torch.testing.assert_close(products[5, 12], products[30, 37], rtol=1e-5, atol=1e-5)
    assert sinusoids(4, 5).shape == (4, 5)


def test_a_tied_embedding_is_one_parameter_in_theta_and_two_names_in_what_is_exported():
    model = model_of("word_lstm, tied")
    theta = model.init(1)
    named = model.state_dict(theta)
    assert torch.equal(named["out.weight"], named["embedding.weight"])
    assert torch.equal(model.from_state_dict(named), theta)
    parameters = {name: p for name, p in named.items() if name != "out.weight"}
    scores = functional_call(LANGUAGE["word_lstm, tied"](), parameters, batch_of("word_lstm")["x"])
    torch.testing.assert_close(model.scores(theta, batch_of("word_lstm")), scores)


# --- the loss of sequences -------------------------------------------------------------------------------


def sequences():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, 6, 7, generator=generator)
    y = torch.randint(1, 7, (4, 6), generator=generator)
    y[0, 4:], y[1], y[2, 1] = 0, 0, 0  # padded, nothing but padding, a hole
    return scores, {"y": y, "index": torch.arange(4)}


def by_hand(scores, y, lengths):
    logs = np.log(np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True))
    return [-sum(logs[b, t, y[b, t]] for t in range(6) if y[b, t]) / lengths[b] for b in range(4)]


def test_a_sequences_loss_is_the_mean_over_its_tokens_and_0_without_any():
    scores, batch = sequences()
    found = token_cross_entropy(scores, batch)
    expected = by_hand(scores.double().numpy(), batch["y"].numpy(), [4, 1, 5, 6])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[1] == 0 and (found[[0, 2, 3]] > 0).all()


def test_with_an_expected_length_it_is_the_sum_over_tokens_divided_by_it():
    scores, batch = sequences()
    expected = by_hand(scores.double().numpy(), batch["y"].numpy(), [13.3] * 4)
    np.testing.assert_allclose(token_cross_entropy(scores, batch, expected_length=13.3), expected, rtol=1e-5)
    with pytest.raises(UserError, match=r"expected_length is 0; it must be positive"):
        token_cross_entropy(scores, batch, expected_length=0)


def test_padding_pulls_at_no_score_and_clients_losses_are_the_same_together():
    scores, batch = sequences()
    leaf = scores.clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_cross_entropy(leaf, batch).sum(), leaf)
    assert torch.equal(grad.abs().amax(dim=-1) > 0, batch["y"] != 0)
    together = vmap(lambda s, y: token_cross_entropy(s, {"y": y}))(scores.view(2, 2, 6, 7), batch["y"].view(2, 2, 6))
    torch.testing.assert_close(together.flatten(), token_cross_entropy(scores, batch))


# --- what they refuse ------------------------------------------------------------------------------------

WRONG = Feature("int64", (20,), classes=None)
IMAGE = images((3, 32, 32), 10)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: char_lstm(IMAGE), r"model char_lstm reads token ids: .* here it is uint8 \(3, 32, 32\), classes None"),
        (lambda: word_lstm({"x": WRONG}), r"model word_lstm reads token ids: .* int64 \(20,\), classes None"),
        (lambda: transformer(IMAGE), "model transformer reads token ids"),
        (lambda: char_lstm(tokens(9), hidden=0), "char_lstm hidden is 0; it must be at least 1"),
        (lambda: word_lstm(tokens(9), embedding=-1), "word_lstm embedding is -1; it must be at least 1"),
        (lambda: transformer(tokens(9), layers=0), "transformer layers is 0; it must be at least 1"),
        (lambda: transformer(tokens(9), heads=7), "transformer embedding is 96; it must be a multiple of its 7 heads"),
        (
            lambda: transformer(tokens(9), dropout=1.0),
            r"transformer dropout is 1\.0; it must be at least 0 and below 1",
        ),
        (lambda: cifar_cnn(tokens(9)), r"model cifar_cnn needs images .* at least 6x6, this dataset has \(20,\)"),
        (lambda: cifar_cnn(images((5, 8), 2)), r"at least 6x6, this dataset has \(5, 8\)"),
        (lambda: resnet18(IMAGE, stem=5), r"resnet18 stem is 5; it must be 7 \(large images\) or 3"),
        (lambda: resnet18(IMAGE, groups=3), "resnet18 groups is 3; it must divide the 64 channels"),
        (lambda: resnet18(IMAGE, groups=0), "resnet18 groups is 0; it must divide the 64 channels"),
        (lambda: resnet18(images((3, 4, 4), 2)), r"model resnet18 needs images .* at least 8x8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_value(make, line):
    with pytest.raises(UserError, match=line):
        make()
