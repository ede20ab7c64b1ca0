"""Wall-clock time, compile time and memory, measured so that two models can be compared.

On a machine that others use, or whose clock follows its temperature, a minute of drift is larger than the gain of many
reductions. So the functions to compare run interleaved, round by round in rotating order, and the speed-up is the
median of the rounds' own ratios. JAX dispatches asynchronously: every round starts with nothing outstanding and ends
with `block_until_ready`, with no synchronisation in between. The first call, which compiles, stands apart.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from pathlib import Path
import platform
import statistics
import time
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one function.

    Attributes:
        rounds_s: mean seconds per call, of every round.
        calls: timed calls in each round.
        warmup: calls before the first round, without the very first.
        first_call_s: the very first call, compilation included (or what the persistent compilation cache left of it).
    """

    rounds_s: tuple[float, ...]
    calls: int
    warmup: int
    first_call_s: float

    @property
    def median_s(self) -> float:
        """Median over the rounds of the seconds per call."""
        return statistics.median(self.rounds_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Lower and upper quartile of the rounds (of one round: twice the same)."""
        if len(self.rounds_s) == 1:
            return self.rounds_s[0], self.rounds_s[0]
        low, _, high = statistics.quantiles(self.rounds_s, n=4, method="inclusive")
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """All figures, derived ones too, for a JSON record."""
        low, high = self.quartiles_s
        return {**dataclasses.asdict(self), "median_s": self.median_s, "quartiles_s": (low, high)}


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    warmup: int | None = None,
    repeats: int = 5,
    calls: int | None = None,
    min_seconds: float = 0.2,
    max_seconds: float = 10.0,
) -> dict[str, Timing]:
    """Times several functions against each other.

    The defaults keep the usual rule of at least 10 warm-up and 30 timed calls of every function, and give way to
    `max_seconds` where a call takes long.

    Args:
        functions: name -> function without arguments that returns JAX arrays (jitted, inputs already on the device).
        warmup: calls of every function before the first round; None: 10, or as many as fit into `max_seconds`.
        repeats: rounds; each times every function once, in an order that rotates from round to round.
        calls: timed calls of every function in each round; None: as many as take `min_seconds` and as 30 over all
            rounds need, but no more than fit into `max_seconds`.
        min_seconds: least duration of one function's part of a round, if `calls` is None.
        max_seconds: most, unless a single call takes longer; of what is chosen here, not of what the caller fixes.

    Returns:
        name -> `Timing`, in the order of `functions`.

    Raises:
        ValueError: no functions, a number out of range, or a function that returns no `jax.Array`: there would be
            nothing to wait for, and the time of the dispatch would pass for that of the work.
    """
    if not functions:
        raise ValueError("functions is empty: there is nothing to time")
    for name, value, least in (("warmup", warmup, 0), ("repeats", repeats, 1), ("calls", calls, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= min_seconds <= max_seconds:
        raise ValueError(f"0 <= min_seconds <= max_seconds is needed, got {min_seconds} and {max_seconds}")

    first = {name: _first_call(name, function) for name, function in functions.items()}
    plan = {
        name: _plan(function, warmup, repeats, calls, min_seconds, max_seconds) for name, function in functions.items()
    }
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            rounds[name].append(_seconds(functions[name], plan[name][1]) / plan[name][1])
    return {name: Timing(tuple(rounds[name]), plan[name][1], plan[name][0], first[name]) for name in names}


def ratio(a: Timing, b: Timing) -> float:
    """How many times longer `a` takes than `b`: the speed-up of `b`, as the median over rounds of each round's ratio.

    Raises:
        ValueError: the two do not come from the same number of rounds, so not from the same run.
    """
    if len(a.rounds_s) != len(b.rounds_s):
        raise ValueError(f"a and b need the same number of rounds, got {len(a.rounds_s)} and {len(b.rounds_s)}")
    return statistics.median(x / y for x, y in zip(a.rounds_s, b.rounds_s, strict=True))


def compile_seconds(jitted: Any, *args: Any, cached: bool = False) -> tuple[jax.stages.Compiled, float, float]:
    """Traces and compiles ahead of time, and times both.

    JAX keeps in memory what it traced and compiled of the same function object: measure before the first call.

    Args:
        jitted: a `jax.jit` function.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s; nothing runs.
        cached: whether the persistent compilation cache may answer. By default it is off for the measurement, as a
            hit would pass for a fast compilation.

    Returns:
        The compiled function, the seconds of tracing and lowering, the seconds of compiling.

    Raises:
        ValueError: `jitted` is not jitted.
    """
    if not hasattr(jitted, "lower"):
        raise ValueError(f"jitted must be a jax.jit function, got {jitted!r}")
    config: Any = jax.config  # its settings are attributes that no stub declares
    enabled = config.jax_enable_compilation_cache
    if enabled and not cached:
        config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX looks at the setting only once
    try:
        start = time.perf_counter()
        lowered = jitted.lower(*args)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    finally:
        if enabled and not cached:
            config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()
    return compiled, middle - start, end - middle


def peak_memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on one device that a compiled function needs at most: arguments, outputs and temporaries.

    Outputs that reuse the memory of donated arguments count once. What else lives on the device is not in it; see
    `device_peak_memory`. None if the backend does not tell.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    return int(
        stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    )


def device_peak_memory(device: jax.Device | None = None) -> int | None:
    """Bytes that were in use at most on a device since the process started; None if it does not tell (CPU)."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    return None if not stats or "peak_bytes_in_use" not in stats else int(stats["peak_bytes_in_use"])


def device_summary() -> dict[str, Any]:
    """What a recorded result must say about the machine; neither host names nor paths."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpu_cores": cores,
    }


def _first_call(name: str, function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    out = jax.block_until_ready(function())
    seconds = time.perf_counter() - start
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(out)):
        raise ValueError(f"functions[{name!r}] returns no jax.Array to wait for, but {type(out).__name__}")
    return seconds


def _plan(
    function: Callable[[], Any],
    warmup: int | None,
    repeats: int,
    calls: int | None,
    min_seconds: float,
    max_seconds: float,
) -> tuple[int, int]:
    """Warms up, and says with how many calls and how many to time."""
    done, seconds = 0, math.inf
    if warmup is None or calls is None:  # a call is needed to know how long one takes; it warms up as well
        seconds, done = _seconds(function, 1), 1
    if warmup is None:
        warmup = max(1, min(10, _fit(max_seconds, seconds)))
    if warmup > done:
        seconds, done = _seconds(function, warmup - done) / (warmup - done), warmup
    if calls is None:
        wanted = max(math.ceil(30 / repeats), _fit(min_seconds, seconds) + 1)
        calls = max(1, min(wanted, _fit(max_seconds, seconds)))
    return done, calls


def _fit(budget: float, seconds: float) -> int:
    return int(budget / max(seconds, 1e-9))


def _seconds(function: Callable[[], Any], calls: int) -> float:
    """Of that many calls together. Devices run what one thread enqueues in order, so the last output ends them all."""
    out = None
    start = time.perf_counter()
    for _ in range(calls):
        out = function()
    jax.block_until_ready(out)
    return time.perf_counter() - start


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
