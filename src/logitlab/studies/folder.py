"""The folder of a run: its manifest, its tables, and the parts of steps that are not done yet.

A unit's tables are written first and its record after them, each in one step. So whatever stops a run, a unit is either
recorded and whole, or done again. When all units of a step are recorded they are put together, the manifest is told,
and the parts are removed, in this order; each of the three can be repeated.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from logitlab.errors import InputError
from logitlab.files import difference, locked, write_atomically, write_text
from logitlab.studies.study import LONGEST_NAME, NAME, Tables

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MANIFEST, LOCK, REPORT = "manifest.json", "run.lock", "report.html"
FORMAT = 1
KEY = ("study", "version", "scale", "seed", "parameters", "model")
"""What a run that goes on must have in common with the one that was broken off."""

_KINDS: dict[str, Any] = {
    "study": str,
    "version": int,
    "scale": str,
    "seed": int,
    "parameters": dict,
    "differs": list,
    "model": dict | None,
    "state": str,
    "started": str,
    "ended": str | None,
    "sessions": list,
    "steps": dict,
    "claims": list,
}
"""What every manifest has."""


class RunFolder:
    """A folder that holds a run.

    Attributes:
        path: the folder.
        record: what the manifest holds.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record

    @staticmethod
    def read(path: str | Path) -> RunFolder:
        """The run that a folder holds.

        Raises:
            InputError: there is none, or its manifest cannot be read.
        """
        path = place(path)
        file = path / MANIFEST
        if not _is_there(file):
            raise InputError(f"there is no run of a study in {path}: {MANIFEST} is missing")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        if not _is_manifest(record):
            raise InputError(f"{file} is no manifest that this version of logitlab writes: give another folder")
        return RunFolder(path, record)

    @staticmethod
    def open(path: Path, record: dict[str, Any]) -> RunFolder:
        """The run that a folder holds if it is the one of ``record``; else a new one, where the folder is empty.

        The folder must be held (`hold`). A run that has done nothing yet, for instance since its parameters do
        not work, gives way to another.

        Raises:
            InputError: it holds another run, or something else.
        """
        new = RunFolder(path, json.loads(json.dumps(record)))  # as it will be when it is read
        if not (path / MANIFEST).is_file():
            new.save()
            return new
        found = RunFolder.read(path)
        its, mine = identity(found.record), identity(new.record)
        if its["model"] and mine["model"] and its["model"]["stack"] is None:  # of a version that did not record it
            its["model"]["stack"] = mine["model"]["stack"]
        differing = [name for name in KEY if its[name] != mine[name]]
        if differing and not found.has_work():
            new.save()
            return new
        if differing:
            what = "; ".join(f"{name}: {difference(its[name], mine[name])}" for name in differing)
            raise InputError(
                f"{path} holds another run ({what}): give another folder with --out, or the same arguments"
            )
        return found

    def has_work(self) -> bool:
        """Whether there is anything that a step has given, or has begun to keep."""
        kept = (file for name in ("parts", "tables", "arrays") for file in (self.path / name).rglob("*"))
        return bool(self.record["steps"]) or any(not file.is_dir() for file in kept)

    def clean(self) -> None:
        """Remove files that a killed run has begun to write."""
        for unfinished in self.path.rglob(".*.part"):
            with suppress(OSError):
                unfinished.unlink()

    def save(self) -> None:
        """Write the manifest."""
        write_text(self.path / MANIFEST, json.dumps(self.record, indent=1, allow_nan=False) + "\n")

    # -- tables of whole steps -----------------------------------------------------------------

    @property
    def tables(self) -> list[str]:
        """Names of the tables that are there, in the order of steps."""
        return [name for step in self.record["steps"].values() for name in step["tables"]]

    def table(self, name: str) -> pd.DataFrame:
        """A table of a step that is done.

        Raises:
            InputError: there is none of that name, or it is damaged.
        """
        return read_parquet(self._file(name)).to_pandas()

    def _file(self, name: str) -> Path:
        if name not in self.tables:
            there = ", ".join(self.tables) or "none"
            raise InputError(f"there is no table {name!r} in {self.path} yet; there are {there}")
        return self.path / "tables" / f"{name}.parquet"

    def is_done(self, step: str) -> bool:
        """Whether a step is done and its tables are there."""
        record = self.record["steps"].get(step)
        return record is not None and all((self.path / "tables" / f"{t}.parquet").is_file() for t in record["tables"])

    # -- units of a step in progress -----------------------------------------------------------

    def unit(self, step: str, unit: str) -> dict[str, Any] | None:
        """The record of a unit that is done, or None."""
        file = self._part(step, unit, "json")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or of a disk that lost it: the unit is done again
            return None
        known = isinstance(record, dict) and record.get("unit") == unit
        whole = known and all(self._part(step, unit, f"{table}.parquet").is_file() for table in record["tables"])
        return record if whole else None

    def keep_unit(self, step: str, unit: str, tables: Tables, named: bool, started: str, seconds: float) -> None:
        """Write what a step has given for a unit.

        Args:
            step: name of the step.
            unit: name of the unit.
            tables: what it gave.
            named: whether tables get a column with the unit's name, unless they have one.
            started: when it began.
            seconds: how long it took.

        Raises:
            InputError: it gave something else than tables, or they hold something that no file can.
        """
        make_folder(self._part(step, unit, "json").parent)
        found = _by_name(step, unit, tables)
        for name, frame in found.items():
            table = _to_arrow(step, unit, frame, named)
            write_atomically(self._part(step, unit, f"{name}.parquet"), partial(_write_parquet, table))
        record = {"unit": unit, "started": started, "seconds": round(seconds, 3), "tables": list(found)}
        write_text(self._part(step, unit, "json"), json.dumps(record) + "\n")

    def finish(self, step: str, units: Sequence[str]) -> None:
        """Put the parts of a step together, whose units are all done.

        Raises:
            InputError: columns of one name hold different things in different units, or another step has a table of
                the same name.
        """
        import pyarrow as pa

        records = [self._recorded(step, unit) for unit in units]
        names = list(dict.fromkeys(name for record in records for name in record["tables"]))
        others = {t: other for other, its in self.record["steps"].items() if other != step for t in its["tables"]}
        make_folder(self.path / "tables")
        for name in names:
            if name in others:
                raise InputError(f"steps {others[name]!r} and {step!r} both give a table {name!r}: rename one")
            has = [record["unit"] for record in records if name in record["tables"]]
            parts = [read_parquet(self._part(step, unit, f"{name}.parquet")) for unit in has]
            if any(part.num_rows for part in parts):  # what pandas takes the columns of no rows for says nothing
                parts = [part if part.num_rows else _untyped(part) for part in parts]
            try:
                table = pa.concat_tables(parts, promote_options="permissive")
            except pa.ArrowException as error:
                why = " ".join(str(error).split())[:200]
                raise InputError(f"the units of step {step!r} give tables {name!r} that do not fit: {why}") from error
            write_atomically(self.path / "tables" / f"{name}.parquet", partial(_write_parquet, table))
        kept = [{key: record[key] for key in ("unit", "started", "seconds")} for record in records]
        self.record["steps"][step] = {"tables": names, "units": kept}
        self.save()
        self.remove_parts(step)

    def remove_parts(self, step: str) -> None:
        """Remove what is left of the parts of a step that is done."""
        shutil.rmtree(self.path / "parts" / step, ignore_errors=True)
        with suppress(OSError):  # other steps may have parts
            (self.path / "parts").rmdir()

    def _recorded(self, step: str, unit: str) -> dict[str, Any]:
        record = self.unit(step, unit)
        assert record is not None, f"unit {unit!r} of step {step!r} is not done"
        return record

    def _part(self, step: str, unit: str, ending: str) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", unit.lower()).strip("-")[:40]
        digest = hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return self.path / "parts" / step / f"{slug}-{digest}.{ending}"


def identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What tells runs apart: of parameters their values, of the model its fingerprint and the stack that is read."""
    key = {name: record[name] for name in KEY}
    key["parameters"] = {name: p["value"] for name, p in record["parameters"].items()}
    model = record["model"]
    key["model"] = None if model is None else {"fingerprint": model["fingerprint"], "stack": model.get("stack")}
    return json.loads(json.dumps(key))


def place(path: str | Path) -> Path:
    """The path of a folder that the user names, ``~`` expanded.

    Raises:
        InputError: there cannot be one: a user that is not there, a name that is too long, no permission to look.
    """
    try:
        found = Path(path).expanduser()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{str(path)[:80]!r} is no path of a folder: {error}; give another folder") from error
    _is_there(found / MANIFEST)
    return found


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        shown = str(file.parent)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        raise InputError(f"cannot look into {shown}: {error.strerror or error}; give another folder") from error


def make_folder(path: Path) -> None:
    """Make a folder inside of a run's, unless it is there.

    Raises:
        InputError: that cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror or error}") from error


def _is_manifest(record: Any) -> bool:
    """Whether all is there that is read from a manifest, and no name in it leads out of the folder."""
    if not isinstance(record, dict):
        return False
    found = cast("dict[str, Any]", record)
    if found.get("format") != FORMAT or not all(
        name in found and isinstance(found[name], kind) for name, kind in _KINDS.items()
    ):
        return False
    if found["model"] is not None and not {"name", "fingerprint"} <= set(found["model"]):
        return False
    values: list[Any] = list(found["parameters"].values())
    sessions: list[Any] = found["sessions"]
    return (
        all(isinstance(value, dict) and {"value", "paper"} <= set(cast("dict[str, Any]", value)) for value in values)
        and all(_is_session(session) for session in sessions)
        and all(_is_name(name) and _is_step(step) for name, step in found["steps"].items())
    )


def _is_session(session: Any) -> bool:
    known = {"started", "python", "versions", "platform", "processors", "threads"}
    return isinstance(session, dict) and known <= set(session) and isinstance(session["versions"], dict)


def _is_step(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    record = cast("dict[str, Any]", step)
    tables, units = record.get("tables"), record.get("units")
    if not isinstance(tables, list) or not isinstance(units, list):
        return False
    return all(_is_name(name) for name in cast("list[Any]", tables)) and all(
        isinstance(unit, dict) and isinstance(cast("dict[str, Any]", unit).get("seconds"), int | float)
        for unit in cast("list[Any]", units)
    )


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def hold(path: Path, held: ExitStack) -> None:
    """Make the folder if need be, and keep other runs from it; the system lets go when the process ends.

    Raises:
        InputError: it holds something else than a run, it cannot be made, or a run is at work in it.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for the run")
    try:
        path.mkdir(parents=True, exist_ok=True)
        there = [p.name for p in path.iterdir()]
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"cannot make the folder {path}: {why}") from error
    if MANIFEST not in there:
        # A run that was killed at its very beginning leaves no more than its lock and unfinished files.
        foreign = [name for name in there if name != LOCK and not re.fullmatch(r"\..*\.part", name)]
        if foreign:
            raise InputError(f"{path} is not empty and holds no run that could go on; give a new folder with --out")
    else:
        RunFolder.read(path)
    held.enter_context(locked(path / LOCK, "run"))


def _write_parquet(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


def read_parquet(path: Path) -> pa.Table:
    """A table without the metadata of pandas, so that all that is in it is its columns.

    Raises:
        InputError: it is not there, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without threads of its own the library leaves none behind when the process is killed or forked.
        return pq.read_table(path, use_threads=False).replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(
            f"{path} cannot be read: {why}; remove this file and run again: the same arguments make it anew"
        ) from error


def _untyped(empty: pa.Table) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.nulls(0) for name in empty.column_names})


def _by_name(step: str, unit: str, tables: Tables) -> dict[str, pd.DataFrame]:
    import pandas as pd

    found: dict[str, Any] = {step: tables}
    if isinstance(tables, Mapping):
        for name in cast("Mapping[Any, Any]", tables):
            if not _is_name(name) or len(name) > LONGEST_NAME:
                raise InputError(
                    f"step {step!r} gives a table called {name!r}; use lower-case letters, digits and hyphens"
                )
        found = {f"{step}-{name}": table for name, table in tables.items()}
    wrong = [type(table).__name__ for table in found.values() if not isinstance(table, pd.DataFrame)]
    if wrong:
        what = wrong[0]
        raise InputError(
            f"step {step!r} gives a {what} for {unit or 'its only unit'!r}; it must give a DataFrame or several by name"
        )
    return cast("dict[str, pd.DataFrame]", found)


def _to_arrow(step: str, unit: str, frame: pd.DataFrame, named: bool) -> pa.Table:
    import pyarrow as pa

    if any(name is not None for name in frame.index.names):  # as groupby leaves it
        try:
            frame = frame.reset_index()
        except ValueError as error:  # an index called as a column
            raise InputError(
                f"step {step!r} gives a table for {unit or 'its only unit'!r} whose index cannot become a column: "
                f"{error}; rename one, or drop the index"
            ) from error
    if named and "unit" not in frame.columns:
        frame = frame.copy()
        frame.insert(0, "unit", _encodable(unit))
    try:
        try:
            table = pa.Table.from_pandas(frame, preserve_index=False, nthreads=1)
        except UnicodeEncodeError:
            table = pa.Table.from_pandas(_without_surrogates(frame), preserve_index=False, nthreads=1)
    except (pa.ArrowException, ValueError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"step {step!r} gives a table for {unit or 'its only unit'!r} that no file can hold: {why}"
        ) from error
    return table.replace_schema_metadata(None)


def _without_surrogates(frame: pd.DataFrame) -> pd.DataFrame:
    """Lone surrogates, which tokens of bytes may have, cannot be UTF-8."""

    def cell(value: Any) -> Any:
        return _encodable(value) if isinstance(value, str) else value

    return frame.map(cell)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
