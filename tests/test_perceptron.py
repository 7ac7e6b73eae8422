"""The hand-written step of plain perceptrons is autograd's, and only plain perceptrons take it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

from mpifl import perceptron
from mpifl.model import cross_entropy, from_module
from mpifl.optim import adam, momentum, sgd
from mpifl.rand import as_tensor


def net(*widths, flatten=True):
    layers = [nn.Flatten()] if flatten else []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


PLAIN = {
    "logistic": (lambda: net(12, 5), (3, 4)),
    "one hidden": (lambda: net(12, 7, 5), (3, 4)),
    "three hidden": (lambda: net(12, 7, 9, 6, 5), (12,)),
    "without Flatten": (lambda: net(12, 7, 5, flatten=False), (12,)),
}


def batch_of(shape, rows=6, mask=None):
    generator = torch.Generator().manual_seed(rows)
    batch = {"x": torch.randn(rows, *shape, generator=generator), "index": torch.arange(rows), "key": as_tensor(3)}
    batch["y"] = torch.randint(5, (rows,), generator=generator)
    return batch if mask is None else batch | {"mask": torch.tensor(mask)}


@pytest.mark.parametrize("mask", [None, [True] * 6, [True, False, True, True, False, False], [False] * 6])
@pytest.mark.parametrize("case", PLAIN)
def test_a_step_subtracts_autograds_gradient(case, mask):
    factory, shape = PLAIN[case]
    model, batch, lr = from_module(factory), batch_of(shape, mask=mask), torch.tensor(0.3)
    assert perceptron.is_plain(model.module)
    for seed in range(3):
        theta = model.init(seed)
        gradient, loss = model.grad_and_loss(theta, batch)
        expected = theta - lr * gradient
        moved, found = model.descend(theta, batch, lr)
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, loss)
        assert moved.data_ptr() == theta.data_ptr()


def test_a_unit_at_exactly_zero_passes_no_gradient():
    module = net(2, 2, 2, flatten=False)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), [[[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0], torch.eye(2), [0, 0]]):
            parameter.copy_(torch.as_tensor(value))
    x, y = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    grads = torch.autograd.grad(F.cross_entropy(module(x), y), list(module.parameters()))
    expected = [p.detach() - g for p, g in zip(module.parameters(), grads)]
    layers = [(part.weight.detach(), part.bias.detach()) for part in (module[0], module[2])]
    perceptron.descend(layers, x, y, None, 1.0)
    torch.testing.assert_close([p.detach() for p in module.parameters()], expected)


@pytest.mark.parametrize("factory", [lambda: net(12, 7, 5), lambda: nn.Sequential(nn.Flatten(), Tanh())])
def test_under_vmap_every_client_descends_as_alone(factory):
    model, batch, lr = from_module(factory), batch_of((3, 4)), torch.tensor(0.3)
    thetas = torch.stack([model.init(seed) for seed in range(3)])
    expected = [model.descend(theta.clone(), batch, lr) for theta in thetas]
    moved, losses = vmap(model.descend, (0, None, None))(thetas.clone(), batch, lr)
    torch.testing.assert_close(moved, torch.stack([theta for theta, _ in expected]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in expected]))


class Tanh(nn.Module):
    """No perceptron of ours, and one parameter that it does not use."""

    def __init__(self):
        super().__init__()
        self.last, self.idle = nn.Linear(12, 5), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.tanh(self.last(x))


def test_any_other_module_descends_by_its_gradient():
    model, batch, lr = from_module(lambda: nn.Sequential(nn.Flatten(), Tanh())), batch_of((3, 4)), torch.tensor(0.3)
    theta = model.init(0)
    gradient, loss = model.grad_and_loss(theta, batch)
    expected = theta - lr * gradient
    moved, found = model.descend(theta, batch, lr)
    torch.testing.assert_close(moved, expected)
    assert found == loss and torch.equal(moved[:3], torch.ones(3))


def tied():
    one = nn.Linear(4, 4)
    return nn.Sequential(one, nn.ReLU(), one)


def frozen():
    module = net(4, 4, 4)
    module[1].bias.requires_grad_(False)
    return module


def hooked():
    module = net(4, 4)
    module[1].register_forward_hook(lambda part, inputs, output: 2 * output)
    return module


class Doubled(nn.Linear):
    """A Linear that is not one."""

    def forward(self, x):
        return 2 * super().forward(x)


OTHERS = {
    "another activation": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
    "an activation at the end": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    "no bias": lambda: nn.Sequential(nn.Linear(4, 4, bias=False)),
    "tied": tied,
    "frozen": frozen,
    "hooked": hooked,
    "a subclass": lambda: nn.Sequential(Doubled(4, 4)),
    "partly flattened": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(4, 4)),
    "nothing": nn.Sequential,
    "no Sequential": lambda: nn.Linear(4, 4),
    "a Sequential of its own": lambda: type("Own", (nn.Sequential,), {})(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_only_plain_perceptrons_are_recognised(case):
    assert not perceptron.is_plain(OTHERS[case]())


@pytest.mark.parametrize("kind", ["loss", "images"])
def test_a_loss_or_a_treatment_of_its_own_is_not_left_out(kind):
    twice = lambda scores, batch: 2 * cross_entropy(scores, batch)  # noqa: E731
    options = {"loss": twice} if kind == "loss" else {"images": lambda x, batch: 2 * x}
    model, batch, lr = from_module(lambda: net(12, 7, 5), **options), batch_of((3, 4)), torch.tensor(0.1)
    theta = model.init(0)
    expected = theta - lr * model.grad_and_loss(theta, batch)[0]
    torch.testing.assert_close(model.descend(theta, batch, lr)[0], expected)


def test_plain_sgd_is_told_from_all_else():
    assert sgd(0.1).plain
    others = [sgd(0.1, weight_decay=0.1), sgd(0.1, clip_norm=1.0), momentum(0.1), adam(0.1)]
    assert not any(optimizer.plain for optimizer in others)
