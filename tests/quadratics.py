"""The quadratic bench: f_i(x) = 1/2 (x - b_i)^T A_i (x - b_i), where every fixed point has a closed form.

Every example row carries (A_i, b_i): any batch gives the exact gradient, while n_i sets weights and steps. K
steps of gradient descent from theta give theta - theta_i = B_i (theta - b_i), B_i = I - (I - lr A_i)^K_i, and a
rule whose mean upload is sum_i p_i C_i (theta - b_i) stands still at FP(C) = (sum p_i C_i)^-1 sum p_i C_i b_i.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mpifl.comm import Alone
from mpifl.config import Engine
from mpifl.data.memory import MemoryDataset
from mpifl.engine.clock import Clock
from mpifl.engine.host import Host
from mpifl.engine.store import ClientMemory
from mpifl.fleet import Fleet
from mpifl.model import Model
from mpifl.rand import fold, sample
from mpifl.work import Batching, Cohort

torch.set_num_threads(1)  # as every job does unless told otherwise

DIM = 3
SIZES = (7, 2, 0, 12, 4, 9)  # unequal, client 2 empty
BATCHES = Batching(size=3)  # K = 3, 1, 0, 4, 2, 3
LR = 0.25  # exact in float32


def _losses(theta, batch):
    away = theta - batch["b"]
    return 0.5 * ((batch["A"] @ away[..., None])[..., 0] * away).sum(dim=-1)


MODEL = Model(
    size=DIM,
    init=lambda seed: torch.from_numpy(np.random.default_rng(seed).normal(size=DIM).astype(np.float32)),
    scores=_losses,
    loss=lambda scores, batch: scores,
)


@dataclass(frozen=True)
class Bench:
    """Clients i: A_i (N, d, d) positive definite, b_i (N, d), both float64 and exact in float32; n_i."""

    A: np.ndarray
    b: np.ndarray
    sizes: tuple[int, ...]

    @staticmethod
    def make(seed=13, sizes=SIZES, centres=0.0, spread=3.0):
        """Curvatures between 0.6 and 2.4 in directions of each client's own; b_i = centres + spread * normal."""
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(len(sizes), DIM, DIM)))[0]
        curvature = rng.uniform(0.6, 2.4, size=(len(sizes), DIM))
        A = np.einsum("nik,nk,njk->nij", basis, curvature, basis)
        b = np.asarray(centres) + spread * rng.normal(size=(len(sizes), DIM))
        return Bench(np.round(A * 64) / 64, np.round(b * 64) / 64, tuple(sizes))

    def only(self, clients):
        """These clients alone, in this order."""
        return Bench(self.A[clients], self.b[clients], tuple(np.asarray(self.sizes)[clients]))

    @property
    def dataset(self):
        rows = [
            {"A": np.tile(A, (n, 1, 1)).astype(np.float32), "b": np.tile(b, (n, 1)).astype(np.float32)}
            for A, b, n in zip(self.A, self.b, self.sizes)
        ]
        return MemoryDataset(rows)

    def p(self, weighting="examples"):
        """Shares w_i / W, (N,)."""
        weights = np.asarray(self.sizes, dtype=float)
        weights = weights if weighting == "examples" else (weights > 0).astype(float)
        return weights / weights.sum()

    def steps(self, batches=BATCHES):
        """K_i, (N,)."""
        return batches.steps_of(np.asarray(self.sizes))

    def drift(self, lr=LR, batches=BATCHES, mu=0.0):
        """C_i with theta - theta_i = C_i (theta - b_i) after K_i steps, (N, d, d); mu: FedProx's."""
        pulled = self.A + mu * np.eye(DIM)
        power = [np.linalg.matrix_power(np.eye(DIM) - lr * a, k) for a, k in zip(pulled, self.steps(batches))]
        return (np.eye(DIM) - np.asarray(power)) @ np.linalg.inv(pulled) @ self.A

    def fixed_point(self, C, p):
        """FP(C), (d,)."""
        mean = np.einsum("n,nij->ij", p, C)
        return np.linalg.solve(mean, np.einsum("n,nij,nj->i", p, C, self.b))

    def optimum(self, p):
        """theta*(p), where sum_i p_i grad f_i = 0."""
        return self.fixed_point(self.A, p)

    def gradients(self, theta):
        """grad f_i(theta), (N, d)."""
        return np.einsum("nij,nj->ni", self.A, np.asarray(theta) - self.b)


class Simulation:
    """An algorithm over a fleet of one process, round by round as `mpifl.train` runs it."""

    def __init__(self, algorithm, dataset, seed=0, cohort=0, model=MODEL, tolerate=0, exact=True, check=True):
        self.algorithm, self.dataset, self.seed, self.size = algorithm, dataset, seed, cohort
        theta = model.init(fold(seed, "init"))
        memory = ClientMemory(algorithm.memory(theta))
        self.host = Host(algorithm.works, dataset, memory, seed, Clock(), exact=exact, engine=Engine(check=check))
        self.fleet = Fleet(Alone(), self.host, tolerate, say=lambda line: None)
        self.state = algorithm.init(theta)
        self.round = 0
        self.cohorts = []

    @property
    def theta(self):
        return self.state["theta"].numpy().astype(float)

    def run(self, rounds=1):
        for _ in range(rounds):
            self.fleet.begin(self.round)
            cohort = self._cohort()
            new = self.algorithm.round(self.state, cohort)
            if cohort.latest.count:
                self.state = new
            self.fleet.accepted = self.round
            self.cohorts.append(cohort)
            self.round += 1
        return self

    def memory(self):
        """What all clients keep, leaves (N, ...), once the latest round has become current."""
        self.host.settle(self.round, self.fleet.accepted)
        return self.host.memory.read(range(self.dataset.clients))

    def _cohort(self):
        sizes = self.dataset.sizes("train")
        batches = self.algorithm.works[-1].batches
        able = batches.steps_of(sizes) > 0
        by_examples = self.algorithm.weighting == "examples"
        weights = batches.examples_used(sizes) if by_examples else np.ones(len(sizes))
        ids = sample(fold(self.seed, "cohort", self.round), len(sizes), self.size or len(sizes))
        return Cohort(self.round, ids, int(able.sum()), float(weights[able].sum()), self.fleet.ask)


def dataset_of_a_job():
    """For data.path = "quadratics:dataset_of_a_job": two of three clients are empty."""
    return Bench.make(sizes=(7, 0, 0, 12, 0, 0)).dataset


def model_of_a_job(features):
    return MODEL


def simulate(algorithm, dataset, rounds, seed=0, cohort=0, **options):
    """Run `rounds` rounds; options as Simulation's."""
    return Simulation(algorithm, dataset, seed, cohort, **options).run(rounds)
