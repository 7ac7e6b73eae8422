"""Laws of the four algorithms on heterogeneous quadratics: what they reduce to, and where they stand still."""

import json

import numpy as np
import pytest
import torch
from quadratics import BATCHES, DIM, LR, MODEL, Bench, Simulation, dataset_of_a_job, simulate

import mpifl
from mpifl.algorithms.fedavg import fedavg
from mpifl.algorithms.hypcluster import hypcluster
from mpifl.algorithms.mime import mime
from mpifl.algorithms.scaffold import scaffold
from mpifl.config import UserError
from mpifl.data.memory import MemoryDataset
from mpifl.optim import fedadagrad, fedadam, fedavgm, fedyogi, momentum, sgd
from mpifl.rand import fold
from mpifl.schedule import constant, step
from mpifl.scoring import Scorer, score_state
from mpifl.tree import digest
from mpifl.work import Batching, ClientWork, Upload

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
@pytest.mark.parametrize("server_lr, rounds", [(0.7, 34), (1.0, 23), (1.3, 15)])
def test_fedavg_stalls_at_its_fixed_point_for_every_server_lr(server_lr, rounds, weighting):
    algorithm = fedavg(MODEL, BATCHES, sgd(LR), sgd(server_lr), weighting=weighting)
    run = simulate(algorithm, BENCH.dataset, rounds)
    p = BENCH.p(weighting)
    stall, optimum = BENCH.fixed_point(BENCH.drift(), p), BENCH.optimum(p)
    close(run.theta, stall)
    assert np.linalg.norm(stall - optimum) > 0.7
    close(np.linalg.norm(run.theta - optimum), np.linalg.norm(stall - optimum), 1e-5)


def test_fedavg_approaches_by_the_same_contraction_every_round():
    run = Simulation(fedavg(MODEL, BATCHES, sgd(LR), sgd(1.5)), BENCH.dataset)
    p, B = BENCH.p(), BENCH.drift()
    contraction = np.eye(DIM) - 1.5 * np.einsum("n,nij->ij", p, B)
    error = run.theta - BENCH.fixed_point(B, p)
    for _ in range(5):
        error = contraction @ error
        close(run.run().theta - BENCH.fixed_point(B, p), error)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_server_sgd_of_lr_one_is_the_weighted_mean_of_the_cohorts_models(weighting):
    algorithm = fedavg(MODEL, BATCHES, sgd(LR), sgd(1.0), weighting=weighting)
    run = Simulation(algorithm, BENCH.dataset, cohort=3)
    for _ in range(6):
        theta = run.theta
        local = theta - moves(theta, BENCH.drift())
        close(run.run().theta, of_cohort(run, weighting) @ local)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fedavg_with_one_full_batch_is_gradient_descent_on_the_weighted_objective(weighting):
    algorithm = fedavg(MODEL, ONE_STEP, sgd(LR), sgd(1.0), weighting=weighting)
    run = Simulation(algorithm, BENCH.dataset)
    theta = run.theta
    for _ in range(10):
        theta = theta - LR * BENCH.p(weighting) @ BENCH.gradients(theta)
        close(run.run().theta, theta)


def test_fedavg_over_one_client_is_its_own_sgd_with_fresh_momentum_each_visit():
    bench = BENCH.only([0])
    run = simulate(fedavg(MODEL, BATCHES, momentum(0.1, 0.9)), bench.dataset, 2)
    theta = MODEL.init(fold(0, "init")).numpy().astype(float)
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
        theta = run.theta
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
    run = simulate(fedavg(MODEL, BATCHES, sgd(LR), mu=mu), BENCH.dataset, 28)
    stall = BENCH.fixed_point(BENCH.drift(mu=mu), BENCH.p())
    close(run.theta, stall)
    assert np.linalg.norm(stall - BENCH.fixed_point(BENCH.drift(), BENCH.p())) > 0.01


def test_fedprox_refuses_a_push():
    with pytest.raises(UserError, match=r"mu is -0\.1"):
        fedavg(MODEL, mu=-0.1)


# --- adaptive servers ------------------------------------------------------------------------------------


def test_fedavgm_without_memory_is_fedavg_to_the_bit():
    plain = simulate(fedavg(MODEL, BATCHES, sgd(LR), sgd(0.7)), BENCH.dataset, 5)
    heavy = simulate(fedavg(MODEL, BATCHES, sgd(LR), fedavgm(0.7, beta=0.0)), BENCH.dataset, 5)
    assert torch.equal(plain.state["theta"], heavy.state["theta"])


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
    theta = run.theta
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


@pytest.mark.parametrize("cohort, rounds", [(0, 20), (3, 60)])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_scaffold_reaches_the_joint_optimum_and_keeps_its_invariant_every_round(weighting, cohort, rounds):
    run = Simulation(scaffold(MODEL, BATCHES, constant(LR), weighting=weighting), BENCH.dataset, cohort=cohort)
    for _ in range(rounds):
        assert controls_agree(run.run(), weighting)
    assert at_optimum(run, weighting)
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
    assert torch.equal(first.state["theta"], plain.state["theta"])


def test_scaffold_with_one_full_batch_is_gradient_descent():
    run = Simulation(scaffold(MODEL, ONE_STEP, constant(LR)), BENCH.dataset)
    theta = run.theta
    for _ in range(10):
        theta = theta - LR * BENCH.p("uniform") @ BENCH.gradients(theta)
        close(run.run().theta, theta, 5e-6)


def test_a_control_is_the_mean_gradient_of_the_visits_steps():
    bench = BENCH.only([3, 5])
    run = simulate(scaffold(MODEL, BATCHES, step(LR, every=1, factor=0.5)), bench.dataset, 1)
    theta, controls = run.theta, run.memory()["control"].numpy().astype(float)
    c = run.state["control"].numpy().astype(float)
    run.run()
    for i, k in enumerate(bench.steps()):
        y, gradients = theta, []
        for _ in range(k):
            gradients.append(bench.gradients(y)[i])
            y = y - 0.5 * LR * (gradients[-1] - controls[i] + c)
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
        run.run(60)
    except UserError as error:
        assert "NaN or infinite" in str(error)  # it diverged
    else:
        assert not at_optimum(run, "uniform")


# --- Mime ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_mime_reaches_the_joint_optimum(weighting):
    run = simulate(mime(MODEL, BATCHES, sgd(LR), weighting=weighting), BENCH.dataset, 18)
    assert at_optimum(run, weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_round_of_mime_moves_along_the_cohorts_gradient_corrected_for_every_step(weighting):
    # theta - sum_S p_i B_i A_i^-1 grad F_S(theta). With sgd no cohort but the whole population stops at theta*.
    run = Simulation(mime(MODEL, BATCHES, sgd(LR), weighting=weighting), BENCH.dataset, cohort=3)
    for _ in range(6):
        theta = run.theta
        run.run()
        p = of_cohort(run, weighting)
        paths = np.einsum("n,nij->ij", p, BENCH.drift() @ np.linalg.inv(BENCH.A))
        close(run.theta, theta - paths @ (p @ BENCH.gradients(theta)), 5e-6)


def test_mime_holds_the_servers_momentum_still_on_clients_and_observes_once_a_round():
    run = Simulation(mime(MODEL, BATCHES, momentum(0.1, 0.9)), BENCH.dataset)
    m = np.zeros(DIM)
    for _ in range(4):
        theta = run.theta
        c = BENCH.p() @ BENCH.gradients(theta)
        local = []
        for i, k in enumerate(BENCH.steps()):
            y = theta
            for _ in range(k):
                y = y - 0.1 * (BENCH.gradients(y)[i] - BENCH.gradients(theta)[i] + c + 0.9 * m)
            local.append(y)
        m = 0.9 * m + c
        close(run.run().theta, BENCH.p() @ local, 5e-6)
        close(run.state["opt"]["m"], m, 5e-6)


def centralized(name, theta, rounds):
    """The base optimizer on the whole objective: U with the statistics before V, as Mime's clients use them."""
    m, v, lr = np.zeros(DIM), np.full(DIM, 1e-4), 0.1
    for _ in range(rounds):
        gradient = BENCH.p() @ BENCH.gradients(theta)
        if name == "fedadam":
            m = 0.9 * m + 0.1 * gradient
            theta = theta - lr * m / (np.sqrt(v) + 1e-2)
            v = 0.99 * v + 0.01 * gradient**2
            continue
        gradient = gradient + 0.05 * theta * (name == "momentum with weight decay")
        m = (0.0 if name == "sgd" else 0.9) * m + gradient
        theta = theta - lr * m
    return theta


BASES = {
    "sgd": sgd(0.1),
    "momentum": momentum(0.1, 0.9),
    "momentum with weight decay": momentum(0.1, 0.9, weight_decay=0.05),
    "fedadam": fedadam(0.1, tau=1e-2),
}


@pytest.mark.parametrize("name", BASES)
def test_mime_with_one_full_batch_is_its_centralized_base_optimizer(name):
    run = Simulation(mime(MODEL, ONE_STEP, BASES[name]), BENCH.dataset)
    start = run.theta
    for rounds in (1, 2, 8):
        close(run.run(rounds - run.round).theta, centralized(name, start, rounds), 2e-5)


def test_mimes_gradient_pass_may_be_cut_into_batches():
    whole = simulate(mime(MODEL, BATCHES, momentum(0.1)), BENCH.dataset, 3)
    pieces = simulate(mime(MODEL, BATCHES, momentum(0.1), gradient_size=2), BENCH.dataset, 3)
    close(whole.theta, pieces.theta)


# --- HypCluster ------------------------------------------------------------------------------------------


def clustered(bench, thetas, rounds=1, **options):
    """HypCluster from these vectors, (k, d)."""
    options = {"client_opt": sgd(LR)} | options
    run = Simulation(hypcluster(MODEL, len(thetas), BATCHES, **options), bench.dataset)
    run.state["thetas"] = torch.tensor(np.asarray(thetas), dtype=torch.float32)
    return run.run(rounds)


def test_hypcluster_with_one_cluster_is_fedavg_to_the_bit():
    for weighting in WEIGHTINGS:
        server = fedadam(0.1)
        options = {"client_opt": sgd(LR), "server_opt": server, "weighting": weighting}
        one = simulate(hypcluster(MODEL, 1, BATCHES, **options), BENCH.dataset, 8, cohort=3)
        plain = simulate(fedavg(MODEL, BATCHES, **options), BENCH.dataset, 8, cohort=3)
        assert torch.equal(one.state["thetas"][0], plain.state["theta"])
        assert digest(one.state["opt"]["0"]) == digest(plain.state["opt"])


def test_clusters_separate_two_groups_and_each_stalls_where_fedavg_would_on_its_members():
    centres = np.asarray([40.0, -40.0, 40.0, 40.0, -40.0, -40.0])[:, None] * np.ones(DIM)
    bench = Bench.make(centres=centres)
    run = clustered(bench, np.asarray([-np.ones(DIM), np.ones(DIM)]), 28)
    for j, members in enumerate(([1, 4, 5], [0, 3])):
        group = bench.only(members)
        close(run.state["thetas"][j], group.fixed_point(group.drift(), group.p()), 1e-5)


def test_each_client_trains_the_model_that_serves_its_data_best():
    thetas = np.asarray([[2.0, -1.0, 0.5], [-2.0, 1.0, 3.0], [0.0, 0.0, -2.0]])
    away = thetas[:, None] - BENCH.b
    choice = np.einsum("kni,nij,knj->kn", away, BENCH.A, away).argmin(axis=0)
    assert set(choice[[0, 1, 3, 4, 5]]) == {0, 1, 2}
    run = clustered(BENCH, thetas)
    for j in range(3):
        p = BENCH.p() * (choice == j)
        close(run.state["thetas"][j], thetas[j] - p @ moves(thetas[j], BENCH.drift()) / p.sum())


def test_a_tie_goes_to_the_lowest_cluster():
    theta = np.ones(DIM)
    run = clustered(BENCH, [theta, theta])
    assert not np.allclose(run.state["thetas"][0], theta)
    assert torch.equal(run.state["thetas"][1], torch.ones(DIM))


def test_a_cluster_that_nobody_chose_stays_untouched_with_its_optimizer():
    run = clustered(BENCH, [np.zeros(DIM), np.full(DIM, 1e3)], server_opt=fedadam(step(0.1, 1, 0.5)))
    run.state["opt"]["1"]["m"] += 1.0  # something to lose
    before = digest({"theta": run.state["thetas"][1], "opt": run.state["opt"]["1"]})
    run.run(3)
    assert digest({"theta": run.state["thetas"][1], "opt": run.state["opt"]["1"]}) == before


def test_permuting_clusters_permutes_the_result_to_the_bit():
    thetas = np.asarray([[2.0, -1.0, 0.5], [-2.0, 1.0, 3.0], [0.0, 0.0, -2.0]])
    order = [2, 0, 1]
    plain = clustered(BENCH, thetas, 4, server_opt=fedadam(0.5))
    permuted = clustered(BENCH, thetas[order], 4, server_opt=fedadam(0.5))
    assert torch.equal(permuted.state["thetas"], plain.state["thetas"][order])
    for new, old in enumerate(order):
        assert digest(permuted.state["opt"][str(new)]) == digest(plain.state["opt"][str(old)])


def test_choosing_may_be_cut_into_batches():
    thetas = np.asarray([[2.0, -1.0, 0.5], [-2.0, 1.0, 3.0]])
    whole, pieces = clustered(BENCH, thetas, 3), clustered(BENCH, thetas, 3, loss_size=2)
    assert digest(whole.state) == digest(pieces.state)


def test_a_client_with_rows_to_score_but_none_to_choose_by_is_scored_with_the_first_cluster():
    bench = Bench.make()  # client 2 has no row to train on
    sized = Bench(bench.A, bench.b, (3, 3, 3, 3, 3, 3)).dataset
    dataset = MemoryDataset(
        [bench.dataset.client("train", i) for i in range(6)], test=[sized.client("train", i) for i in range(6)]
    )
    algorithm = hypcluster(MODEL, 2, BATCHES)
    scorer = Scorer.of(algorithm, MODEL, {}, dataset)
    run = Simulation(algorithm._replace(works=(*algorithm.works, *scorer.works)), dataset)
    thetas = np.asarray([[2.0, -1.0, 0.5], [-2.0, 1.0, 3.0]])
    run.state["thetas"] = torch.tensor(thetas, dtype=torch.float32)
    away = thetas[:, None] - bench.b
    losses = 0.5 * np.einsum("kni,nij,knj->kn", away, bench.A, away)
    expected = np.where(np.arange(6) == 2, losses[0], losses.min(axis=0)).mean()
    assert losses[0, 2] != losses[:, 2].min()
    close(score_state(run.fleet, scorer, algorithm, run.state)["loss"], expected)


# --- all of them -----------------------------------------------------------------------------------------

ALL = {
    "fedavg": lambda weighting: fedavg(MODEL, BATCHES, sgd(LR), fedadam(0.1), mu=0.1, weighting=weighting),
    "scaffold": lambda weighting: scaffold(MODEL, BATCHES, constant(LR), weighting=weighting),
    "mime": lambda weighting: mime(MODEL, BATCHES, momentum(0.1), weighting=weighting),
    "hypcluster": lambda weighting: hypcluster(
        MODEL, 2, BATCHES, sgd(LR), fedadam(0.1), weighting=weighting, loss_size=4
    ),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", ALL)
def test_empty_clients_change_no_bit(name, weighting):
    full = BENCH.only([0, 1, 3, 4, 5])
    padded = Bench(
        np.concatenate([full.A, full.A[:3]]), np.concatenate([full.b, full.b[:3] + 9]), (*full.sizes, 0, 0, 0)
    )
    runs = [simulate(ALL[name](weighting), bench.dataset, 6) for bench in (full, padded)]
    assert digest(runs[0].state) == digest(runs[1].state)


@pytest.mark.parametrize("name", ALL)
def test_relabelling_clients_changes_no_bit(name):
    order = [4, 2, 5, 0, 3, 1]
    plain = simulate(ALL[name]("examples"), BENCH.dataset, 6)
    relabelled = simulate(ALL[name]("examples"), BENCH.only(order).dataset, 6)
    assert digest(plain.state) == digest(relabelled.state)
    if name == "scaffold":
        assert torch.equal(relabelled.memory()["control"], plain.memory()["control"][order])


@pytest.mark.parametrize("name", ALL)
def test_copies_of_a_client_are_as_good_as_one_of_their_size(name):
    one, copies = Bench.make(sizes=(6,)), Bench.make(sizes=(6,)).only([0, 0, 0])
    runs = [simulate(ALL[name]("uniform"), bench.dataset, 5) for bench in (one, copies)]
    for leaf, other in zip(*(run.algorithm.models(run.state).values() for run in runs)):
        close(leaf, other)


@pytest.mark.parametrize("name", ALL)
def test_a_round_leaves_the_old_state_as_it_was(name):
    run = simulate(ALL[name]("examples"), BENCH.dataset, 2)
    old, before = run.state, digest(run.state)
    run.run()
    assert digest(old) == before != digest(run.state)


@pytest.mark.parametrize("name", ALL)
def test_a_run_is_a_function_of_its_seed(name):
    first, again, other = (
        digest(simulate(ALL[name]("examples"), BENCH.dataset, 3, seed, cohort=3).state) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_the_server_gives_reaches_the_client_it_is_meant_for():
    def finish(shared, client, carry):
        update = {"given": client.given["lr"] * 10.0**client.id, "sum": client.given["deep"]["rows"]}
        return Upload(update, torch.ones(()))

    work = ClientWork(lambda s, c: {}, lambda s, c, carry, b: carry, finish, BATCHES)
    run = Simulation(fedavg(MODEL)._replace(works=(work,)), BENCH.dataset)
    ids = np.asarray([5, 0, 2, 3])  # 2 is empty
    given = {"lr": torch.tensor([5.0, 1.0, 9.0, 3.0]), "deep": {"rows": torch.arange(8.0).view(4, 2)}}
    sums = run.fleet.ask(work, ids, given, {})
    assert float(sums.update["given"]) == 5e5 + 1e0 + 3e3
    assert sums.update["sum"].tolist() == [0.0 + 2 + 6, 1.0 + 3 + 7]


def test_scratch_lasts_from_ask_to_ask_of_a_round_and_no_longer():
    def finish(shared, client, carry):
        found = torch.tensor(float("mine" in client.scratch))
        return Upload({"found": found}, torch.ones(()), scratch={"mine": client.id})

    work = ClientWork(lambda s, c: {}, lambda s, c, carry, b: carry, finish, BATCHES)
    run = Simulation(fedavg(MODEL)._replace(works=(work,)), BENCH.dataset)
    for round in (0, 1):
        run.fleet.begin(round)
        found = [float(run.fleet.ask(work, np.asarray(ids), None, {}).update["found"]) for ids in ([0, 1], [1, 3])]
        run.fleet.accepted = round
        assert found == [0.0, 1.0]


def test_a_split_that_the_dataset_lacks_is_refused_at_the_start():
    with pytest.raises(UserError, match="no split of the dataset 'tran'; did you mean 'train'"):
        Simulation(fedavg(MODEL, Batching(split="tran")), BENCH.dataset)


JOBS = {
    "fedavg": {"client_opt": {"name": "sgd", "lr": 0.25}, "server_opt": {"name": "fedadam", "lr": 0.1}},
    "scaffold": {"client_lr": 0.25},
    "mime": {"base_opt": {"name": "momentum", "lr": 0.1}},
    "hypcluster": {"client_opt": {"name": "sgd", "lr": 0.25}, "server_opt": {"name": "fedavgm", "lr": 0.5}},
}


def run_job(name, rounds, out):
    """Run a job of six clients, four of them empty, one sampled a round; returns its summary."""
    job = {
        "seed": 3,
        "rounds": rounds,
        "cohort": 1,
        "data": {"path": "quadratics:dataset_of_a_job"},
        "model": {"name": "quadratics:model_of_a_job", "inputs": "b"},
        "algorithm": {"name": name, "batches": {"size": 3}, **JOBS[name]},
        "run": {"metrics": [], "out": str(out), "eval_every": 9},
    }
    return mpifl.run(job)


@pytest.mark.parametrize("name", JOBS)
def test_a_round_whose_clients_are_all_empty_leaves_state_and_memory_as_they_were(name, tmp_path):
    after = [run_job(name, rounds, tmp_path / str(rounds)) for rounds in (1, 2, 3, 4, 5)]
    lines = (tmp_path / "5" / "metrics.jsonl").read_text().splitlines()
    counted = [json.loads(line)["clients"] for line in lines]
    assert {0, 1} <= set(counted[1:])
    for clients, before, now in zip(counted[1:], after, after[1:]):
        assert (now["digest"] == before["digest"]) == (clients == 0)
        assert (now["memory_digest"] == before["memory_digest"]) == (clients == 0 or name != "scaffold")


def test_what_is_simulated_here_is_what_a_job_runs(tmp_path):
    summary = run_job("scaffold", 5, tmp_path / "run")
    run = simulate(scaffold(MODEL, BATCHES, constant(LR)), dataset_of_a_job(), 5, seed=3, cohort=1)
    assert digest(run.state) == summary["digest"]
    assert run.fleet.memory_digest() == summary["memory_digest"]
