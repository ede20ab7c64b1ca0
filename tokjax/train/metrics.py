"""The curve of a run as JSON lines, one object a line, that a restart continues without doubles."""

from collections.abc import Mapping
import json
import math
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from tokjax.errors import UserError
from tokjax.writing import write_whole


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`, leaving out a line that was cut off while it was written.

    Returns:
        Each line's object: `step` and the values, None where a value was not finite. A file that is not there has none.
    """
    path, lines = Path(path), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            lines.append(row)
    return lines


class MetricsWriter:
    """Appends to `<folder>/metrics.jsonl` and, if asked, to TensorBoard events in `<folder>/tensorboard`.

    Only the first process of several writes.
    """

    def __init__(self, folder: str | Path, *, step: int = 0, tensorboard: bool = False) -> None:
        """Opens the file and drops what a run that got further than `step` left there.

        Args:
            folder: made if it is not there.
            step: where this run starts; lines of later steps are dropped, as it will write them again.
            tensorboard: write TensorBoard events too.

        Raises:
            UserError: `tensorboard` without tensorboardX.
        """
        self.path = Path(folder) / "metrics.jsonl"
        self._file = self._events = None
        if jax.process_index():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError(
                    'tensorboard is True, which needs tensorboardX: pip install "tokjax[tensorboard]"'
                ) from None
            self._events = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
        if self.path.exists():
            kept = "".join(json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step)
            if kept != self.path.read_text():
                write_whole(self.path, lambda beside: beside.write_text(kept))
        self._file = self.path.open("a", buffering=1)  # by lines: a killed run loses none that it wrote

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds one line, {"step": step, prefix + name: value, ...}; a value that is not finite becomes null.

        Args:
            step: batches consumed so far.
            values: scalars, on the host or not.
            prefix: put before each name, such as "train/".
        """
        if self._file is None:
            return
        row: dict[str, Any] = {prefix + name: np.asarray(value).item() for name, value in values.items()}
        row = {name: x if math.isfinite(x) else None for name, x in row.items()}
        self._file.write(json.dumps({"step": int(step), **row}) + "\n")
        if self._events is not None:
            for name, x in row.items():
                if x is not None:
                    self._events.add_scalar(name, x, int(step))

    def close(self) -> None:
        for out in (self._file, self._events):
            if out is not None:
                out.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
