"""FedJAX: its FedAvg, its models and its jit backend; the LSTM, which FedJAX has with other gates, as torch has it."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import TakeTurns, Workload, start

jax.tree_map = jax.tree_util.tree_map  # FedJAX 0.0.17 is older than its end

import fedjax  # noqa: E402
import haiku as hk  # noqa: E402
from fedjax.core.metrics import unreduced_cross_entropy_loss  # noqa: E402
from fedjax.models import emnist  # noqa: E402

Params = dict[str, Any]


def make_model(workload: Workload) -> fedjax.Model:
    """Return the workload's net as a FedJAX model."""
    if workload.net == "char_lstm":
        return fedjax.Model(lambda rng: lstm_shapes(workload.classes), lstm_scores, lstm_scores, mean_losses, {})
    if workload.net == "mlp":
        return emnist.create_dense_model(hidden_units=workload.hidden[0])
    net = hk.transform(lambda batch: emnist.ConvDropoutModule(workload.classes)(batch["x"], True))
    x, y = example(workload, 0)
    return fedjax.create_model_from_haiku(net, {"x": x[:1], "y": y[:1]}, mean_losses)


def lstm_shapes(classes: int) -> Params:
    """Return zeros in the shapes of torch's parameters, in their order."""
    shapes = {"embedding": (classes, 8)}
    for layer, inputs in enumerate((8, 256)):
        shapes |= {f"w_ih_{layer}": (1024, inputs), f"w_hh_{layer}": (1024, 256)}
        shapes |= {f"b_ih_{layer}": (1024,), f"b_hh_{layer}": (1024,)}
    shapes |= {"out_w": (classes, 256), "out_b": (classes,)}
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def lstm_scores(params: Params, batch: Params, rng: Any = None) -> Any:
    """Return scores of the next token, (B, L, classes)."""
    sequence = params["embedding"][batch["x"].T]  # (L, B, 8)
    for layer in (0, 1):
        w_hh = params[f"w_hh_{layer}"].T
        gates = sequence @ params[f"w_ih_{layer}"].T + params[f"b_ih_{layer}"] + params[f"b_hh_{layer}"]

        def step(carry: Any, x: Any, w_hh: Any = w_hh) -> tuple[Any, Any]:
            h, c = carry
            i, f, g, o = jnp.split(x + h @ w_hh, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        blank = jnp.zeros((gates.shape[1], 256))
        _, sequence = jax.lax.scan(step, (blank, blank), gates)
    return (sequence @ params["out_w"].T + params["out_b"]).transpose(1, 0, 2)


def mean_losses(batch: Params, scores: Any) -> Any:
    """Cross entropy of each example, (B,); of a sequence the mean over its tokens."""
    losses = unreduced_cross_entropy_loss(batch["y"], scores)
    return losses if losses.ndim == 1 else jnp.mean(losses, axis=1)


def example(workload: Workload, client: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a client as FedJAX has them: channels last, integers of 32 bits."""
    x, y = workload.clients[client]
    if workload.net == "char_lstm":
        x = x.astype(np.int32)
    else:
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x[..., None]
    return x, y.astype(np.int32)


def places(workload: Workload, params: Params) -> Params:
    """For each of `params` the indices into torch's flat vector, in its shape: theta[places] are the params."""
    if workload.net == "char_lstm":
        first, found = 0, {}
        for name in lstm_shapes(workload.classes):
            found[name] = first + np.arange(params[name].size).reshape(params[name].shape)
            first += params[name].size
        return found
    first, found, channels = 0, {}, None
    for name, layer in params.items():  # in the order in which they are applied, weights before biases in torch
        shape = layer["w"].shape
        index = first + np.arange(layer["w"].size)
        if len(shape) == 4:
            weights, channels = index.reshape(*shape[:1:-1], *shape[:2]).transpose(2, 3, 1, 0), shape[3]
        elif channels:  # after a convolution: torch flattens (C, H, W), JAX (H, W, C)
            side = int((shape[0] // channels) ** 0.5)
            weights = index.reshape(shape[1], channels, side, side).transpose(2, 3, 1, 0).reshape(shape)
            channels = None
        else:
            weights = index.reshape(shape[::-1]).T
        biases = first + layer["w"].size + np.arange(layer["b"].size)
        first, found[name] = biases[-1] + 1, {"w": weights, "b": biases}
    return found


def main(workload: Workload, threads: int, take_turns: TakeTurns) -> None:
    """Take turns on a workload; threads are what JAX takes, one per core."""
    net = make_model(workload)
    at = places(workload, net.init(jax.random.PRNGKey(0)))
    sgd = fedjax.optimizers.sgd
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=workload.batch, num_epochs=1, skip_shuffle=True)
    fedavg = fedjax.algorithms.fed_avg.federated_averaging(fedjax.model_grad(net), sgd(workload.lr), sgd(1.0), batches)
    datasets = [
        fedjax.ClientDataset(dict(zip("xy", example(workload, client)))) for client in range(len(workload.clients))
    ]
    keys = list(jax.random.split(jax.random.PRNGKey(0), len(datasets)))
    cohorts = [[(client, datasets[client], keys[client]) for client in cohort] for cohort in workload.cohorts]

    def train() -> tuple[list[float], np.ndarray]:
        state = fedavg.init(jax.tree_util.tree_map(lambda index: jnp.asarray(workload.start[index]), at))
        seconds = []
        for clients in cohorts:
            began = time.perf_counter()
            state, _ = fedavg.apply(state, clients)
            jax.block_until_ready(state.params)
            seconds.append(time.perf_counter() - began)
        return seconds, flat(at, state.params, workload.start.size)

    take_turns(train, {name: version(name) for name in ("fedjax", "jax", "dm-haiku")})


def flat(at: Params, params: Params, size: int) -> np.ndarray:
    """Put params where torch has them, (size,)."""
    theta = np.empty(size, np.float32)
    for index, values in zip(jax.tree_util.tree_leaves(at), jax.tree_util.tree_leaves(params)):
        theta[index] = np.asarray(values)
    return theta


if __name__ == "__main__":
    start(main)
