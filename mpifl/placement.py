"""Which rank hosts which client this round."""

from __future__ import annotations

import heapq

import numpy as np


def longest_first(steps: np.ndarray, hosts: int) -> np.ndarray:
    """Assign clients to hosts, longest processing time first (Graham 1969); returns host of each, (n,) int64.

    steps: (n,) expected cost of each client. Ties go to the lower host and the earlier client.
    """
    loads = [(0, host) for host in range(hosts)]
    home = np.empty(len(steps), dtype=np.int64)
    for client in np.argsort(-np.asarray(steps), kind="stable").tolist():
        load, host = heapq.heappop(loads)
        home[client] = host
        heapq.heappush(loads, (load + int(steps[client]), host))
    return home


def by_owner(ids: np.ndarray, hosts: int) -> np.ndarray:
    """Assign clients to the host that keeps their memory, (n,) int64."""
    return ids % hosts
