"""CSV, Parquet and NPZ files as one kind of thing: columns, read block by block, or any row of them at once."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_prep import archive
from data_prep.corpus import installed
from mpifl.config import UserError, choice

BLOCK_ROWS = 16_384

Block = dict[str, np.ndarray]
"""Some rows of some columns, (n, ...) each."""


class Format(NamedTuple):
    """One kind of file: schema(path) has its columns; blocks(path, names, text) reads some, a CSV's as text or float32.

    A schema has a column's dtype, with the shape of a row if it has one, or None if it is not of numbers. first_row:
    what errors call the first row.
    """

    schema: Callable[[Path], dict[str, np.dtype | None]]
    blocks: Callable[[Path, Sequence[str], bool], Iterator[Block]]
    first_row: int = 1


def files(path: Path) -> tuple[Path, ...]:
    """Return the file, or all files of a folder in order of name; UserError unless they are of one kind."""
    if not path.exists():
        raise UserError(f"there is no {path}; give a file, or a folder of files, {', '.join(FORMATS)}")
    found = sorted(file for file in path.iterdir() if _kind(file)) if path.is_dir() else [path]
    if len({_kind(file) for file in found} - {None}) != 1:
        raise UserError(f"{path}: must be files of one kind: {', '.join(FORMATS)}")
    return tuple(found)


def schema(path: Path) -> dict[str, np.dtype | None]:
    """Columns of a file in their order (see Format)."""
    return _readable(path, lambda: FORMATS[_kind(path)].schema(path))


def values(paths: Sequence[Path], names: Sequence[str]) -> Block:
    """Whole columns of ids or labels, (n,) each, of text or numbers; UserError naming a row that has none."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for path in paths if names else ():
        for first, block in _blocks(path, names, text=True):
            for name, column in block.items():
                if column.ndim > 1:
                    raise UserError(
                        f"{path}: column '{name}' has rows of {column.shape[1:]}, it must have one value each"
                    )
                missing = column == "" if column.dtype.kind == "U" else ~np.isfinite(column)
                if missing.any():
                    raise UserError(f"{path}: row {first + int(np.argmax(missing))} has no '{name}'")
                parts[name].append(column)
    return {name: np.concatenate(columns) for name, columns in parts.items()}


@lru_cache(maxsize=2)
def records(paths: tuple[Path, ...], dtype: np.dtype) -> np.ndarray:
    """All rows of the columns that `dtype` names, (rows,) of it, mapped from a nameless file: once per process."""
    with archive.scratch(paths[0]) as file:
        for path in paths:
            for first, block in _blocks(path, dtype.names, text=False):
                rows = np.empty(len(block[dtype.names[0]]), dtype)
                for name, column in block.items():
                    rows[name] = _as(column, dtype[name], f"{path}: column '{name}'", first)
                rows.tofile(file)
        file.flush()
        return np.memmap(file, dtype, "r")


def place(paths: Sequence[Path], name: str, row: int) -> str:
    """Say in which file, and at which of its rows, the row of all files lies that `values` has at index `row`."""
    for path in paths:
        for first, block in _blocks(path, [name], text=True):
            if row < len(block[name]):
                return f"{path}: row {first + row}"
            row -= len(block[name])
    raise IndexError(row)


def _as(column: np.ndarray, dtype: np.dtype, where: str, first: int) -> np.ndarray:
    """The column in that dtype; UserError, beginning with `where`, unless all of it is there, finite, and fits."""
    _require_finite(column, where, "is missing or not finite", first)
    if column.shape[1:] != dtype.shape or not np.can_cast(column.dtype, dtype.base, "same_kind"):
        found = f"{column.dtype} {column.shape[1:]}, elsewhere {dtype.base} {dtype.shape}"
        raise UserError(f"{where} is {found}; make all files alike")
    with np.errstate(over="ignore"):
        cast = column.astype(dtype.base, copy=False)
    _require_finite(cast, where, f"is too large for {dtype.base}", first)
    return cast


def _require_finite(column: np.ndarray, where: str, problem: str, first: int) -> None:
    finite = np.isfinite(column).reshape(len(column), -1).all(axis=1)
    if not finite.all():
        raise UserError(f"{where} {problem} in row {first + int(np.argmin(finite))}")


def _kind(path: Path) -> str | None:
    return next((kind for kind in FORMATS if path.name.lower().endswith(kind)), None)


def _blocks(path: Path, names: Sequence[str], text: bool) -> Iterator[tuple[int, Block]]:
    """Yield (number of the first row, columns) of a file."""
    for name in names:
        choice(name, schema(path), f"column of {path.name}")
    form = FORMATS[_kind(path)]
    blocks, first = form.blocks(path, names, text), form.first_row
    while block := _readable(path, lambda: next(blocks, None)):
        yield first, block
        first += len(block[names[0]])
    if first == form.first_row:
        raise UserError(f"{path}: has no rows")


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; whatever says that the file is broken becomes a UserError that names it."""
    try:
        return read()
    except UserError:
        raise
    except (*archive.BROKEN, zipfile.BadZipFile, LookupError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read ({problem}); mend it or fetch it again") from None


def _csv_schema(path: Path) -> dict[str, np.dtype | None]:
    return _arrow_schema(_csv_reader(path).schema, lambda kind: np.dtype("float32"))


def _csv_blocks(path: Path, names: Sequence[str], text: bool) -> Iterator[Block]:
    arrow, found = installed("pyarrow"), _csv_reader(path).schema
    boolean = [name for name in names if arrow.types.is_boolean(found.field(name).type)]
    kinds = dict.fromkeys(names, arrow.float32()) | dict.fromkeys(boolean, arrow.bool_())
    kinds = dict.fromkeys(names, arrow.string()) if text else kinds
    yield from map(_arrow_block, _csv_reader(path, include_columns=names, column_types=kinds))


def _csv_reader(path: Path, **convert: Any) -> Any:
    csv = installed("pyarrow.csv")
    return csv.open_csv(
        path,
        read_options=csv.ReadOptions(use_threads=False),  # one thread counts rows for its errors
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(**convert),
    )


def _parquet_schema(path: Path) -> dict[str, np.dtype | None]:
    with installed("pyarrow.parquet").ParquetFile(path) as file:
        return _arrow_schema(file.schema_arrow, lambda kind: np.dtype(kind.to_pandas_dtype()))


def _parquet_blocks(path: Path, names: Sequence[str], _: bool) -> Iterator[Block]:
    # Unless told otherwise it reads all columns of all row groups ahead.
    with installed("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        yield from map(_arrow_block, file.iter_batches(BLOCK_ROWS, columns=list(names), use_threads=False))


def _arrow_schema(found: Any, dtype: Callable[[Any], np.dtype]) -> dict[str, np.dtype | None]:
    types = installed("pyarrow").types
    if len(set(found.names)) != len(found.names):
        raise ValueError("two columns have the same name")
    numbers = (types.is_integer, types.is_floating, types.is_boolean)
    return {field.name: dtype(field.type) if any(kind(field.type) for kind in numbers) else None for field in found}


def _arrow_block(batch: Any) -> Block:
    return {name: _from_arrow(name, column) for name, column in zip(batch.schema.names, batch.columns)}


def _from_arrow(name: str, column: Any) -> np.ndarray:
    types = installed("pyarrow").types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type):
        return np.array(column.fill_null("").to_pylist(), str)
    if types.is_boolean(column.type) and column.null_count:
        column = column.cast("uint8")
    array = column.to_numpy(zero_copy_only=False)  # missing numbers are NaN
    if array.dtype.kind not in "biuf":
        raise ValueError(f"column '{name}' is of {column.type}, neither numbers nor text")
    return array


def _npz_schema(path: Path) -> dict[str, np.dtype | None]:
    found = {}
    with zipfile.ZipFile(path) as packed:
        for member in packed.namelist():
            with packed.open(member) as file:
                shape, _, dtype = _npy_header(file)
            numbers = dtype.kind in "biuf" and shape
            found[member.removesuffix(".npy")] = np.dtype((dtype, shape[1:])) if numbers else None
    return found


def _npz_blocks(path: Path, names: Sequence[str], _: bool) -> Iterator[Block]:
    arrays = {name: _npz_array(path, name) for name in names}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its arrays differ in length: {lengths}")
    for start in range(0, lengths[names[0]], BLOCK_ROWS):
        yield {name: array[start : start + BLOCK_ROWS] for name, array in arrays.items()}


def _npz_array(path: Path, name: str) -> np.ndarray:
    """Map an array from a nameless file; in the archive it may be compressed, and larger than memory."""
    with zipfile.ZipFile(path) as packed, packed.open(f"{name}.npy") as member, archive.scratch(path) as file:
        shutil.copyfileobj(member, file, 1 << 20)
        file.flush()
        file.seek(0)
        shape, fortran, dtype = _npy_header(file)
        if dtype.kind not in "biufU" or not shape:
            raise ValueError(f"array '{name}' is {dtype} {shape}, neither numbers nor text in rows")
        if not shape[0]:
            return np.empty(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"NPY version {version}")
    return read[version](file)


FORMATS = {
    ".csv": Format(_csv_schema, _csv_blocks, first_row=2),  # the header is row 1, as for a spreadsheet
    ".csv.gz": Format(_csv_schema, _csv_blocks, first_row=2),
    ".parquet": Format(_parquet_schema, _parquet_blocks),
    ".npz": Format(_npz_schema, _npz_blocks),
}
