"""One job on one rank: everything built, nothing started."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpifl.baselines import Baselines
from mpifl.build import Parts, build, solo_training
from mpifl.comm import Alone, World
from mpifl.config import Job, UserError, resolved
from mpifl.engine.clock import Clock
from mpifl.engine.host import Host
from mpifl.engine.store import ClientMemory
from mpifl.fleet import Fleet
from mpifl.model import Model, train_in
from mpifl.rand import fold, sample
from mpifl.scoring import Scorer
from mpifl.tree import digest
from mpifl.work import Cohort

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
    _samples: dict[int, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def open(job: Job, comm: World | Alone, clock: Clock) -> Session:
        """Build the job's parts and this rank's host."""
        torch.set_num_threads(job.run.threads)
        device, parts = _device(job, comm), build(job)
        _compute_in(job.engine.dtype, parts.model)
        what = (parts.algorithm, parts.model, parts.metrics, parts.dataset)
        scorer = Scorer.of(*what, job.run.eval_rows, job.seed, job.run.eval_batch)
        baselines = None
        if job.baselines:
            batches, opt = solo_training(job)
            baselines = Baselines.of(parts.model, batches, opt, job.baseline_epochs, parts.metrics, scorer)
        works = (*parts.algorithm.works, *scorer.works, *(baselines.works if baselines else ()))
        theta = parts.model.init(fold(job.seed, "init"))
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
        )
        session = Session(job, comm, parts, scorer, baselines, host, theta)
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
        asked = [work.batches for work in algorithm.works if work.batches.of == "client"]
        clients = examples = 0
        for start in range(0, len(sizes), _AT_ONCE):
            part = sizes[start : start + _AT_ONCE]
            able = part[np.logical_and.reduce([batching.steps_of(part) > 0 for batching in asked])]
            clients += len(able)
            examples += int(algorithm.works[-1].batches.examples_used(able).sum())
        return clients, float(examples if algorithm.weighting == "examples" else clients)

    def sampled(self, round: int) -> np.ndarray:
        """Clients of a round, ascending, (C,) int64: uniform without replacement, a function of (seed, round)."""
        clients = self.parts.dataset.clients
        if round not in self._samples:  # drawn when the round before it begins, and looked up when it begins itself
            self._samples = {r: ids for r, ids in self._samples.items() if r == round - 1}
            self._samples[round] = sample(fold(self.job.seed, "cohort", round), clients, self.job.cohort or clients)
        return self._samples[round]

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


def _device(job: Job, comm: World | Alone) -> torch.device:
    """This rank's device: a GPU by its number on the node."""
    if job.run.device == "cpu":
        if job.engine.name == "graph":
            raise UserError(
                'engine.name is "graph", which needs run.device = "cuda"; use "auto", "serial" or "batched"'
            )
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UserError('run.device is "cuda", but torch sees no GPU here; use run.device=cpu')
    return torch.device("cuda", comm.local_rank % gpus)


def _compute_in(dtype: Literal["float32", "tf32", "bf16"], model: Model) -> None:
    """Set what matrix products are computed in: on a GPU torch would take TF32 for convolutions unasked."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    if dtype == "bf16":
        train_in(model, torch.bfloat16)
