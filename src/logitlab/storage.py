"""Readings as Parquet files: one row a cell, everything else in the file's metadata."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitlab.errors import InputError
from logitlab.files import write_atomically
from logitlab.reading import Array, Picture, Prompt, Reading, Target

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
_KEY = b"logitlab.reading"
_AGAIN = "give the file that Reading.save or read --save wrote, or save it again"


def save(reading: Reading, path: str | Path) -> Path:
    """Write a Reading; see `Reading.save`."""
    import pyarrow.parquet as pq

    table = to_table(reading)
    return write_atomically(path, lambda p: pq.write_table(table, p, compression="zstd"))


def to_table(reading: Reading) -> pa.Table:
    """One row a cell; columns prompt, site, position, token, and the arrays; metadata as JSON."""
    import pyarrow as pa

    cells = [
        (n, s, p)
        for n, prompt in enumerate(reading.prompts)
        for s in range(len(reading.sites))
        for p in range(len(prompt.positions))
    ]
    n, s, p = (np.array(axis, dtype=np.int64) for axis in (zip(*cells, strict=True) if cells else ((), (), ())))
    columns: dict[str, Any] = {
        "prompt": n,
        "site": pa.array([reading.sites[i] for i in s]).dictionary_encode(),
        "position": [reading.prompts[i].positions[j] for i, j in zip(n, p, strict=True)],
        "token": [reading.prompts[i].tokens[reading.prompts[i].positions[j]] for i, j in zip(n, p, strict=True)],
    }
    for name, values in reading.arrays.items():
        rows = values[n, s, p]
        if rows.ndim == 1:
            columns[name] = pa.array(rows)
        else:
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    meta = {
        "format": FORMAT,
        "prompts": [[q.text, q.ids, q.tokens, q.positions, _pictures(q)] for q in reading.prompts],
        "sites": reading.sites,
        "targets": [[t.id, t.token] for t in reading.targets],
        "labels": [[i, label] for i, label in reading.labels.items()],
        "completions": [[a, b, [[i, label] for i, label in c.items()]] for (a, b), c in reading.completions.items()],
        "provenance": dict(reading.provenance),
    }
    # Lone surrogates cannot be UTF-8; JSON escapes keep them.
    table = pa.table({k: _clean(v) for k, v in columns.items()})
    return table.replace_schema_metadata({_KEY: json.dumps(meta).encode("ascii")})


def load(path: str | Path) -> Reading:
    """Read a Reading; see `Reading.load`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot read {path}: it is a folder; give the file that Reading.save wrote")
    if not path.is_file():
        raise InputError(f"cannot read {path}: there is no such file; check the path")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"cannot read {path}: it is not a whole Parquet file ({str(error).splitlines()[0]}); {_AGAIN}"
        ) from error
    raw = (table.schema.metadata or {}).get(_KEY)
    if raw is None:
        raise InputError(f"cannot read {path}: it is a Parquet file, but Reading.save did not write it; {_AGAIN}")
    try:
        meta = json.loads(raw)
        found = meta["format"]
        reading = _from_table(table, meta) if found == FORMAT else None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"cannot read {path}: it does not hold a whole Reading ({error}); {_AGAIN}") from error
    if reading is None:
        raise InputError(
            f"cannot read {path}: it has format {found}, this logitlab reads format {FORMAT}; "
            "read it with the logitlab that wrote it, or save it again"
        )
    return reading


def _from_table(table: pa.Table, meta: Any) -> Reading:
    import pyarrow as pa

    prompts = tuple(
        Prompt(text, tuple(i), tuple(t), tuple(p), tuple(_picture(p) for p in (more[0] if more else ())))
        for text, i, t, p, *more in meta["prompts"]
    )
    sites = tuple(meta["sites"])
    cells = len(sites) * sum(len(p.positions) for p in prompts)
    if cells != table.num_rows:
        raise ValueError(f"{table.num_rows} rows for {cells} cells")
    arrays: dict[str, Array] = {}
    for name in table.column_names[4:]:
        column = table.column(name).combine_chunks()
        nested = pa.types.is_fixed_size_list(column.type)
        flat = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
        tail = (column.type.list_size,) if nested else ()
        arrays[name] = _unflatten(flat.reshape(-1, *tail), prompts, len(sites))
    return Reading(
        prompts=prompts,
        sites=sites,
        targets=tuple(Target(i, t) for i, t in meta["targets"]),
        labels=dict(meta["labels"]),
        arrays=arrays,
        provenance=meta["provenance"],
        completions={(a, b): dict(c) for a, b, c in meta["completions"]},
    )


def _pictures(prompt: Prompt) -> list[Any]:
    return [[base64.b64encode(p.png).decode("ascii"), p.grid, p.patches] for p in prompt.pictures]


def _picture(stored: Any) -> Picture:
    png, (rows, columns), patches = stored
    return Picture(base64.b64decode(png), (rows, columns), tuple((p, r, c) for p, r, c in patches))


def _unflatten(rows: Array, prompts: tuple[Prompt, ...], n_sites: int) -> Array:
    width = max((len(p.positions) for p in prompts), default=0)
    fill = np.nan if rows.dtype.kind == "f" else -1
    values = np.full((len(prompts), n_sites, width, *rows.shape[1:]), fill, dtype=rows.dtype)
    start = 0
    for n, prompt in enumerate(prompts):
        count = n_sites * len(prompt.positions)
        block = rows[start : start + count]
        values[n, :, : len(prompt.positions)] = block.reshape(n_sites, len(prompt.positions), *rows.shape[1:])
        start += count
    return values


def _clean(column: Any) -> Any:
    """Text columns with characters that UTF-8 cannot hold replaced (the metadata keeps the originals)."""
    if isinstance(column, list) and column and isinstance(column[0], str):
        return [text.encode("utf-8", "replace").decode("utf-8") for text in column]
    return column
