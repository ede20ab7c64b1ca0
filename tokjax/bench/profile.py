"""Where the time of a reduced model goes: the share of it that reducers take, from a profile of the compiled function.

Reducers run under a `jax.named_scope("reducer.<name>")`. The compiler keeps scopes as metadata of its instructions, the
profiler names the instruction that every span of time belongs to. An instruction into which the compiler fused both
the model's work and a reducer's counts for the one that its metadata names. Tried on CPUs; where events have the names
of kernels, as a GPU's may, the instruction is taken from their statistics.
"""

from collections.abc import Callable
from pathlib import Path
import re
import tempfile
from typing import Any

import jax

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? (\w[\w\-]*)\(", re.MULTILINE)
_SCOPE = re.compile(r'op_name="[^"]*\breducer\.')
_OUTER = {"while", "conditional", "call"}  # spans that hold those of the instructions inside


def reducer_share(compiled: jax.stages.Compiled, run: Callable[[], Any], calls: int = 3) -> float | None:
    """Share of a compiled function's time that is spent in the plans of reducers and in applying them, 0 to 1.

    Args:
        compiled: what `run` executes.
        run: calls it once; has been called before, so that nothing compiles.
        calls: profiled calls.

    Returns:
        Busy time of the reducers' instructions over that of all, added up over threads or streams; None where the
        profiler does not tell instructions apart.
    """
    inside = _instructions(compiled.as_text() or "")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return None
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes
        busy = {True: 0.0, False: 0.0}
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            name = event.name
            if name not in inside:
                name = next((str(value) for key, value in event.stats if key == "hlo_op"), name)
            if name in inside:
                busy[inside[name]] += event.duration_ns
    total = sum(busy.values())
    return busy[True] / total if total else None


def _instructions(text: str) -> dict[str, bool]:
    """Instructions of a compiled module's text, and whether each is a reducer's."""
    found = {}
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match and match[2] not in _OUTER:
            found[match[1]] = bool(_SCOPE.search(line))
    return found
