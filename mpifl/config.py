"""Job files: TOML in, checked tables out; every mistake becomes one line that says how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake a user can mend: printed as one line without a traceback, exit status 2."""


def choice(name: str, allowed: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `allowed`; otherwise raise UserError with a did-you-mean.

    `what` says in words what was asked for, e.g. "algorithm" or "scaffold option".
    """
    allowed = sorted(allowed)
    if name in allowed:
        return name
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"there is no {what} '{name}'{hint} (allowed: {', '.join(allowed) or 'none'})")
