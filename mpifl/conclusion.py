"""What a run comes to: its summary and models, the closing table, and the mean over seeds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from mpifl.console import Console, readable_bytes, score_rows
from mpifl.fleet import Fleet
from mpifl.measure import headline
from mpifl.results import RunFolder, Totals, hardware, versions, write_json
from mpifl.session import Session
from mpifl.tree import Tree, digest


def finish(
    session: Session, fleet: Fleet, folder: RunFolder, totals: Totals, state: Tree, began: float
) -> dict[str, Any]:
    """Digests, baselines, models and summary; then the hosts may go."""
    job, parts = session.job, session.parts
    seconds = time.perf_counter() - began
    session.host.clock.enter("finish")
    memory, resident = fleet.memory_digest(), fleet.resident_bytes
    baselines = {}
    if session.baselines:
        with session.host.clock.booked("baselines"):
            baselines = session.baselines.run(fleet, session.scorer, session.theta, job.seed)
    fleet.stop()
    for name, theta in parts.algorithm.models(state).items():
        folder.model(name, parts.model.state_dict(theta))
    summary = {
        "job": job.name,
        "seed": job.seed,
        "digest": digest(state),
        "memory_digest": memory,
        "rounds": job.rounds,
        "seconds": seconds,
        **totals.summary(),
        "metrics": list(parts.metrics),
        "baselines": baselines,
        "ranks": session.comm.size,
        "lost_ranks": session.comm.lost,
        "same_bits": session.same_bits,
        "resident_bytes": resident,
        "dataset": parts.dataset.digest,
        "versions": versions(session.comm.library),
        "hardware": hardware(session.host.device),
        "out": str(folder.path),
    }
    folder.finish(summary)
    return summary


def conclude(summary: dict[str, Any], console: Console) -> None:
    """Print the closing table."""
    rows = score_rows(summary["scores"], "summary.json")
    metric = headline(summary["metrics"], summary["scores"])
    rows += [(f"{metric}, {name}", f"{value:.4f}") for name, value in summary["baselines"].items()]
    phases = sorted(summary["phases"].items(), key=lambda item: -item[1])
    rows += [
        ("rounds", f"{summary['rounds']} in {summary['seconds']:.1f} s"),
        (
            "rank 0's time",
            ", ".join(f"{name} {100 * share:.0f} %" for name, share in phases if share >= 0.005),
        ),
        (
            "bytes moved",
            f"{readable_bytes(summary['bytes_down'])} down, {readable_bytes(summary['bytes_up'])} up",
        ),
        ("imbalance", f"{summary['imbalance']:.2f} (busiest host / mean)"),
        ("digest", summary["digest"]),
    ]
    if summary["memory_digest"]:
        rows.append(("client memory", summary["memory_digest"]))
    if summary["lost_ranks"]:
        rows.append(("ranks that died", str(summary["lost_ranks"])))
    if summary["excluded"]:
        rows.append(("clients left out", str(summary["excluded"])))
    if summary["dropped"] or summary["late"] or summary["virtual_seconds"]:
        rows.append(("virtual time", f"{summary['virtual_seconds']:.1f} s"))
        rows.append(("dropped, late", f"{summary['dropped']}, {summary['late']} clients"))
    console.table([*rows, ("results", summary["out"])])


def over_seeds(summaries: list[dict[str, Any]], folder: Path, console: Console) -> dict[str, Any]:
    """Mean and sample deviation of every score over seeds, printed and written beside the seeds' folders."""
    metric = headline(summaries[0]["metrics"], summaries[0]["scores"])
    each = [s["scores"] | {f"{metric}, {name}": value for name, value in s["baselines"].items()} for s in summaries]
    spread = {}
    for name in each[0]:
        values = [scores[name] for scores in each]
        spread[name] = {"mean": np.mean(values, axis=0).tolist(), "deviation": np.std(values, axis=0, ddof=1).tolist()}
    numbers = {name: s for name, s in spread.items() if isinstance(s["mean"], float)}
    rows = [(name, f"{s['mean']:.4f} ± {s['deviation']:.4f}") for name, s in numbers.items()]
    console.table([(f"{len(summaries)} seeds", "mean ± deviation"), *rows, ("results", str(folder))])
    summary = {"scores": spread, "seeds": summaries}
    write_json(folder / "summary.json", summary)
    return summary
