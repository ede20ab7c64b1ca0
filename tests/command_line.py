"""Runs `python -m tokjax.main` for tests: in a process of its own, or in this one where there are many short runs."""

import contextlib
import importlib
import io
from pathlib import Path
import subprocess
import sys
from typing import NamedTuple
from unittest import mock

from absl.testing import flagsaver

from tokjax import main

importlib.import_module("tokjax.tasks.classify")  # the flags of what it imports must outlive a single run

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}:short"


class Result(NamedTuple):
    code: int
    out: str
    err: str


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "tokjax.main", *args]


def process(*args: str) -> Result:
    """Started in the root of the project."""
    done = subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


def here(*args: str) -> Result:
    """In this process; flags are as they were after it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", ["main.py", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main.run()
        except SystemExit as end:
            code = end.code or 0
    return Result(code, out.getvalue(), err.getvalue())
