"""One job on one rank: everything built, nothing started."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpifl.baselines import Baselines
from mpifl.build import Parts, build, solo_training
from mpifl.comm import Alone, World
from mpifl.config import Job, UserError, resolved
from mpifl.engine.clock import Clock
from mpifl.engine.device import gpu_of
from mpifl.engine.host import Host
from mpifl.engine.store import ClientMemory
from mpifl.faults import Turnout, Visit, asked, durations, turnout
from mpifl.fleet import Fleet
from mpifl.messages import NOBODY
from mpifl.model import Model, train_in
from mpifl.rand import fold, sample
from mpifl.results import read_vector
from mpifl.scoring import Scorer
from mpifl.sharded import refuse_unless_elementwise
from mpifl.tree import Tree, digest, leaves, one_row, tree_map
from mpifl.uplink.exact import decode
from mpifl.work import ClientWork, Cohort, Sums

_AT_ONCE = 1 << 18
"""Clients looked at together: the arrays made on the way are small beside the sizes of ten million."""


@dataclass
class Session:
    """A job's parts, and this rank's host of clients."""

    job: Job
    comm: World | Alone
    parts: Parts
    scorer: Scorer
    baselines: Baselines | None
    host: Host
    theta: Tensor
    _turnouts: dict[int, Turnout] = field(default_factory=dict)

    @staticmethod
    def open(job: Job, comm: World | Alone, clock: Clock) -> Session:
        """Build the job's parts and this rank's host."""
        torch.set_num_threads(job.run.threads)
        (device, shared), parts = _device(job, comm), build(job)
        _compute_in(job.engine.dtype, parts.model)
        what = (parts.algorithm, parts.model, parts.metrics, parts.dataset)
        scorer = Scorer.of(*what, job.run.eval_rows, job.seed, job.run.eval_batch)
        baselines = None
        if job.baselines:
            batches, opt = solo_training(job)
            baselines = Baselines.of(parts.model, batches, opt, job.baseline_epochs, parts.metrics, scorer)
        works = (*parts.algorithm.works, *scorer.works, *(baselines.works if baselines else ()))
        warm = job.run.warm_start
        theta = read_vector(Path(warm), parts.model) if warm else parts.model.init(fold(job.seed, "init"))
        host = Host(
            works,
            parts.dataset,
            ClientMemory(parts.algorithm.memory(theta), job.run.memory_mb << 20),
            job.seed,
            clock,
            comm.rank,
            comm.size,
            device,
            job.data.cache_mb << 20,
            exact=job.comm.sum == "exact",
            engine=job.engine,
            tolerant=job.faults.tolerate > 0,
        )
        if shared and (comm.rank == 0 or (comm.rank == 1 and not comm.seat.server)):  # one rank speaks for all
            host.say(shared)
        session = Session(job, comm, parts, scorer, baselines, host, theta)
        if job.comm.reduce == "sharded":
            state, size = parts.algorithm.init(theta.clone()), parts.model.size
            refuse_unless_elementwise(job.algorithm["name"], parts.algorithm, state, size, comm.size)
        if not session.population[0]:
            raise UserError(
                f"none of the dataset's {parts.dataset.clients} clients has a batch; lower the batches' size or set "
                f"drop_last = false"
            )
        return session

    def digests(self) -> dict[str, str]:
        """Of everything that ranks must have in common: {what: sha256 hex}."""
        table = resolved(self.job)
        table["run"].pop("out")
        job = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
        models = digest({"theta": self.theta, "constants": self.parts.model.constants()})
        return {"jobs": job, "datasets": self.parts.dataset.digest, "initial models": models}

    @cached_property
    def population(self) -> tuple[int, float]:
        """Clients that can train at all, and the sum of their weights: constants of the dataset."""
        algorithm, sizes = self.parts.algorithm, self.parts.dataset.sizes("train")
        clients = examples = 0
        for start in range(0, len(sizes), _AT_ONCE):
            part = sizes[start : start + _AT_ONCE]
            able = part[self._able(part)]
            clients += len(able)
            examples += int(algorithm.works[-1].batches.examples_used(able).sum())
        return clients, float(examples if algorithm.weighting == "examples" else clients)

    def _able(self, examples: np.ndarray) -> np.ndarray:
        """Which clients, with so many examples, have a batch for each of the algorithm's works, (n,) bool."""
        works = [work for work in self.parts.algorithm.works if work.batches.of == "client"]
        return np.logical_and.reduce([work.batches.steps_of(examples) > 0 for work in works])

    def sampled(self, round: int) -> np.ndarray:
        """Clients that train in a round, ascending, (C,) int64: uniform without replacement, by (seed, round).

        Those that would drop out, or report too late to count, are not among them.
        """
        return self.turnout(round).ids

    def turnout(self, round: int) -> Turnout:
        """What becomes of a round's clients: a function of the job and the round."""
        if round not in self._turnouts:  # drawn when the round before it begins, and looked up when it begins itself
            self._turnouts = {r: found for r, found in self._turnouts.items() if r == round - 1}
            self._turnouts[round] = self._turnout(round)
        return self._turnouts[round]

    def _turnout(self, round: int) -> Turnout:
        job, clients = self.job, self.parts.dataset.clients
        cohort = job.cohort or clients
        ids = sample(fold(job.seed, "cohort", round), clients, asked(cohort, job.faults.over_selection))
        if not job.faults.simulated:
            return Turnout(len(ids), ids)
        examples = self.parts.dataset.sizes("train")[ids]
        seconds = durations(job.faults, job.seed, self.visits, ids, examples)
        return turnout(job.faults, job.seed, round, cohort, ids, self._able(examples), seconds)

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        """What a round asks of each client, by rehearsing one in which nobody is asked and all sums are zeros."""
        algorithm, found = self.parts.algorithm, []

        def ask(work: ClientWork, ids: np.ndarray, given: Tree | None, shared: Tree) -> Sums:
            given, shared = one_row(tree_map(torch.as_tensor, given or {})), tree_map(torch.as_tensor, shared)
            wire = self.host.wire([known is work for known in self.host.works].index(True), shared, given)
            down = sum(leaf.nbytes for tree in (given, shared) for _, leaf in leaves(tree))
            found.append(Visit(work.batches, down, sum(leaf.bytes for leaf in wire.update.leaves)))
            return replace(decode(wire, wire.buffers()).sums, weight=1.0, count=1)

        algorithm.round(algorithm.init(self.theta.clone()), Cohort(0, NOBODY, *self.population, ask))
        return tuple(found)

    def begin(self, round: int, fleet: Fleet) -> Cohort:
        """Begin a round with this round's clients, while the next one's may be fetched."""
        last = round + 1 == self.job.rounds
        fleet.begin(round, NOBODY if last else self.sampled(round + 1))
        return self.cohort(round, fleet)

    def cohort(self, round: int, fleet: Fleet) -> Cohort:
        """This round's clients, who can be asked."""
        return Cohort(round, self.sampled(round), *self.population, fleet.ask)

    @property
    def same_bits(self) -> bool:
        """Whether any number of ranks gives these bits: exact sums on a CPU, of clients one by one or a stated K."""
        engine, host = self.job.engine, self.host
        return host.exact and host.device.type == "cpu" and (not host.batched or engine.clients_at_once > 0)

    @property
    def server_scores(self) -> bool:
        """Whether rank 0 scores a round while hosts train the next: with a core of its own, unless the job decides."""
        if self.comm.size == 1 or self.scorer.personal:
            return False
        return self.job.run.scored_by == "server" or (self.job.run.scored_by == "auto" and not self.comm.patient)

    def close(self) -> None:
        """Stop reading, and close the dataset."""
        self.host.source.close()
        self.parts.dataset.close()


def _device(job: Job, comm: World | Alone) -> tuple[torch.device, str]:
    """This rank's device, and a line for people where hosts share it."""
    if job.run.device == "cpu":
        if job.engine.name == "graph":
            raise UserError(
                'engine.name is "graph", which needs run.device = "cuda"; use "auto", "serial" or "batched"'
            )
        return torch.device("cpu"), ""
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError('run.device is "cuda", but torch sees no GPU here; use run.device=cpu')
    index, shared = gpu_of(comm.seat, gpus, job.run.server_gpu, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return torch.device("cuda", index), shared


def _compute_in(dtype: Literal["float32", "tf32", "bf16"], model: Model) -> None:
    """Set what matrix products are computed in: on a GPU torch would take TF32 for convolutions unasked."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    if dtype == "bf16":
        train_in(model, torch.bfloat16)
