"""The stop-watch is tested with a clock of its own, so that no assertion depends on how busy the machine is."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from tokjax.bench import timing


class Clock:
    """Time that passes only in `work`; remembers who worked."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name, first, later):
        out = jnp.zeros(())

        def function():
            self.now += later if name in self.log else first
            self.log.append(name)
            return out

        return function


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_rounds_are_interleaved_and_rotated(clock):
    functions = {name: clock.work(name, 1.0, 0.5) for name in "abc"}
    times = timing.interleaved(functions, warmup=1, repeats=4, calls=2)
    assert "".join(clock.log) == "abc" + "abc" + "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert list(times) == ["a", "b", "c"]


def test_first_call_stands_apart(clock):
    times = timing.interleaved({"a": clock.work("a", 7.0, 0.25)}, warmup=0, repeats=3, calls=4)
    assert times["a"] == timing.Timing((0.25,) * 3, calls=4, warmup=0, first_call_s=7.0)
    assert clock.log == ["a"] * (1 + 3 * 4)


@pytest.mark.parametrize(
    "seconds, warmup, calls",
    [
        (1e-3, 10, 201),  # 0.2 s a round
        (0.1, 10, 6),  # 30 over 5 rounds
        (2.0, 5, 5),  # no round above 10 s
        (60.0, 1, 1),
    ],
)
def test_number_of_calls_follows_their_duration(clock, seconds, warmup, calls):
    times = timing.interleaved({"a": clock.work("a", 100.0, seconds * (1 - 1e-6))})
    assert (times["a"].warmup, times["a"].calls) == (warmup, calls)
    assert len(times["a"].rounds_s) == 5


def test_what_the_caller_fixes_is_kept(clock):
    times = timing.interleaved({"a": clock.work("a", 1.0, 60.0)}, warmup=3, repeats=2, calls=4, max_seconds=1.0)
    assert (times["a"].warmup, times["a"].calls) == (3, 4)
    assert clock.log == ["a"] * (1 + 3 + 2 * 4)


def test_waits_at_the_end_of_a_round_and_only_there(monkeypatch):
    waits = []
    wait = jax.block_until_ready
    monkeypatch.setattr(timing.jax, "block_until_ready", lambda x: waits.append(1) or wait(x))
    out = jnp.zeros(3)
    timing.interleaved({"a": lambda: out, "b": lambda: (out, {"c": out})}, warmup=5, repeats=3, calls=10)
    assert len(waits) == 2 * (1 + 1 + 3)


def test_asynchronous_work_is_waited_for():
    @jax.jit
    def long(x):
        return jax.lax.fori_loop(0, 20, lambda i, c: jnp.tanh(c @ x), x)

    x = jnp.ones((300, 300))
    times = timing.interleaved({"long": lambda: long(x), "short": lambda: x[0, 0]}, warmup=1, repeats=3, calls=2)
    alone = []
    for _ in range(5):
        start = time.perf_counter()
        long(x).block_until_ready()
        alone.append(time.perf_counter() - start)
    assert times["long"].median_s > 0.2 * min(alone)
    assert timing.ratio(times["long"], times["short"]) > 1


def test_statistics_and_ratio():
    a = timing.Timing((1.0, 2.0, 3.0, 4.0, 100.0), 1, 0, 0.0)
    b = timing.Timing((0.5, 1.0, 1.0, 1.0, 50.0), 1, 0, 0.0)
    assert a.median_s == 3.0
    assert a.quartiles_s == (2.0, 4.0)
    assert timing.Timing((2.0,), 1, 0, 0.0).quartiles_s == (2.0, 2.0)
    assert timing.ratio(a, b) == 2.0  # of 2, 2, 3, 4, 2: the ratio of the medians would be 3
    assert json.loads(json.dumps(a.as_dict()))["median_s"] == 3.0
    with pytest.raises(ValueError, match="5 and 1"):
        timing.ratio(a, timing.Timing((2.0,), 1, 0, 0.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"functions": {}}, "functions is empty"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"calls": 0}, "calls must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"min_seconds": 3.0, "max_seconds": 1.0}, "got 3.0 and 1.0"),
        ({"functions": {"f": lambda: 1.0}}, r"functions\['f'\] returns no jax.Array to wait for, but float"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        timing.interleaved(**{"functions": {"a": lambda: jnp.zeros(())}, **change})


def test_compile_seconds_runs_nothing_and_gives_the_function():
    @jax.jit
    def square(x):
        return x @ x

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    compiled, trace_s, compile_s = timing.compile_seconds(square, x)
    assert trace_s > 0
    assert compile_s > 0
    assert compiled(jnp.eye(16)).sum() == 16
    with pytest.raises(ValueError, match="jitted must be a jax"):
        timing.compile_seconds(lambda x: x, x)


def test_compile_seconds_passes_by_the_persistent_cache(tmp_path):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        timing.compilation_cache.reset_cache()
        x = jax.ShapeDtypeStruct((7, 7), jnp.float32)
        timing.compile_seconds(jax.jit(lambda x: x @ x + 1), x)
        assert not list(tmp_path.iterdir())
        assert jax.config.jax_enable_compilation_cache
        timing.compile_seconds(jax.jit(lambda x: x @ x + 2), x, cached=True)
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        timing.compilation_cache.reset_cache()


def test_peak_memory_counts_donated_arguments_once():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    plain, _, _ = timing.compile_seconds(jax.jit(lambda x: x + 1), x)
    donated, _, _ = timing.compile_seconds(jax.jit(lambda x: x + 1, donate_argnums=0), x)
    assert timing.peak_memory(plain) == 2 * 2**20
    assert timing.peak_memory(donated) == 2**20


def test_peak_memory_is_none_where_the_backend_is_silent():
    class Silent:
        def memory_analysis(self):
            return None

    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 12}

    assert timing.peak_memory(Silent()) is None
    assert timing.device_peak_memory(Device()) == 12
    if jax.devices()[0].platform == "cpu":
        assert timing.device_peak_memory() is None


def test_device_summary_names_the_machine_and_nothing_private():
    summary = timing.device_summary()
    assert summary["platform"] == jax.devices()[0].platform
    assert summary["jax"] == jax.__version__
    assert summary["device_count"] >= 1
    assert summary["cpu_cores"] >= 1
    assert set(summary) == {
        *("platform", "device_kind", "device_count", "process_count", "jax", "python", "cpu", "cpu_cores")
    }
    assert timing.platform.node() not in json.dumps(summary)
