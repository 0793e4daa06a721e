"""The metrics of a run: one JSON object per line as they come, a CSV table at the end.

Assumes one writer; a row is a phase, a step, the seconds since the run began, and numbers. A line cut off by
a kill is dropped when the log is opened again. What is measured, and how often, is left to the caller.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from rgdiff.runtime.distributed import first
from rgdiff.runtime.folder import plain_value, write_atomic


class MetricsLog:
    """Append rows to metrics.jsonl in `folder`, and write metrics.csv on closing.

    A log that exists is gone on with: its seconds continue. After restoring a checkpoint, call `rewind`.

    Args:
      folder: the run's folder; made if missing.
      tensorboard: also write TensorBoard events there (needs the package tensorboardX).

    Raises:
      ValueError: if tensorboard is asked for and tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], tensorboard: bool = False):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._board = _open_board(folder) if tensorboard else None
        self.rows: list[dict[str, Any]] = read_metrics(folder)
        self._start = time.monotonic() - max((row["seconds"] for row in self.rows), default=0.0)
        self._file = self._rewrite()

    def write(self, phase: str, step: int, values: dict[str, Any]) -> None:
        """Append one row; values are single numbers or strings, NaN becomes null.

        Raises:
          ValueError: if a value is an array of more than one element, or is named phase, step or seconds.
        """
        row: dict[str, Any] = {
            "phase": phase,
            "step": int(step),
            "seconds": round(time.monotonic() - self._start, 3),
        }
        for key, value in values.items():
            if key in row:
                raise ValueError(f"metrics: the name {key!r} is taken by the log; rename the value")
            try:
                row[key] = plain_value(value)
            except ValueError:
                raise ValueError(f"metrics: {key!r} is not a single number; reduce it first") from None
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key not in ("phase", "step", "seconds") and isinstance(value, int | float):
                    self._board.add_scalar(f"{phase}/{key}", value, int(step))

    def rewind(self, phase: str, step: int) -> None:
        """Drop the rows of `phase` at `step` and after: the first step that will be written again."""
        self.rows = [row for row in self.rows if row["phase"] != phase or row["step"] < step]
        self._file.close()
        self._file = self._rewrite()

    def close(self) -> None:
        """Write metrics.csv, and be done."""
        self._file.close()
        self.table()
        if self._board is not None:
            self._board.close()

    def table(self) -> None:
        """Write metrics.csv, one row per row, columns the union of all names."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row)) or ["phase", "step", "seconds"]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self._path.with_suffix(".csv"), table.getvalue().encode())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _rewrite(self) -> Any:
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return open(self._path if first() else os.devnull, "a", encoding="utf-8")


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl in `folder`; none if there is no such file.

    Raises:
      ValueError: if a line other than the last is not a row.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"phase": row["phase"], "step": row["step"], "seconds": row["seconds"], **row})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not a row of metrics; repair or remove it") from None
    return rows


def _open_board(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("tensorboard=true needs the package tensorboardX; install it, or leave it out") from None
    return SummaryWriter(str(folder / "tensorboard"))
