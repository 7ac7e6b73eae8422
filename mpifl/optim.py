"""Optimizers on flat vectors, one kind for clients and server: theta and grad are (P,), statistics a Tree.

    apply:    theta, state <- theta - lr direction(g, s'), s'     s' = observe(g, s): the usual step
    step:     theta        <- theta - lr direction(g, s*)         statistics held fixed: the U of Mime
    observe:  state        <- s'                                  theta does not move: the V of Mime

s* lets the momentum m, which is linear in g, take g in, and leaves the second moment v as it was. Gradients
point uphill and are subtracted. lr multiplies the finished direction, so m and v hold gradients at any lr.

Every function runs under torch.func.vmap with a client axis on theta, grad and state. theta is donated (it is
overwritten where possible: use what is returned), and so is the state that `apply` and `observe` are given;
`step` only reads its state, and nothing writes to grad.

The options that all share. lr: a schedule, or a number. weight_decay: this much of theta is added to g (L2).
clip_norm: before that, g is scaled down to at most this Euclidean norm. A number outside its range raises
UserError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mpifl.schedule import Schedule, checked, constant
from mpifl.tree import Tree


class Optimizer(NamedTuple):
    """An optimizer as functions; state["lr"] is (), and the caller writes lr(round) there when it changes.

    init: theta -> state, whose lr is lr(0), in theta's dtype and on its device. step: theta, grad, state ->
    theta. observe: grad, state -> state. apply: theta, grad, state -> theta, state. `observe` clips, but adds
    no weight decay because it does not know theta: its caller adds weight_decay * theta if it is to be seen.
    plain: whether `apply` is theta - lr grad and nothing else. elementwise: whether each coordinate moves by itself.
    """

    init: Callable[[Tensor], Tree]
    step: Callable[[Tensor, Tensor, Tree], Tensor]
    observe: Callable[[Tensor, Tree], Tree]
    apply: Callable[[Tensor, Tensor, Tree], tuple[Tensor, Tree]]
    lr: Schedule
    plain: bool = False
    elementwise: bool = False


class _Rule(NamedTuple):
    """What tells optimizers apart. `first` and `second` (moment) return the entries of the state they renew.

    first: grad, state, whether it may overwrite -> entries. second: grad, state, overwritten -> entries.
    direction: grad, state -> what lr multiplies; writes to neither.
    """

    blank: Callable[[Tensor], Tree] = lambda theta: {}
    first: Callable[[Tensor, Tree, bool], Tree] = lambda grad, state, overwrite: {}
    second: Callable[[Tensor, Tree], Tree] = lambda grad, state: {}
    direction: Callable[[Tensor, Tree], Tensor] = lambda grad, state: grad


def _optimizer(
    rule: _Rule, lr: Schedule, weight_decay: float, clip_norm: float | None, decoupled: bool = False
) -> Optimizer:
    """Compose a rule with clipping before it, weight decay, and the learning rate after it."""
    schedule = _as_schedule(lr)
    checked("weight_decay", weight_decay, "a number of at least 0", lambda decay: decay >= 0)
    if clip_norm is not None:
        checked("clip_norm", clip_norm, "a number above 0, or leave it out", lambda norm: norm > 0)

    def init(theta: Tensor) -> Tree:
        rate = torch.full((), schedule(0), dtype=theta.dtype, device=theta.device)
        return {"lr": rate} | rule.blank(theta)

    def clipped(grad: Tensor) -> Tensor:
        if clip_norm is None:
            return grad
        return grad * (clip_norm / torch.linalg.vector_norm(grad).clamp(min=clip_norm))

    def regularized(theta: Tensor, grad: Tensor) -> Tensor:
        grad = clipped(grad)
        return grad.add(theta, alpha=weight_decay) if weight_decay and not decoupled else grad

    def move(theta: Tensor, grad: Tensor, state: Tree) -> Tensor:
        if weight_decay and decoupled:
            theta = torch.mul(theta, 1.0 - weight_decay * state["lr"], out=_in_place(theta))
        return _add_product(theta, rule.direction(grad, state), state["lr"], -1.0)

    def step(theta: Tensor, grad: Tensor, state: Tree) -> Tensor:
        grad = regularized(theta, grad)
        return move(theta, grad, state | rule.first(grad, state, False))

    def see(grad: Tensor, state: Tree) -> Tree:
        return state | rule.first(grad, state, True) | rule.second(grad, state)

    def apply(theta: Tensor, grad: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        grad = regularized(theta, grad)
        state = see(grad, state)
        return move(theta, grad, state), state

    plain = rule == _Rule() and not weight_decay and clip_norm is None
    observe = lambda grad, state: see(clipped(grad), state)  # noqa: E731
    return Optimizer(init, step, observe, apply, schedule, plain, elementwise=clip_norm is None)


def _as_schedule(lr: Schedule | float) -> Schedule:
    first = lr(0) if callable(lr) else lr
    checked("lr", first, "a number above 0, or a schedule that starts above 0", lambda rate: rate > 0)
    return lr if callable(lr) else constant(lr)


def _beta(option: str, value: float) -> float:
    return checked(option, value, "a number in [0, 1)", lambda beta: 0 <= beta < 1)


def _positive(option: str, value: float) -> float:
    return checked(option, value, "a number above 0", lambda number: number > 0)


def _in_place(target: Tensor) -> Tensor | None:
    """Return the `out` of an operation: `target`, or under vmap, which knows no `out`, None."""
    return target if torch._C._functorch.peek_interpreter_stack() is None else None


def _add_product(target: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addcmul(target, a, b, value=scale, out=_in_place(target))


def _heavy_ball(beta: float) -> _Rule:
    def first(grad: Tensor, state: Tree, overwrite: bool) -> Tree:
        m = state["m"]
        return {"m": torch.add(grad, m, alpha=beta, out=_in_place(m) if overwrite else None)}

    return _Rule(lambda theta: {"m": torch.zeros_like(theta)}, first, direction=lambda _, state: state["m"])


def _adaptive(
    grow: Callable[[Tensor, Tensor, float], Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    start: float = 0.0,
    bias_correction: bool = False,
) -> _Rule:
    """m <- beta1 m + (1 - beta1) g; v <- grow(v, g, beta2), from `start`; direction = m / (sqrt(v) + eps).

    bias_correction divides m by 1 - beta1^t and v by 1 - beta2^t, what the t gradients seen weigh in these
    averages. m_weight and v_weight are that, by the recursions of m and v: 1 - beta^t cancels in float32.
    """
    _beta("beta1", beta1)
    _beta("beta2", beta2)

    def blank(theta: Tensor) -> Tree:
        moments = {"m": torch.zeros_like(theta), "v": torch.full_like(theta, start)}
        weights = {"m_weight": theta.new_zeros(()), "v_weight": theta.new_zeros(())}
        return moments | weights if bias_correction else moments

    def heavier(weight: str, beta: float, state: Tree) -> Tree:
        return {weight: state[weight] * beta + (1.0 - beta)} if bias_correction else {}

    def first(grad: Tensor, state: Tree, overwrite: bool) -> Tree:
        m = state["m"]
        m = torch.lerp(m, grad, 1.0 - beta1, out=_in_place(m) if overwrite else None)
        return {"m": m} | heavier("m_weight", beta1, state)

    def second(grad: Tensor, state: Tree) -> Tree:
        return {"v": grow(state["v"], grad, beta2)} | heavier("v_weight", beta2, state)

    def direction(grad: Tensor, state: Tree) -> Tensor:
        m, root = state["m"], state["v"].sqrt()
        if bias_correction:
            # A `step` before the first `observe` meets v = 0 of weight 0: any weight above 0 will do.
            m_weight, v_weight = state["m_weight"], state["v_weight"].clamp(min=1.0 - beta2)
            root.mul_(m_weight / v_weight.sqrt()).add_(m_weight * eps)
        else:
            root.add_(eps)
        return torch.div(m, root, out=_in_place(root))

    return _Rule(blank, first, second, direction)


def _adam_growth(v: Tensor, grad: Tensor, beta2: float) -> Tensor:
    return _add_product(v.mul_(beta2), grad, grad, 1.0 - beta2)


def _yogi_growth(v: Tensor, grad: Tensor, beta2: float) -> Tensor:
    square = grad.square()
    return _add_product(v, square, (v - square).sign_(), beta2 - 1.0)


def _adagrad_growth(v: Tensor, grad: Tensor, beta2: float) -> Tensor:
    return _add_product(v, grad, grad, 1.0)


def sgd(lr: Schedule, weight_decay: float = 0.0, clip_norm: float | None = None) -> Optimizer:
    """Gradient descent: direction = g."""
    return _optimizer(_Rule(), lr, weight_decay, clip_norm)


def momentum(
    lr: Schedule, momentum: float = 0.9, weight_decay: float = 0.0, clip_norm: float | None = None
) -> Optimizer:
    """Heavy ball in the form of torch.optim.SGD: m <- momentum m + g; direction = m."""
    return _optimizer(_heavy_ball(_beta("momentum", momentum)), lr, weight_decay, clip_norm)


def nesterov(
    lr: Schedule, momentum: float = 0.9, weight_decay: float = 0.0, clip_norm: float | None = None
) -> Optimizer:
    """Nesterov momentum in the form of torch.optim.SGD: m <- momentum m + g; direction = g + momentum m."""
    rule = _heavy_ball(_beta("momentum", momentum))
    rule = rule._replace(direction=lambda grad, state: grad.add(state["m"], alpha=momentum))
    return _optimizer(rule, lr, weight_decay, clip_norm)


def adam(
    lr: Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Optimizer:
    """Adam (Kingma and Ba 2015, Alg. 1) in the form of torch.optim.Adam, bias-corrected, v from 0.

        m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
        direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Where v is still 0, `step` divides by eps alone: before the first `observe` that holds of every optimizer
    whose v starts at 0, and not of fedadam, fedyogi and fedadagrad.
    """
    rule = _adaptive(_adam_growth, beta1, beta2, _positive("eps", eps), bias_correction=True)
    return _optimizer(rule, lr, weight_decay, clip_norm)


def adamw(
    lr: Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float | None = None,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019): theta <- (1 - lr weight_decay) theta, then Adam without decay."""
    rule = _adaptive(_adam_growth, beta1, beta2, _positive("eps", eps), bias_correction=True)
    return _optimizer(rule, lr, weight_decay, clip_norm, decoupled=True)


def yogi(
    lr: Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-3,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Optimizer:
    """Yogi (Zaheer et al. 2018), bias-corrected: Adam with v <- v - (1 - beta2) g^2 sign(v - g^2)."""
    rule = _adaptive(_yogi_growth, beta1, beta2, _positive("eps", eps), bias_correction=True)
    return _optimizer(rule, lr, weight_decay, clip_norm)


def adagrad(lr: Schedule, eps: float = 1e-10, weight_decay: float = 0.0, clip_norm: float | None = None) -> Optimizer:
    """Adagrad (Duchi et al. 2011), as in torch: v <- v + g^2, from 0; direction = g / (sqrt(v) + eps)."""
    rule = _adaptive(_adagrad_growth, beta1=0.0, beta2=0.0, eps=_positive("eps", eps))
    return _optimizer(rule, lr, weight_decay, clip_norm)


def fedavgm(lr: Schedule, beta: float = 0.9, weight_decay: float = 0.0, clip_norm: float | None = None) -> Optimizer:
    """FedAvgM's server (Hsu et al. 2019): m <- beta m + g; direction = m."""
    return _optimizer(_heavy_ball(_beta("beta", beta)), lr, weight_decay, clip_norm)


def fedadam(
    lr: Schedule,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    bias_correction: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Optimizer:
    """FedAdam's server (Reddi et al. 2021, Alg. 2): v from tau^2, no bias correction unless asked.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  direction = m / (sqrt(v) + tau)
    """
    tau = _positive("tau", tau)
    rule = _adaptive(_adam_growth, beta1, beta2, tau, tau * tau, bias_correction)
    return _optimizer(rule, lr, weight_decay, clip_norm)


def fedyogi(
    lr: Schedule,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    bias_correction: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Optimizer:
    """FedYogi's server (Reddi et al. 2021, Alg. 2): FedAdam with v <- v - (1 - beta2) g^2 sign(v - g^2)."""
    tau = _positive("tau", tau)
    rule = _adaptive(_yogi_growth, beta1, beta2, tau, tau * tau, bias_correction)
    return _optimizer(rule, lr, weight_decay, clip_norm)


def fedadagrad(
    lr: Schedule,
    beta1: float = 0.0,
    tau: float = 1e-3,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> Optimizer:
    """FedAdagrad's server (Reddi et al. 2021, Alg. 2): FedAdam with v <- v + g^2; beta1 = 0 as published."""
    tau = _positive("tau", tau)
    rule = _adaptive(_adagrad_growth, beta1, 0.0, tau, tau * tau)
    return _optimizer(rule, lr, weight_decay, clip_norm)
