"""A model is a function of one flat vector theta, (P,), and a batch.

`from_module` makes one of any `nn.Module`. Its fast path binds the module's parameters as views into theta
(nothing is copied, and binding is skipped while the address stays the same); under torch.func transforms the
same functions go through `functional_call` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from mpifl import perceptron
from mpifl.config import UserError
from mpifl.tree import Tree

Loss = Callable[[Tensor, Tree], Tensor]
"""(scores (B, ...), batch) -> per-example losses (B,)."""

RESERVED = ("mask", "index", "key")
"""Batch leaves that are not features: mask (B,) when padded, index (B,) example ids, key () of this step."""


@dataclass(eq=False)
class Model:
    """Functions of a flat vector; a batch without `key` is evaluation: no dropout, no augmentation.

    size: P. init: seed -> (P,). scores: (theta, batch) -> (B, ...). loss: (scores, batch) -> (B,).
    """

    size: int
    init: Callable[[int], Tensor]
    scores: Callable[[Tensor, Tree], Tensor]
    loss: Loss

    def losses(self, theta: Tensor, batch: Tree) -> Tensor:
        """Per-example losses, (B,)."""
        return self.loss(self.scores(theta, batch), batch)

    def mean_loss(self, theta: Tensor, batch: Tree) -> Tensor:
        """Masked mean of the losses, ()."""
        return masked_mean(self.losses(theta, batch), batch)

    def grad_and_loss(self, theta: Tensor, batch: Tree) -> tuple[Tensor, Tensor]:
        """Gradient of the mean loss, (P,), a vector of its own at every call, and the mean loss, ()."""
        if traced():
            return grad_and_value(self.mean_loss)(theta, batch)
        leaf = theta.detach().requires_grad_()
        loss = self.mean_loss(leaf, batch)
        return torch.autograd.grad(loss, leaf)[0].contiguous(), loss.detach()  # a broadcast one cannot be written to

    def descend(self, theta: Tensor, batch: Tree, lr: Tensor) -> tuple[Tensor, Tensor]:
        """A plain SGD step: theta - lr * gradient of the mean loss, (P,), and that loss, (); theta is donated.

        lr: (). As fast as `grad_and_loss` and a subtraction, or faster where no gradient has to be made.
        """
        grad, loss = self.grad_and_loss(theta, batch)
        return torch.addcmul(theta, grad, lr, value=-1.0, out=None if traced() else theta), loss

    def state_dict(self, theta: Tensor) -> dict[str, Tensor]:
        """What is exported: names and tensors."""
        return {"theta": theta.detach().cpu().clone()}

    def constants(self) -> dict[str, Tensor]:
        """What scores depend on beside theta and the batch, by names without dots."""
        return {}

    def from_state_dict(self, tensors: dict[str, Tensor]) -> Tensor:
        """Invert `state_dict`; (P,). Raises KeyError naming what is missing."""
        return tensors["theta"].clone()


def rows_of(batch: Tree) -> Tensor | int:
    """Number of examples in a batch that count."""
    return batch["mask"].sum() if "mask" in batch else len(batch["index"])


def masked_mean(values: Tensor, batch: Tree) -> Tensor:
    """Mean of per-example values, (B,), over the rows that `batch["mask"]` keeps; 0 when it keeps none."""
    return _kept(values, batch).dot(_shares(values, batch))


def _kept(values: Tensor, batch: Tree) -> Tensor:
    """`values`, (B,), and 0 in rows that do not count, whatever is there."""
    return torch.where(batch["mask"], values, 0.0) if "mask" in batch else values


def _shares(values: Tensor, batch: Tree) -> Tensor:
    """What each row weighs in the masked mean of per-example values, (B,)."""
    mask = batch.get("mask")
    if mask is None:
        return torch.full_like(values, 1.0 / len(values))
    kept = mask.to(values.dtype)
    return kept / kept.sum().clamp(min=1)


def column_of(batch: Tree, name: str, what: str) -> Tensor:
    """A batch's leaf; UserError naming `what` needs it if the dataset has no such column."""
    if name not in batch:
        columns = ", ".join(leaf for leaf in batch if leaf not in RESERVED)
        raise UserError(f"{what} needs a column '{name}'; the dataset has {columns}")
    return batch[name]


def targets_of(batch: Tree, scores: Tensor, axes: int, what: str, other: str) -> Tensor:
    """`batch["y"]`, class numbers: (B,) with scores (B, classes), or (B, L) with scores (B, L, ids), by its `axes`.

    Raises UserError for anything else, with `other` as what the other kind of targets has.
    """
    y = column_of(batch, "y", what)
    if y.dim() != axes or scores.shape[:-1] != y.shape:
        hint = f"for sequences there is {other}" if axes == 1 else f"for single labels there is {other}"
        wanted = "scores (B, classes) and y (B,)" if axes == 1 else "scores (B, L, ids) and y (B, L)"
        found = f"scores {tuple(scores.shape)} and y {tuple(y.shape)}"
        raise UserError(f"{what} takes {wanted}, here a batch has {found}; {hint}")
    if y.is_floating_point():
        raise UserError(f"{what} takes class numbers, column 'y' holds {y.dtype}; for them name a function of your own")
    return y


def cross_entropy(scores: Tensor, batch: Tree) -> Tensor:
    """Cross entropy of `scores`, (B, classes), against `batch["y"]`, (B,) int64; (B,)."""
    y = targets_of(batch, scores, 1, "loss cross_entropy", other="token_cross_entropy")
    return F.cross_entropy(scores, y, reduction="none")


def token_cross_entropy(scores: Tensor, batch: Tree, expected_length: float | None = None) -> Tensor:
    """Cross entropy of `scores`, (B, L, V), against the tokens `batch["y"]`, (B, L) int64, where they are not 0 (PAD).

    Per sequence, (B,): the mean over its tokens, 0 if it has none; with `expected_length`, the sum over its tokens
    divided by that number, so that long sequences weigh more (FedJAX's StackOverflow: 13.3).
    """
    y = targets_of(batch, scores, 2, "loss token_cross_entropy", other="cross_entropy")
    losses = F.cross_entropy(scores.flatten(0, 1), y.flatten(), ignore_index=0, reduction="none")
    sums = losses.view(y.shape).sum(dim=1)
    if expected_length is None:
        return sums / (y != 0).sum(dim=1).clamp(min=1)
    if expected_length <= 0:
        raise UserError(f"token_cross_entropy's expected_length is {expected_length}; it must be positive")
    return sums / expected_length


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _trainable(module: nn.Module) -> Tensor:
    return _flat([p.detach() for p in module.parameters() if p.requires_grad])


def _make(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module with torch's generator seeded, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def from_module(
    factory: Callable[[], nn.Module],
    loss: Loss = cross_entropy,
    inputs: str = "x",
    made: nn.Module | None = None,
    images: Callable[[Tensor, Tree], Tensor] | None = None,
) -> ModuleModel:
    """Make a Model of the module that `factory` builds; theta holds its trainable parameters.

    loss: (scores, batch) -> (B,). inputs: the batch leaf fed to `forward`. A `forward` that also takes `key`
    gets the step's key, () int64 (None in evaluation), for its own keyed dropout; for nn.Dropout and the like
    torch's generator is seeded from the key before each training forward. Frozen parameters and buffers are constants.
    made: a module the factory has just built, to be used instead of building one. images: (batch[inputs], batch) ->
    what `forward` is given instead, in training and in evaluation (mpifl.models.images.Images).
    Raises UserError for modules whose buffers change in a training forward (BatchNorm), at construction when
    recognised by type, else by `refuse_changing_buffers`.
    """
    module = _make(factory, seed=0) if made is None else made
    if not isinstance(module, nn.Module):
        raise UserError(f"a model factory must return an nn.Module, got {type(module).__name__}")
    for path, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
            raise UserError(_buffer_refusal(type(module).__name__, path, type(part).__name__))
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not named:
        raise UserError(f"model {type(module).__name__} has no trainable parameter")
    kinds = {p.dtype for p in named.values()}
    if kinds != {torch.float32}:
        raise UserError(
            f"model {type(module).__name__} trains parameters of {', '.join(sorted(map(str, kinds)))}; theta is "
            f"float32: convert the module with .float()"
        )
    return ModuleModel(factory, module, list(named), loss, inputs, images)


def _buffer_refusal(model: str, path: str, kind: str) -> str:
    return (
        f"model {model} holds {kind} at '{path}', whose running statistics change in training and are not a "
        f"function of theta; use GroupNorm or LayerNorm there, or track_running_stats=False"
    )


class ModuleModel(Model):
    """A Model whose module's trainable parameters are views into the theta it was last called with."""

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        module: nn.Module,
        names: list[str],
        loss: Loss,
        inputs: str,
        images: Callable[[Tensor, Tree], Tensor] | None,
    ) -> None:
        parameters = [module.get_parameter(name) for name in names]
        size = sum(p.numel() for p in parameters)
        super().__init__(size, lambda seed: _trainable(_make(factory, seed)), self._scores, loss)
        self.module, self.inputs, self.images = module, inputs, images
        self.takes_key = "key" in inspect.signature(module.forward).parameters
        self._names, self._parameters = names, parameters
        self._shapes, self._sizes = [p.shape for p in parameters], [p.numel() for p in parameters]
        self._address, self._training = 0, module.training
        by_hand = loss is cross_entropy and images is None
        self._is_perceptron = by_hand and perceptron.is_plain(module)
        self._layers: perceptron.Layers = []

    def grad_and_loss(self, theta: Tensor, batch: Tree) -> tuple[Tensor, Tensor]:
        """As Model's, through parameters bound to theta."""
        if traced() or theta.requires_grad:
            return super().grad_and_loss(theta, batch)
        self._bind(theta)
        losses = self.loss(self._call(None, batch), batch)
        shares = _shares(losses, batch)
        grads = _pull_back(losses, shares, self._parameters)
        flat = _flat([torch.zeros_like(p) if g is None else g for g, p in zip(grads, self._parameters)])
        return flat, _kept(losses.detach(), batch).dot(shares)

    def descend(self, theta: Tensor, batch: Tree, lr: Tensor) -> tuple[Tensor, Tensor]:
        """As Model's; the gradient is subtracted from the bound parameters, and a perceptron never makes one."""
        if traced() or theta.requires_grad or theta.is_cuda:  # to read lr off a GPU would wait for it
            return super().descend(theta, batch, lr)
        if self._is_perceptron:
            x, y, mask = batch[self.inputs], batch["y"], batch.get("mask")
            return theta, perceptron.descend(self._layers_of(theta), x, y, mask, float(lr))
        self._bind(theta)
        losses = self.loss(self._call(None, batch), batch)
        shares = _shares(losses, batch)
        found = _pull_back(losses, shares, self._parameters)
        moved = [(p, g) for p, g in zip(self._parameters, found) if g is not None]
        with torch.no_grad():
            torch._foreach_add_([p for p, _ in moved], [g for _, g in moved], alpha=-float(lr))
        return theta, _kept(losses.detach(), batch).dot(shares)

    def state_dict(self, theta: Tensor) -> dict[str, Tensor]:
        """The module's own state_dict at theta, buffers and tied weights included, each in storage of its own."""
        self._bind(theta)
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def constants(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers: what scores depend on beside theta and the batch."""
        frozen = {name: p for name, p in self.module.named_parameters() if not p.requires_grad}
        return {name.replace(".", "/"): value for name, value in (frozen | dict(self.module.named_buffers())).items()}

    def from_state_dict(self, tensors: dict[str, Tensor]) -> Tensor:
        """Gather the trainable parameters by name, (P,)."""
        return _flat([tensors[name].to(torch.float32) for name in self._names])

    def _scores(self, theta: Tensor, batch: Tree) -> Tensor:
        if traced() or theta.requires_grad:
            return self._call(self._views(theta), batch)
        self._bind(theta)
        with torch.no_grad():
            return self._call(None, batch)

    def _views(self, theta: Tensor) -> dict[str, Tensor]:
        parts = zip(self._names, theta.split(self._sizes), self._shapes)
        return {name: part.view(shape) for name, part, shape in parts}

    def _bind(self, theta: Tensor) -> None:
        """Make the parameters views into theta; they keep its storage alive, so an address names one vector."""
        if theta.data_ptr() == self._address:
            return
        if theta.device != self._parameters[0].device:
            self.module.to(theta.device)
            self._parameters = [self.module.get_parameter(name) for name in self._names]
        for parameter, part, shape in zip(self._parameters, theta.split(self._sizes), self._shapes):
            parameter.data = part.view(shape)
        self._address = theta.data_ptr()

    def _layers_of(self, theta: Tensor) -> perceptron.Layers:
        """Weights and biases as views into theta, kept for the next step; they keep its storage alive."""
        if not self._layers or self._layers[0][0].data_ptr() != theta.data_ptr():
            views = [part.view(shape) for part, shape in zip(theta.split(self._sizes), self._shapes)]
            self._layers = list(zip(views[::2], views[1::2]))
        return self._layers

    def _call(self, parameters: dict[str, Tensor] | None, batch: Tree) -> Tensor:
        key = batch.get("key")
        if self._training != (key is not None):
            self._training = key is not None
            self.module.train(self._training)
        keywords = {"key": key} if self.takes_key else {}
        if key is not None and not torch._C._functorch.is_functorch_wrapped_tensor(key):
            _seed(int(key), key.device)
        x = batch[self.inputs] if self.images is None else self.images(batch[self.inputs], batch)
        if parameters is None:
            return self.module(x, **keywords)
        return functional_call(self.module, parameters, (x,), keywords)


def _pull_back(outputs: Tensor, weights: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of sum(weights * outputs); `torch.autograd.grad` without its checks, 5 % of a small model's step."""
    backward = torch.autograd.graph._engine_run_backward
    return backward((outputs,), (weights,), False, False, tuple(inputs), True, accumulate_grad=False)


def traced() -> bool:
    """True inside torch.func transforms (vmap, grad), where theta itself may be one that all clients share."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _seed(key: int, device: torch.device) -> None:
    """Seed the one generator that a module on `device` draws from (torch.manual_seed costs 100 times as much)."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)
    else:
        torch.default_generator.manual_seed(key)


def refuse_changing_buffers(factory: Callable[[], nn.Module], batch: Tree, inputs: str = "x") -> None:
    """Run one training forward on a batch like `batch` and raise UserError if a buffer changed, naming its path."""
    module = _make(factory, seed=0).train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    takes_key = "key" in inspect.signature(module.forward).parameters
    keywords = {"key": batch.get("key")} if takes_key else {}
    x = batch[inputs]
    if x.is_floating_point():  # whatever it holds: a blank batch of zeros would leave a running mean at zero
        x = torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        module(x, **keywords)
    for name, buffer in module.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            path = name.rpartition(".")[0]
            kind = type(module.get_submodule(path)).__name__
            raise UserError(_buffer_refusal(type(module).__name__, path or name, kind))


def train_in(model: Model, dtype: torch.dtype) -> None:
    """Have gradients computed in `dtype` where torch.autocast holds that to be safe.

    theta, its gradient, and scores in evaluation stay float32.
    """
    plain = model.grad_and_loss

    def grad_and_loss(theta: Tensor, batch: Tree) -> tuple[Tensor, Tensor]:
        with torch.autocast(theta.device.type, dtype, cache_enabled=False):  # theta moves under a cache
            return plain(theta, batch)

    model.grad_and_loss = grad_and_loss
    model.descend = partial(Model.descend, model)
