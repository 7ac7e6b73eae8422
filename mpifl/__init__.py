"""mpifl: federated training over MPI. `mpifl.run(job)` runs a job file or table, here or under mpirun.

Names are imported when first used: `import mpifl` needs neither MPI nor torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "run": "train",
    "UserError": "config",
    "Algorithm": "work",
    "Batching": "work",
    "Client": "work",
    "ClientWork": "work",
    "Cohort": "work",
    "Upload": "work",
    "Model": "model",
    "from_module": "model",
    "Dataset": "data.shard",
    "Feature": "data.shard",
    "ShardWriter": "data.writer",
    "MemoryDataset": "data.memory",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpifl' has no attribute '{name}'")
    return getattr(import_module(f"mpifl.{_HOMES[name]}"), name)
