"""Optimizers: torch.optim's steps, the papers' closed forms, Mime's split, and what they may write to."""

import inspect
import typing

import pytest
import torch
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from mpifl import optim
from mpifl.config import UserError
from mpifl.schedule import Schedule, constant, step

ALL = ["sgd", "momentum", "nesterov", "adam", "adamw", "adagrad", "yogi", "fedavgm"]
ALL += ["fedadam", "fedyogi", "fedadagrad"]
LINEAR = ["sgd", "momentum", "nesterov", "fedavgm"]  # no second moment: what `step` holds fixed
SERVER = ["fedadam", "fedyogi", "fedadagrad"]
P = 37


def make(name, lr=0.1, **options):
    return getattr(optim, name)(lr, **options)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(optimizer, theta, grads):
    """Apply gradients in turn to a copy of theta; return theta and the state."""
    theta, state = theta.clone(), optimizer.init(theta)
    for grad in grads:
        theta, state = optimizer.apply(theta, grad, state)
    return theta, state


def observed(optimizer, theta, grads):
    """The state after observing gradients."""
    state = optimizer.init(theta)
    for grad in grads:
        state = optimizer.observe(grad, state)
    return state


def copied(state):
    return {name: leaf.clone() for name, leaf in state.items()}


# --- against torch.optim ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 6e3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", torch.optim.SGD),
        ("momentum", lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o)),
        ("nesterov", lambda p, **o: torch.optim.SGD(p, momentum=0.9, nesterov=True, **o)),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("adagrad", torch.optim.Adagrad),
    ],
)
def test_twenty_steps_at_changing_lr_are_those_of_torch(name, reference, weight_decay, clip_norm):
    schedule = step(0.1, every=4, factor=0.5, warmup=3)
    ours = make(name, schedule, weight_decay=weight_decay, clip_norm=clip_norm)
    theta = randn(P)
    parameter = torch.nn.Parameter(theta.clone())
    theirs = reference([parameter], lr=schedule(0), weight_decay=weight_decay)
    state = ours.init(theta)
    norms = []
    for round in range(20):
        scale = 2e3 if round % 2 else 2e2
        grad = scale * randn(P, seed=round) + 0.1 * parameter.detach()  # depends on theta: errors would grow
        norms.append(float(grad.norm()))
        parameter.grad = grad.clone()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
        theirs.param_groups[0]["lr"] = schedule(round)
        theirs.step()
        state["lr"] = torch.full_like(state["lr"], ours.lr(round))
        theta, state = ours.apply(theta, grad, state)
    assert min(norms) < 6e3 < max(norms), "the clipping threshold must lie inside"
    # torch clips to max_norm / (norm + 1e-6), ours to max_norm / norm: 1e-10 apart here.
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-8, atol=1e-8)


def test_adam_moves_each_coordinate_by_lr_first_without_cancellation_in_float32():
    grad = randn(P, dtype=torch.float32)
    theta, _ = run(make("adam", 0.5, eps=1e-20), torch.zeros(P), [grad])
    torch.testing.assert_close(theta, -0.5 * grad.sign(), rtol=5e-7, atol=0)


def test_yogi_equals_adam_where_v_grew_from_zero_by_one_gradient():
    # From v = 0 the first step of both is (1 - beta2) g^2; they part at the second.
    theta, grads = randn(P), [randn(P, seed=1), 0.1 * randn(P, seed=2)]
    yogi, adam = make("yogi", eps=1e-3), make("adam", eps=1e-3)
    torch.testing.assert_close(run(yogi, theta, grads[:1]), run(adam, theta, grads[:1]))
    state = run(yogi, theta, grads)[1]
    v, square = 0.001 * grads[0] ** 2, grads[1] ** 2
    torch.testing.assert_close(state["v"], v - 0.001 * square * torch.sign(v - square))


# --- Reddi et al. 2021 and Hsu et al. 2019: closed forms for equal moves ---------------------------------

MOVE = torch.tensor([3.0, -0.4, 0.02, -2.0], dtype=torch.float64)


def closed_v(name, t, tau, beta2=0.99):
    """v after t equal moves c with tau < |c|."""
    if name == "fedadam":
        return beta2**t * tau**2 + (1 - beta2**t) * MOVE**2
    return tau**2 + t * MOVE**2 * ((1 - beta2) if name == "fedyogi" else 1)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("name", SERVER)
def test_server_optimizers_follow_the_papers_recursion(name, beta1):
    tau, rounds = 1e-3, 12
    server = make(name, 0.1, beta1=beta1, tau=tau)
    theta, state = run(server, torch.zeros_like(MOVE), [MOVE] * rounds)
    m = [(1 - beta1**t) * MOVE for t in range(1, rounds + 1)]
    v = [closed_v(name, t, tau) for t in range(1, rounds + 1)]
    torch.testing.assert_close(state["m"], m[-1])
    torch.testing.assert_close(state["v"], v[-1])
    moved = sum(0.1 * m_t / (v_t.sqrt() + tau) for m_t, v_t in zip(m, v, strict=True))
    torch.testing.assert_close(theta, -moved)


@pytest.mark.parametrize("name", SERVER)
def test_v_starts_at_tau_squared_and_defaults_are_the_papers(name):
    assert make(name, tau=0.5).init(MOVE)["v"].tolist() == [0.25] * 4
    defaults = {key: p.default for key, p in inspect.signature(getattr(optim, name)).parameters.items()}
    expected = {"beta1": 0.0} if name == "fedadagrad" else {"beta1": 0.9, "beta2": 0.99, "bias_correction": False}
    assert expected.items() <= defaults.items()
    assert defaults["tau"] == 1e-3


@pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
def test_bias_correction_when_asked_divides_both_moments(name):
    tau, rounds = 1e-3, 5
    server = make(name, 1.0, tau=tau, bias_correction=True)
    before, state = run(server, torch.zeros_like(MOVE), [MOVE] * (rounds - 1))
    after, _ = server.apply(before.clone(), MOVE, state)
    v = closed_v(name, rounds, tau) / (1 - 0.99**rounds)
    torch.testing.assert_close(before - after, MOVE / (v.sqrt() + tau))  # m / (1 - beta1^t) = c


def test_fedavgm_accumulates_the_geometric_sum_outside_of_lr():
    server = make("fedavgm", 0.1, beta=0.8)
    theta, state = run(server, torch.zeros_like(MOVE), [MOVE] * 7)
    torch.testing.assert_close(state["m"], MOVE * (1 - 0.8**7) / (1 - 0.8))
    state["lr"] = torch.zeros_like(state["lr"])
    still, state = server.apply(theta.clone(), MOVE, state)
    assert torch.equal(still, theta)
    torch.testing.assert_close(state["m"], MOVE * (1 - 0.8**8) / (1 - 0.8))


@pytest.mark.parametrize("name", SERVER)
def test_large_tau_with_lr_in_proportion_gives_averaged_momentum(name):
    # sqrt(v) + tau -> tau (1 + beta2^(t/2)) for fedadam, whose v forgets tau^2, and 2 tau for the others.
    tau, rounds = 1e7, 6
    grads = [randn(P, seed=seed) for seed in range(rounds)]
    theta, m = torch.zeros(P, dtype=torch.float64), torch.zeros(P, dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * grad
        theta -= 0.1 * m / (1 + 0.99 ** (t / 2) if name == "fedadam" else 2)
    torch.testing.assert_close(run(make(name, 0.1 * tau, beta1=0.9, tau=tau), theta * 0, grads)[0], theta)


def test_yogi_moves_v_towards_the_square_and_not_at_all_where_equal():
    server = make("fedyogi", tau=0.5, beta2=0.75)
    v = observed(server, torch.zeros(4), [torch.tensor([0.5, -0.5, 1.0, 0.25])])["v"]
    assert v.tolist() == [0.25, 0.25, 0.25 + 0.25 * 1.0, 0.25 - 0.25 * 0.0625]


@pytest.mark.parametrize("options", [{"name": "momentum", "momentum": 0.0}, {"name": "nesterov", "momentum": 0.0}])
def test_momentum_without_memory_is_sgd(options):
    theta, grads = randn(P), [randn(P, seed=seed) for seed in range(3)]
    assert torch.equal(run(make(**options), theta, grads)[0], run(make("sgd"), theta, grads)[0])


def test_fedavgm_is_momentum_and_without_memory_sgd():
    theta, grads = randn(P), [randn(P, seed=seed) for seed in range(3)]
    assert torch.equal(run(make("fedavgm"), theta, grads)[0], run(make("momentum"), theta, grads)[0])
    assert torch.equal(run(make("fedavgm", beta=0.0), theta, grads)[0], run(make("sgd"), theta, grads)[0])


def test_adam_without_memory_is_the_sign():
    theta, grads = randn(P), [randn(P, seed=seed) for seed in range(3)]
    moved = run(make("adam", 1.0, beta1=0.0, beta2=0.0, eps=1e-12), theta, grads)[0] - theta
    torch.testing.assert_close(moved, -sum(grad.sign() for grad in grads))


@pytest.mark.parametrize("name", ALL)
def test_coordinates_do_not_mix(name):
    theta, grads = randn(P), [randn(P, seed=seed) for seed in range(4)]
    order = torch.randperm(P, generator=torch.Generator().manual_seed(1))
    permuted = run(make(name), theta[order], [grad[order] for grad in grads])[0]
    torch.testing.assert_close(permuted, run(make(name), theta, grads)[0][order], rtol=1e-13, atol=0)


# --- the split of Mime -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_apply_is_step_then_observe_without_a_second_moment(name):
    optimizer, theta, grad = make(name, clip_norm=2.0), randn(P), randn(P, seed=9)
    state = observed(optimizer, theta, [randn(P, seed=seed) for seed in range(3)])
    stepped = optimizer.step(theta.clone(), grad, state)
    seen = optimizer.observe(grad, copied(state))
    applied, after = optimizer.apply(theta.clone(), grad, state)
    assert torch.equal(stepped, applied)
    assert all(torch.equal(seen[leaf], after[leaf]) for leaf in after)


def test_momentum_step_is_affine_in_the_gradient():
    optimizer, theta = make("momentum", 0.1, momentum=0.9), randn(P)
    state = observed(optimizer, theta, [randn(P, seed=1)])
    grad = randn(P, seed=2)
    expected = theta - 0.1 * (0.9 * state["m"] + grad)
    torch.testing.assert_close(optimizer.step(theta.clone(), grad, state), expected)


def test_adaptive_step_holds_v_where_apply_renews_it():
    v, m = torch.tensor([0.04, 0.01, 0.09]), torch.tensor([0.1, 0.2, 0.3])
    grad = torch.tensor([1.0, -2.0, 0.5])
    optimizer = make("fedadam", 1.0, beta1=0.9, beta2=0.99, tau=1e-3)
    state = optimizer.init(m) | {"m": m, "v": v}
    frozen = -optimizer.step(torch.zeros(3), grad, state)
    renewed, _ = optimizer.apply(torch.zeros(3), grad, copied(state))
    torch.testing.assert_close(frozen, torch.tensor([0.19 / 0.201, -0.02 / 0.101, 0.32 / 0.301]))
    v = torch.tensor([0.0396 + 0.01, 0.0099 + 0.04, 0.0891 + 0.0025])
    torch.testing.assert_close(-renewed, torch.tensor([0.19, -0.02, 0.32]) / (v.sqrt() + 1e-3))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_bias_corrected_step_is_apply_under_a_constant_gradient(name):
    # Corrected moments are then c and c^2 at any t >= 1, whether v takes the last gradient in or not.
    optimizer, theta, grad = make(name), randn(P), randn(P, seed=1)
    for seen in (1, 2, 5):
        state = observed(optimizer, theta, [grad] * seen)
        stepped = optimizer.step(theta.clone(), grad, state)
        torch.testing.assert_close(stepped, optimizer.apply(theta.clone(), grad, state)[0])


@pytest.mark.parametrize("name", ALL)
def test_step_before_any_observation_is_finite(name):
    theta = randn(P)
    assert make(name).step(theta, randn(P, seed=1), make(name).init(theta)).isfinite().all()


# --- what is shared: learning rate, clipping, decay ------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_state_carries_lr_and_zero_lr_stands_still(name):
    optimizer, theta = make(name, step(0.5, every=1, factor=0.5)), randn(P, dtype=torch.float32)
    state = optimizer.init(theta)
    assert (state["lr"].shape, state["lr"].dtype, float(state["lr"])) == ((), torch.float32, 0.5)
    state["lr"] = torch.zeros(())
    moved, _ = optimizer.apply(theta.clone(), torch.zeros(P).index_fill(0, torch.tensor([0]), 1.0), state)
    assert torch.equal(moved, theta)


@pytest.mark.parametrize("name", ALL)
def test_clipping_a_zero_gradient_moves_nothing(name):
    options = {"clip_norm": 1.0} | ({"weight_decay": 0.0} if name == "adamw" else {})
    theta = randn(P)
    assert torch.equal(run(make(name, **options), theta, [torch.zeros_like(theta)] * 2)[0], theta)


def test_clipping_keeps_direction_and_caps_the_norm():
    grad = randn(P, seed=1)
    norm = float(grad.norm())
    moved = run(make("sgd", 1.0, clip_norm=norm / 3), torch.zeros_like(grad), [grad])[0]
    torch.testing.assert_close(moved, -grad / 3)
    assert torch.equal(run(make("sgd", 1.0, clip_norm=norm * 1.01), torch.zeros_like(grad), [grad])[0], -grad)


def test_clipping_does_not_hide_a_bad_gradient():
    for bad in (float("nan"), float("inf")):
        grad = torch.tensor([1.0, bad])
        assert run(make("sgd", clip_norm=1.0), torch.zeros(2), [grad])[0].isnan().any()


def test_observe_clips_as_apply_does():
    theta, grad = randn(P), 10 * randn(P, seed=1)
    for name in ("momentum", "fedadam"):
        optimizer = make(name, clip_norm=1.0)
        state, applied = observed(optimizer, theta, [grad]), run(optimizer, theta, [grad])[1]
        assert all(torch.equal(state[leaf], applied[leaf]) for leaf in state)


def test_adamw_decays_theta_outside_the_moments():
    theta = randn(P)
    decayed, state = run(make("adamw", 0.1, weight_decay=0.5), theta, [torch.zeros_like(theta)])
    torch.testing.assert_close(decayed, theta * 0.95)
    assert not state["m"].any()


# --- donation and vmap -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("name", ALL)
def test_apply_overwrites_theta_and_moments_but_never_the_gradient(name, options):
    optimizer, theta, grad = make(name, **options), randn(P), randn(P, seed=1)
    state, kept = optimizer.init(theta), grad.clone()
    version, addresses = grad._version, {leaf: state[leaf].data_ptr() for leaf in state if leaf in "mv"}
    for _ in range(2):
        moved, state = optimizer.apply(theta, grad, state)
        state = optimizer.observe(grad, state)
    optimizer.step(theta, grad, state)
    assert moved.data_ptr() == theta.data_ptr()
    assert addresses == {leaf: state[leaf].data_ptr() for leaf in addresses}
    assert grad._version == version and torch.equal(grad, kept)
    assert all(leaf.data_ptr() != grad.data_ptr() for leaf in state.values())


@pytest.mark.parametrize("name", ALL)
def test_step_only_reads_its_state(name):
    optimizer, theta = make(name), randn(P)
    state = observed(optimizer, theta, [randn(P, seed=1)])
    before = {leaf: (state[leaf], state[leaf]._version) for leaf in state}
    optimizer.step(theta, randn(P, seed=2), state)
    assert {leaf: (id(state[leaf]), state[leaf]._version) for leaf in state} == {
        leaf: (id(tensor), version) for leaf, (tensor, version) in before.items()
    }


class Operations(TorchDispatchMode):
    """Names of the torch operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "passes"), [("sgd", 1), ("momentum", 2), ("nesterov", 3), ("fedadam", 7)])
def test_passes_over_the_vector(name, passes):
    optimizer, theta, grad = make(name), randn(P), randn(P, seed=1)
    state = optimizer.init(theta)
    with Operations() as operations:
        optimizer.apply(theta, grad, state)
    assert len(operations.names) == passes


@pytest.mark.parametrize("options", [{}, {"clip_norm": 3.0, "weight_decay": 0.1}])
@pytest.mark.parametrize("name", ALL)
def test_vmap_over_clients_is_a_loop_over_them(name, options):
    clients, optimizer = 3, make(name, **options)
    thetas, rates = randn(clients, P), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    grads = [randn(clients, P, seed=seed) for seed in range(1, 4)]
    # Warnings are errors here: functorch warns where it would loop over the clients instead.
    batched = vmap(optimizer.init)(thetas) | {"lr": rates.clone()}
    theta = thetas.clone()
    for grad in grads[:2]:
        theta, batched = vmap(optimizer.apply)(theta, grad, batched)
    batched = vmap(optimizer.observe)(grads[2], batched)
    theta = vmap(optimizer.step)(theta, grads[0], batched)
    for k in range(clients):
        state = optimizer.init(thetas[k]) | {"lr": rates[k]}
        alone = thetas[k].clone()
        for grad in grads[:2]:
            alone, state = optimizer.apply(alone, grad[k], state)
        state = optimizer.observe(grads[2][k], state)
        torch.testing.assert_close(optimizer.step(alone, grads[0][k], state), theta[k])
        torch.testing.assert_close({leaf: batched[leaf][k] for leaf in state}, state)


@pytest.mark.parametrize("name", ALL)
def test_clients_step_with_one_shared_state_under_vmap(name):
    optimizer, thetas, grads = make(name), randn(3, P), randn(3, P, seed=1)
    state = observed(optimizer, thetas[0], [randn(P, seed=2)])
    loop = torch.stack([optimizer.step(thetas[k].clone(), grads[k], state) for k in range(3)])
    torch.testing.assert_close(vmap(optimizer.step, in_dims=(0, 0, None))(thetas, grads, state), loop)


# --- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_signature_is_the_job_files_schema(name):
    constructor = getattr(optim, name)
    hints = typing.get_type_hints(constructor)
    parameters = inspect.signature(constructor).parameters
    assert hints["lr"] == Schedule and hints["clip_norm"] == float | None
    assert all(hints[key] in (float, bool) for key in parameters if key not in ("lr", "clip_norm"))
    assert [key for key, p in parameters.items() if p.default is p.empty] == ["lr"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"lr": 0}, "lr = 0 is not allowed: give a number above 0, or a schedule that starts above 0"),
        ("sgd", {"lr": float("nan")}, "lr = nan"),
        ("sgd", {"lr": "0.1"}, "lr = '0.1'"),
        ("sgd", {"lr": constant(0.0)}, "lr = 0.0 is not allowed"),
        ("sgd", {"lr": lambda round: -1.0}, "lr = -1.0 is not allowed"),
        ("sgd", {"weight_decay": -0.1}, "weight_decay = -0.1 is not allowed: give a number of at least 0"),
        ("sgd", {"clip_norm": 0.0}, "clip_norm = 0.0 is not allowed: give a number above 0"),
        ("sgd", {"clip_norm": float("inf")}, "clip_norm = inf"),
        ("momentum", {"momentum": 1.0}, "momentum = 1.0 is not allowed: give a number in [0, 1)"),
        ("nesterov", {"momentum": -0.5}, "momentum = -0.5"),
        ("fedavgm", {"beta": 1.5}, "beta = 1.5"),
        ("adam", {"beta1": 1.0}, "beta1 = 1.0 is not allowed: give a number in [0, 1)"),
        ("adamw", {"beta2": -0.1}, "beta2 = -0.1"),
        ("yogi", {"eps": 0.0}, "eps = 0.0 is not allowed: give a number above 0"),
        ("adagrad", {"eps": -1.0}, "eps = -1.0"),
        ("fedadam", {"tau": 0.0}, "tau = 0.0 is not allowed: give a number above 0"),
        ("fedyogi", {"beta2": 1.0}, "beta2 = 1.0"),
        ("fedadagrad", {"beta1": True}, "beta1 = True"),
        ("fedadagrad", {"tau": "1e-3"}, "tau = '1e-3'"),
    ],
)
def test_bad_options_are_refused_by_name_value_and_range(name, options, message):
    with pytest.raises(UserError) as error:
        make(name, **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
