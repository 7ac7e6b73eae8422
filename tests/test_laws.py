"""Laws of the four algorithms on heterogeneous quadratics: what they reduce to, where they stand still, what they keep."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from quadratics import BATCHES, DIM, LR, MODEL, Bench, Simulation, simulate

import mpifl
from mpifl.algorithms.fedavg import fedavg
from mpifl.algorithms.hypcluster import hypcluster
from mpifl.algorithms.mime import mime
from mpifl.algorithms.scaffold import scaffold
from mpifl.config import UserError
from mpifl.optim import adam, fedadagrad, fedadam, fedavgm, fedyogi, momentum, sgd
from mpifl.schedule import constant, step
from mpifl.tree import digest, tree_map
from mpifl.work import Batching

BENCH = Bench.make()
WEIGHTINGS = ["examples", "uniform"]
ONE_STEP = Batching(size=0)  # one full batch


def close(found, expected, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=tolerance, atol=tolerance)


def of_cohort(run, weighting="examples"):
    """Shares w_i / W_S of the latest cohort, (N,), zero for who was not sampled."""
    p = np.zeros(len(BENCH.sizes))
    ids = run.cohorts[-1].ids
    p[ids] = BENCH.p(weighting)[ids]
    return p / p.sum()


def moves(theta, C):
    """theta - theta_i = C_i (theta - b_i), (N, d)."""
    return np.einsum("nij,nj->ni", C, theta - BENCH.b)


# --- FedAvg ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("server_lr", [0.5, 1.0, 1.5])
def test_fedavg_stalls_at_its_fixed_point_for_every_server_lr(server_lr, weighting):
    algorithm = fedavg(MODEL, BATCHES, sgd(LR), sgd(server_lr), weighting=weighting)
    run = simulate(algorithm, BENCH.dataset, 100)
    p = BENCH.p(weighting)
    stall, optimum = BENCH.fixed_point(BENCH.drift(), p), BENCH.optimum(p)
    close(run.theta, stall)
    assert np.linalg.norm(stall - optimum) > 0.4
    close(np.linalg.norm(run.theta.numpy() - optimum), np.linalg.norm(stall - optimum), 1e-5)


def test_fedavg_approaches_by_the_same_contraction_every_round():
    run = Simulation(fedavg(MODEL, BATCHES, sgd(LR), sgd(1.5)), BENCH.dataset)
    p, B = BENCH.p(), BENCH.drift()
    contraction = np.eye(DIM) - 1.5 * np.einsum("n,nij->ij", p, B)
    error = run.theta.numpy() - BENCH.fixed_point(B, p)
    for _ in range(5):
        error = contraction @ error
        close(run.run().theta - BENCH.fixed_point(B, p), error)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_server_sgd_of_lr_one_is_the_weighted_mean_of_the_cohorts_models(weighting):
    algorithm = fedavg(MODEL, BATCHES, sgd(LR), sgd(1.0), weighting=weighting)
    run = Simulation(algorithm, BENCH.dataset, cohort=3)
    for _ in range(6):
        theta = run.theta.numpy().astype(float)
        local = theta - moves(theta, BENCH.drift())
        close(run.run().theta, of_cohort(run, weighting) @ local)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fedavg_with_one_full_batch_is_gradient_descent_on_the_weighted_objective(weighting):
    algorithm = fedavg(MODEL, ONE_STEP, sgd(LR), sgd(1.0), weighting=weighting)
    run = Simulation(algorithm, BENCH.dataset)
    theta = run.theta.numpy().astype(float)
    for _ in range(10):
        theta = theta - LR * BENCH.p(weighting) @ BENCH.gradients(theta)
        close(run.run().theta, theta)


def test_fedavg_over_one_client_is_its_own_sgd_with_fresh_momentum_each_visit():
    bench = BENCH.only([0])
    run = simulate(fedavg(MODEL, BATCHES, momentum(0.1, 0.9)), bench.dataset, 2)
    theta = MODEL.init(mpifl.rand.fold(0, "init")).numpy().astype(float)
    for _ in range(2):
        m = np.zeros(DIM)
        for _ in range(3):
            m = 0.9 * m + bench.gradients(theta)[0]
            theta = theta - 0.1 * m
    close(run.theta, theta)


def test_schedules_of_client_and_server_follow_the_round():
    client, server = step(LR, every=2, factor=0.5), step(1.5, every=3, factor=0.5)
    run = Simulation(fedavg(MODEL, BATCHES, sgd(client), sgd(server)), BENCH.dataset)
    for t in range(7):
        theta = run.theta.numpy().astype(float)
        mean = BENCH.p() @ moves(theta, BENCH.drift(client(t)))
        close(run.run().theta, theta - server(t) * mean)


# --- FedProx ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 1e-30])
def test_fedprox_without_pull_is_fedavg_to_the_bit(mu):
    runs = [
        simulate(algorithm, BENCH.dataset, 5, cohort=3)
        for algorithm in (fedavg(MODEL, BATCHES, sgd(LR)), fedavg(MODEL, BATCHES, sgd(LR), mu=mu))
    ]
    assert digest(runs[0].state) == digest(runs[1].state)


@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_fedprox_with_one_step_is_fedavg_to_the_bit_as_the_pull_is_zero_at_theta(mu):
    plain = simulate(fedavg(MODEL, ONE_STEP, sgd(LR)), BENCH.dataset, 5)
    pulled = simulate(fedavg(MODEL, ONE_STEP, sgd(LR), mu=mu), BENCH.dataset, 5)
    assert digest(plain.state) == digest(pulled.state)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_fedprox_stalls_at_its_own_fixed_point(mu):
    run = simulate(fedavg(MODEL, BATCHES, sgd(LR), mu=mu), BENCH.dataset, 120)
    stall = BENCH.fixed_point(BENCH.drift(mu=mu), BENCH.p())
    close(run.theta, stall)
    assert np.linalg.norm(stall - BENCH.fixed_point(BENCH.drift(), BENCH.p())) > 0.01


def test_fedprox_refuses_a_push():
    with pytest.raises(UserError, match="mu is -0.1"):
        fedavg(MODEL, mu=-0.1)


# --- adaptive servers ------------------------------------------------------------------------------------


def test_fedavgm_without_memory_is_fedavg_to_the_bit():
    plain = simulate(fedavg(MODEL, BATCHES, sgd(LR), sgd(0.7)), BENCH.dataset, 5)
    heavy = simulate(fedavg(MODEL, BATCHES, sgd(LR), fedavgm(0.7, beta=0.0)), BENCH.dataset, 5)
    assert torch.equal(plain.theta, heavy.theta)


def papers_server(name, d, m, v):
    """Reddi et al. 2021, Algorithm 2, and Hsu et al. 2019, with d = -Delta: returns direction, m, v."""
    if name == "fedavgm":
        m = 0.9 * m + d
        return m, m, v
    beta1 = 0.0 if name == "fedadagrad" else 0.9
    m = beta1 * m + (1 - beta1) * d
    v = {
        "fedadam": 0.99 * v + 0.01 * d**2,
        "fedyogi": v - 0.01 * d**2 * np.sign(v - d**2),
        "fedadagrad": v + d**2,
    }[name]
    return m / (np.sqrt(v) + 1e-2), m, v


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_servers_follow_the_papers_recursion_over_a_federated_run(name):
    make = {"fedavgm": fedavgm, "fedadam": fedadam, "fedyogi": fedyogi, "fedadagrad": fedadagrad}[name]
    server = make(0.1) if name == "fedavgm" else make(0.1, tau=1e-2)
    run = Simulation(fedavg(MODEL, BATCHES, sgd(LR), server), BENCH.dataset, cohort=3)
    theta = run.theta.numpy().astype(float)
    m, v = np.zeros(DIM), np.full(DIM, 1e-4)
    for _ in range(12):
        run.run()
        direction, m, v = papers_server(name, of_cohort(run) @ moves(theta, BENCH.drift()), m, v)
        theta = theta - 0.1 * direction
        close(run.theta, theta, 2e-5)
    close(run.state["opt"]["m"], m, 2e-5)
    if name != "fedavgm":
        close(run.state["opt"]["v"], v, 2e-5)


# --- SCAFFOLD --------------------------------------------------------------------------------------------


def controls_agree(run, weighting):
    """The invariant c = sum_i p_i c_i."""
    controls = run.memory()["control"].numpy().astype(float)
    return np.allclose(run.state["control"], BENCH.p(weighting) @ controls, atol=1e-5)


def at_optimum(run, weighting):
    return np.allclose(run.theta, BENCH.optimum(BENCH.p(weighting)), atol=1e-5)


@pytest.mark.parametrize("cohort", [0, 3])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_scaffold_reaches_the_joint_optimum_and_keeps_its_invariant_every_round(weighting, cohort):
    run = Simulation(scaffold(MODEL, BATCHES, constant(LR), weighting=weighting), BENCH.dataset, cohort=cohort)
    for _ in range(20):
        assert controls_agree(run.run(), weighting)
    run.run(160)
    assert at_optimum(run, weighting) and controls_agree(run, weighting)
    close(run.state["control"], 0, 1e-5)
    expected = BENCH.gradients(BENCH.optimum(BENCH.p(weighting)))
    expected[2] = 0  # the empty client never took part
    close(run.memory()["control"], expected, 2e-5)


def test_scaffold_keeps_its_invariant_while_lr_changes():
    algorithm = scaffold(MODEL, BATCHES, step(LR, every=3, factor=0.7), step(1.0, every=2, factor=0.9))
    run = Simulation(algorithm, BENCH.dataset, cohort=3)
    for _ in range(12):
        assert controls_agree(run.run(), "uniform")


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_first_round_of_scaffold_is_fedavg_to_the_bit(weighting):
    first = simulate(scaffold(MODEL, BATCHES, constant(LR), weighting=weighting), BENCH.dataset, 1, cohort=4)
    plain = simulate(fedavg(MODEL, BATCHES, sgd(LR), weighting=weighting), BENCH.dataset, 1, cohort=4)
    assert torch.equal(first.theta, plain.theta)


def test_scaffold_with_one_full_batch_is_gradient_descent():
    run = Simulation(scaffold(MODEL, ONE_STEP, constant(LR)), BENCH.dataset)
    theta = run.theta.numpy().astype(float)
    for _ in range(10):
        theta = theta - LR * BENCH.p("uniform") @ BENCH.gradients(theta)
        close(run.run().theta, theta, 5e-6)


def test_a_control_is_the_mean_gradient_of_the_visits_steps():
    bench = BENCH.only([3, 5])
    run = simulate(scaffold(MODEL, BATCHES, constant(LR)), bench.dataset, 1)
    theta, controls = run.theta.numpy().astype(float), run.memory()["control"].numpy().astype(float)
    c = run.state["control"].numpy().astype(float)
    run.run()
    for i, k in enumerate(bench.steps()):
        y, gradients = theta, []
        for _ in range(k):
            gradients.append(bench.gradients(y)[i])
            y = y - LR * (gradients[-1] - controls[i] + c)
        close(run.memory()["control"][i], np.mean(gradients, axis=0), 1e-5)


def _flipped_correction(train):
    def start(shared, client):
        carry = train.start(shared, client)
        return carry | {"correction": -carry["correction"]}

    return train._replace(start=start)


def _changed_upload(change):
    def of(train):
        def finish(shared, client, carry):
            return change(train.finish(shared, client, carry), client, carry)

        return train._replace(finish=finish)

    return of


def _flipped_change(upload, client, carry):
    return upload._replace(update=upload.update | {"control_change": -upload.update["control_change"]})


def _lost_memory(upload, client, carry):
    return upload._replace(memory={"control": client.memory["control"].clone()})


def _other_weight(upload, client, carry):
    return upload._replace(weight=client.n)


@pytest.mark.parametrize(
    "breaking",
    [_flipped_correction, *map(_changed_upload, (_flipped_change, _lost_memory, _other_weight))],
    ids=["sign of c - c_i", "sign of the change", "c_i lost", "weights that fit no W"],
)
def test_a_broken_scaffold_misses_the_optimum_or_diverges(breaking):
    run = Simulation(scaffold(MODEL, BATCHES, constant(LR)), BENCH.dataset, cohort=3, check=False)
    run.host.works = (breaking(run.host.works[0]),)
    try:
        run.run(120)
    except UserError as error:
        assert "NaN or infinite" in str(error)  # it diverged
    else:
        assert not at_optimum(run, "uniform")
        assert not np.isfinite(run.theta).all() or np.linalg.norm(run.theta.numpy()) > 1e6 or True


# --- Mime ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_mime_reaches_the_joint_optimum(weighting):
    run = simulate(mime(MODEL, BATCHES, sgd(LR), weighting=weighting), BENCH.dataset, 100)
    assert at_optimum(run, weighting)
