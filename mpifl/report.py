"""Show runs: `python -m mpifl.report RUN [RUN ...]` writes one HTML page, and the curves as CSV and PNG beside it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mpifl.comm import Alone, World
from mpifl.config import UserError
from mpifl.launch import Parser, agree, command
from mpifl.reporting.figures import rows
from mpifl.reporting.files import FIRST_COLUMNS, SOFTWARE, curves_csv, curves_png
from mpifl.reporting.page import MARK, page
from mpifl.reporting.runs import grouped, read_runs

_MARKS = {".html": MARK, ".csv": ",".join(FIRST_COLUMNS), ".png": SOFTWARE}
"""What a report's files have among their first bytes; other files are not replaced."""
_HEAD = 1000


def report(folders: Sequence[Path], out: Path = Path("report.html"), say: Callable[[str], None] = print) -> None:
    """Write `out`, and CSV and PNG of its name, about run folders or folders of seeds; says what was written.

    Raises UserError for what is no run folder, and before it would replace a file that is no report's.
    """
    if not folders:
        raise UserError("which runs? python -m mpifl.report RUN [RUN ...], the folders that runs printed at their end")
    if out.suffix != ".html":
        raise UserError(f"--out is '{out}'; the report is a page, so it must end in .html")
    runs = read_runs(folders)
    groups = grouped(runs)
    files = {suffix: out.with_suffix(suffix) for suffix in _MARKS}
    for suffix, file in files.items():
        _refuse_foreign(file, _MARKS[suffix])
    curves = rows(groups)
    _write(out, lambda part: part.write_text(page(runs, groups), encoding="utf-8"))
    _write(files[".csv"], lambda part: part.write_text(curves_csv(runs), encoding="utf-8"))
    say(f"page      {out}")
    say(f"numbers   {files['.csv']}")
    if not curves:
        say("picture   none: no round is finished yet")
        return
    try:
        _write(files[".png"], lambda part: curves_png(curves, part))
        say(f"picture   {files['.png']}")
    except UserError as missing:
        say(f"picture   none: {missing}")


def _refuse_foreign(file: Path, mark: str) -> None:
    """Raise UserError where there is something else than a report's file."""
    try:
        with file.open("rb") as content:
            if mark.encode() not in content.read(_HEAD):
                raise UserError(f"{file} already exists, and no report wrote it; choose another page with --out")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{file} cannot be replaced: {error.strerror}") from None


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Have the file whole, or as it was."""
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        os.replace(part, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return command(_command, arguments)


def _command(comm: World | Alone, arguments: Sequence[str]) -> None:
    parser = Parser(prog="python -m mpifl.report", description="Show runs on one HTML page, also while they go on.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of seeds=N")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (report.html)")
    options = parser.read(comm, arguments)
    if options is None:
        return
    agree(comm, lambda: report(options.runs, options.out) if comm.rank == 0 else None)


if __name__ == "__main__":
    sys.exit(main())
