"""Augmentation is each example's own and each key's own; evaluation sees the centre; the scale is TensorFlow's."""

import numpy as np
import pytest
import torch
from quadratics import MODEL
from torch.func import vmap

import mpifl
from mpifl.build import build
from mpifl.comm import Alone
from mpifl.config import UserError, load
from mpifl.data.memory import MemoryDataset
from mpifl.data.shard import Feature
from mpifl.models.images import Images, standardized
from mpifl.rand import as_tensor, fold

KEY = as_tensor(fold(3, "step", 0))


def numbered(rows, height, width, channels=3):
    """Images whose every pixel is unlike any other, from 1 on."""
    count = rows * channels * height * width
    return torch.arange(1, count + 1, dtype=torch.float32).view(rows, channels, height, width)


def batch_of(rows, key=KEY, first=0):
    return {"index": torch.arange(first, first + rows), "key": key}


def place_of(seen, image, pad):
    """(top, left, mirrored) of the only window of the padded image, (C, H, W), that gives `seen`; by trying all."""
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    height, width = seen.shape[-2:]
    found = [
        (top, left, mirrored)
        for top in range(padded.shape[-2] - height + 1)
        for left in range(padded.shape[-1] - width + 1)
        for mirrored in (False, True)
        if np.array_equal(padded[:, top : top + height, left : left + width][..., :: -1 if mirrored else 1], seen)
    ]
    assert len(found) == 1, f"{len(found)} windows give this image"
    return found[0]


def unlikely(values, choices):
    """Whether these draws are further from uniform over 0 .. choices - 1 than chance allows: six deviations."""
    counts = np.bincount(values, minlength=choices)
    assert len(counts) == choices
    expected, freedom = len(values) / choices, choices - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) > 6 * np.sqrt(2 * freedom)


# --- training --------------------------------------------------------------------------------------------


def test_every_example_is_a_window_of_its_padded_image_at_a_place_of_its_own():
    x = numbered(400, 6, 7)
    seen = Images(pad=2, crop=5, flip=True)(x, batch_of(400))
    places = np.array([place_of(one.numpy(), image, 2) for one, image in zip(seen, x)])
    for column, choices in enumerate((6 + 4 - 5 + 1, 7 + 4 - 5 + 1, 2)):
        assert not unlikely(places[:, column], choices)
    assert np.abs(np.corrcoef(places.T) - np.eye(3)).max() < 0.2  # six deviations: the choices are independent


@pytest.mark.parametrize(
    ("images", "sides", "varied"),
    [
        (Images(pad=1), (6, 7), [3, 3, 1]),
        (Images(crop=6), (6, 6), [1, 2, 1]),
        (Images(flip=True), (6, 7), [1, 1, 2]),
    ],
)
def test_each_option_does_what_it_says_and_nothing_else(images, sides, varied):
    x = numbered(60, 6, 7)
    seen = images(x, batch_of(60))
    assert seen.shape == (60, 3, *sides)
    places = [place_of(one.numpy(), image, images.pad) for one, image in zip(seen, x)]
    assert [len(set(column)) for column in zip(*places)] == varied


def test_an_example_is_augmented_alike_wherever_it_is_and_whoever_is_beside_it():
    images, x = Images(pad=4, crop=8, flip=True, standardize=True), numbered(20, 9, 9)
    together = images(x, batch_of(20))
    order = torch.tensor([7, 3, 19, 0])
    few = images(x[order], {"index": order, "key": KEY})
    torch.testing.assert_close(few, together[order])
    x[1:] = 0.0
    assert torch.equal(images(x, batch_of(20))[0], together[0])


@pytest.mark.parametrize("batch", [batch_of(50, as_tensor(fold(3, "step", 1))), batch_of(50, first=50)])
def test_another_step_or_another_example_gets_another_place(batch):
    x = numbered(1, 9, 9).expand(50, 3, 9, 9)  # one image, 50 times
    images = Images(pad=4, flip=True)
    one, other = images(x, batch_of(50)), images(x, batch)
    assert torch.equal(one, images(x, batch_of(50)))
    assert int((one == other).all(dim=(1, 2, 3)).sum()) <= 4  # one in 162 by chance


def test_images_without_channels_are_those_of_one_channel():
    images, x = Images(pad=2, crop=5, flip=True, standardize=True), numbered(30, 6, 7, channels=1)
    for batch in (batch_of(30), {}):
        assert torch.equal(images(x[:, 0], batch), images(x, batch)[:, 0])


def test_clients_together_get_what_they_get_alone_each_with_its_own_key():
    images = Images(pad=2, crop=5, flip=True, standardize=True)
    keys = torch.stack([as_tensor(fold(0, client)) for client in range(3)])
    index = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(c))[:4] for c in range(3)])
    for x in (numbered(12, 6, 7).view(3, 4, 3, 6, 7), numbered(12, 6, 7, 1).view(3, 4, 6, 7)):
        together = vmap(lambda x, index, key: images(x, {"index": index, "key": key}))(x, index, keys)
        for k in range(3):
            assert torch.equal(together[k], images(x[k], {"index": index[k], "key": keys[k]}))
        shared = vmap(lambda key, x=x: images(x[0], {"index": index[0], "key": key}))(keys)
        assert torch.equal(shared[0], together[0]) and not torch.equal(shared[0], shared[1])


def test_the_batch_is_left_as_it_was():
    x = numbered(3, 6, 7)
    for images in (Images(pad=1, flip=True, standardize=True), Images(standardize=True)):
        images(x, batch_of(3))
        images(x, {})
    assert torch.equal(x, numbered(3, 6, 7))


# --- evaluation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sides", "crop", "top", "left"), [((6, 8), 4, 1, 2), ((7, 6), 4, 1, 1), ((6, 6), 6, 0, 0)])
def test_evaluation_sees_the_centre_unpadded_and_unmirrored(sides, crop, top, left):
    x = numbered(4, *sides)
    seen = Images(pad=3, crop=crop, flip=True)(x, {"index": torch.arange(4)})
    assert torch.equal(seen, x[:, :, top : top + crop, left : left + crop])
    assert torch.equal(Images(pad=3, flip=True)(x, {}), x)


# --- scale -----------------------------------------------------------------------------------------------


def test_standardizing_is_tensorflows_formula_with_its_small_floor():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 1.0, size=(4, 3, 24, 24))  # N = 1728
    x[1] = x[1] * 5.0  # below FedJAX's floor of sqrt(1728) = 41.6: must be divided by 5
    x[2] = 7.0 + rng.normal(0.0, 1e-3, size=(3, 24, 24))  # below the true floor of 1 / 41.6
    x[3] = 7.0
    adjusted = np.maximum(x.std(axis=(1, 2, 3)), 1 / np.sqrt(1728))
    expected = (x - x.mean(axis=(1, 2, 3), keepdims=True)) / adjusted[:, None, None, None]
    found = standardized(torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert found[1].std() == pytest.approx(1, abs=1e-3) and found[2].std() == pytest.approx(0.0416, abs=1e-3)
    assert not found[3].any()


def test_what_is_standardized_is_what_the_net_sees():
    x = torch.zeros(1, 6, 6)
    x[0, 2:4, 2:4] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    seen = Images(crop=2, standardize=True)(x, {})
    torch.testing.assert_close(seen[0], (x[0, 2:4, 2:4] - 3.0) / 3.5**0.5)
    integers = torch.randint(256, (2, 4, 4))  # a column without mean and std
    torch.testing.assert_close(standardized(integers), standardized(integers.double().float()))


# --- in a job --------------------------------------------------------------------------------------------


def dataset():
    rng = np.random.default_rng(1)
    clients = [
        {"x": rng.integers(0, 256, (n, 3, 32, 32)).astype("uint8"), "y": np.arange(n).astype("uint8")}
        for n in (6, 3, 5)
    ]
    features = {
        "x": Feature("uint8", (3, 32, 32), mean=128.0, std=64.0),
        "y": Feature("uint8", (), classes=100),
        "flat": Feature("float32", (4,)),
    }
    return MemoryDataset(
        [one | {"flat": np.zeros((len(one["y"]), 4), "float32")} for one in clients], features=features
    )


def job(images, name="logistic", **model):
    own = {"path": "test_images:dataset"}
    table = {"rounds": 1, "data": own, "model": {"name": name, "images": images, **model}}
    return table | {"algorithm": {"name": "fedavg"}}


def test_the_net_is_built_for_and_fed_what_it_sees_in_training_and_in_evaluation():
    model = build(load(job({"crop": 24, "flip": True, "standardize": True}))).model
    assert model.size == 172_900
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batch, theta = {"x": x, "index": torch.arange(6), "y": torch.arange(6)}, model.init(1)
    weight, bias = theta[:172_800].view(100, 1728), theta[172_800:]
    for extra in ({}, {"key": KEY}):
        seen = Images(crop=24, flip=True, standardize=True)(x, batch | extra)
        torch.testing.assert_close(model.scores(theta, batch | extra), seen.flatten(1) @ weight.T + bias)
    one, other = (model.grad_and_loss(theta, batch | {"key": as_tensor(key)}) for key in (1, 2))
    assert not torch.equal(one[0], other[0])
    keys = torch.stack([as_tensor(1), as_tensor(2)])
    together = vmap(lambda key: model.grad_and_loss(theta, batch | {"key": key}))(keys)
    torch.testing.assert_close(together[0][1], other[0])


@pytest.mark.mpi(ranks=3, timeout=90)
def test_augmented_clients_give_the_same_bits_on_three_ranks_and_in_one_process(tmp_path):
    images = {"pad": 2, "crop": 24, "flip": True}
    world = mpifl.run(job(images), [f"run.out={tmp_path / 'world'}"])
    if world is None:
        return  # a host: rank 0 compares

    alone, unflipped = (
        mpifl.run(job(images | {"flip": flip}), [f"run.out={tmp_path / str(flip)}"], comm=Alone())
        for flip in (True, False)
    )
    assert world["ranks"] == 3 and world["digest"] == alone["digest"] != unflipped["digest"]


def own_model(features):
    return MODEL


@pytest.mark.parametrize(
    ("images", "model", "line"),
    [
        ({"crop": 33}, {}, "model.images.crop is 33; the images are 32x32, crop at most that"),
        ({"crop": 0}, {}, "model.images.crop is 0; it must be at least 1"),
        ({"pad": -1}, {}, "model.images.pad is -1; it must be at least 0"),
        ({"flip": 1}, {}, "model.images.flip is 1; it must be true or false"),
        ({"fliq": True}, {}, "there is no model.images option 'fliq'; did you mean 'flip'?"),
        (3, {}, "model.images is 3; it must be a table"),
        (
            {"flip": True},
            {"inputs": "flat"},
            r"model.images is for images \(H, W\) or \(C, H, W\); the column has \(4,\)",
        ),
        ({"flip": True}, {"inputs": "z"}, "model.inputs is 'z'; the dataset has columns x, y, flat"),
        ({}, {"name": "test_images:own_model"}, "model.images is for modules; test_images:own_model is a Model"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(images, model, line):
    with pytest.raises(UserError, match=f"^{line}"):
        build(load(job(images, **model)))
