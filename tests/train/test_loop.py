from collections.abc import Iterator
import itertools
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.controllers import PI
from tokjax.train.loop import TERMINATED, prefetch, train
from tokjax.train.metrics import read_metrics
from tokjax.train.state import Teacher

from . import tiny_run

ROOT = Path(__file__).parents[2]
CLOCK = "train/images_per_s"


def launch(workdir, *changes):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests/train/tiny_run.py"), str(workdir), *changes]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def wait_for(process, workdir, step):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_metrics(workdir / "metrics.jsonl")):
            return
        time.sleep(0.005)
    raise AssertionError(f"did not reach step {step}: {finish(process)}")


def curve(workdir):
    return [{k: v for k, v in row.items() if k != CLOCK} for row in read_metrics(workdir / "metrics.jsonl")]


def run(
    workdir,
    *,
    params=None,
    loss_fn=tiny_run.loss_fn,
    loader=None,
    evaluate=tiny_run.evaluate,
    teacher=None,
    controller=None,
    **changes,
):
    return train(
        tiny_run.config(**changes),
        workdir,
        init_params=params or tiny_run.init_params(),
        loss_fn=loss_fn,
        train_loader=loader or tiny_run.Points(),
        evaluate=evaluate,
        teacher=teacher,
        controller=controller,
    )


def assert_same(a, b):
    def plain(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(plain(x), plain(y)), a, b)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """SIGKILL at a step that is no checkpoint's, in a process of its own; every number is the same."""
    whole, process = launch(tmp_path / "whole"), launch(tmp_path / "killed", "pause=0.004")
    wait_for(process, tmp_path / "killed", 93)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert 93 <= curve(tmp_path / "killed")[-1]["step"] < 200
    code, out = finish(launch(tmp_path / "killed"))
    assert code == 0, out
    assert "going on from" in out
    code, out = finish(whole)
    assert code == 0 and "going on from" not in out, out

    expected = curve(tmp_path / "whole")
    assert [row["step"] for row in expected if "train/loss" in row] == list(range(1, 201))
    assert [row["step"] for row in expected if "eval/accuracy" in row] == [50, 100, 150, 200]
    assert expected[-1]["eval/accuracy"] > 0.85
    assert curve(tmp_path / "killed") == expected

    target = jax.eval_shape(tiny_run.init_params)
    first, second = (Checkpoints(tmp_path / name / "checkpoints") for name in ("whole", "killed"))
    assert_same(first.restore_params(target), second.restore_params(target))
    assert first.steps() == second.steps()


def test_sigterm_saves_and_ends(tmp_path):
    process = launch(tmp_path, "pause=0.01", "checkpoint_every=1000", "eval_every=0")
    wait_for(process, tmp_path, 30)
    process.terminate()
    code, out = finish(process)
    assert code == TERMINATED == 143, out
    (step,) = Checkpoints(tmp_path / "checkpoints").steps()
    assert 30 <= step < 200
    assert f"step {step}/200: terminated" in out
    assert curve(tmp_path)[-1]["step"] == step


def test_a_longer_run_goes_on_from_a_shorter_one_and_a_finished_one_returns_at_once(tmp_path):
    options: dict = {"optimiser": {"warmup_steps": 2}, "evaluate": None}
    state = run(tmp_path, total_steps=6, **options)
    assert state.step == 6
    lines = curve(tmp_path)

    class Untouchable(tiny_run.Points):
        def __iter__(self):
            iterator = super().__iter__()
            iterator.__class__ = type("", (tiny_run.PointsIterator,), {"__next__": None})
            return iterator

    again = run(tmp_path, total_steps=6, loader=Untouchable(), **options)
    assert_same(again, state)
    assert curve(tmp_path) == lines
    assert run(tmp_path, total_steps=8, **options).step == 8
    assert [row["step"] for row in curve(tmp_path)] == list(range(1, 9))


class Dying(tiny_run.PointsIterator):
    """A reader that dies at the eighth batch."""

    def __next__(self):
        if self.batch == 8:
            raise KeyboardInterrupt
        return super().__next__()


class Dies(tiny_run.Points):
    def __iter__(self):
        reader = super().__iter__()
        reader.__class__ = Dying
        return reader


def test_a_teacher_and_a_controller_go_on_where_they_were(tmp_path):
    def loss(params, batch, key, teacher, weight):
        value, metrics = tiny_run.loss_fn(params, batch, key)
        target = tiny_run.forward({"blocks": teacher, "head": params["head"]}, batch["image"])
        value += ((tiny_run.forward(params, batch["image"]) - target) ** 2).mean()
        size = jnp.abs(params["head"]["bias"])
        return value - weight * size.sum(), {**metrics, "large": (size > 0.05).sum(), "all": size.size}

    options: dict = {
        "loss_fn": loss,
        "teacher": Teacher(lambda params: params["blocks"], 0.5, total_steps=10),
        "controller": PI(target=0.9, k_i=0.1, delay=2, counts=("large", "all")),
        "evaluate": None,
        "total_steps": 10,
        "checkpoint_every": 4,
        "optimiser": {"warmup_steps": 2},
    }
    whole = run(tmp_path / "whole", **options)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", loader=Dies(), **options)
    assert Checkpoints(tmp_path / "torn" / "checkpoints").steps()[-1] < 10
    assert_same(run(tmp_path / "torn", **options), whole)
    assert curve(tmp_path / "torn") == curve(tmp_path / "whole")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole.teacher, tiny_run.init_params()["blocks"])
    assert min(jax.tree.leaves(moved)) > 0
    weights = [row["train/weight"] for row in curve(tmp_path / "whole") if "train/weight" in row]
    assert weights[:3] == [0, 0, 0] and min(weights[3:]) > 0 and whole.controller.integral > 0


class Poisoned(tiny_run.Points):
    """Batches of NaN from one step until another."""

    def __init__(self, first, end=10**9):
        super().__init__()
        self.bad = range(first, end)

    def __iter__(self):
        class Iterator(tiny_run.PointsIterator):
            def __next__(iterator):
                batch = super().__next__()
                step = iterator.epoch * (tiny_run.EXAMPLES // tiny_run.BATCH) + iterator.batch
                return batch | {"image": batch["image"] * (np.nan if step in self.bad else 1)}

        return Iterator(self)


def test_bad_steps_end_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    options = {"total_steps": 60, "checkpoint_every": 5, "max_bad_steps": 12, "loader": Poisoned(18), "evaluate": None}
    with pytest.raises(UserError, match=f"step 29: .* not finite 12 times in a row .*{tmp_path / 'checkpoints/15'} is"):
        run(tmp_path, **options)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10, 15]
    with pytest.raises(UserError, match="step 29: "):  # and a restart meets the same
        run(tmp_path, **options)


def test_bad_steps_that_end_are_only_counted(tmp_path):
    state = run(tmp_path, total_steps=20, max_bad_steps=5, loader=Poisoned(10, 14), evaluate=None)
    rows = {row["step"]: row for row in curve(tmp_path)}
    assert [rows[step]["train/skipped"] for step in (9, 10, 13, 14, 20)] == [0, 1, 4, 4, 4]
    assert rows[11]["train/loss"] is None and rows[14]["train/loss"] is not None
    assert rows[14]["train/lr"] == rows[10]["train/lr"]  # a skipped step is no update
    assert (state.step, state.skipped, state.bad) == (20, 4, 0)


def test_the_best_checkpoint_is_written_when_it_is_met(tmp_path):
    scores = iter([0.1, 0.8, 0.2, 0.3, 0.4])
    run(tmp_path, total_steps=25, eval_every=5, checkpoint_every=100, evaluate=lambda _: {"accuracy": next(scores)})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.best() == 10
    assert checkpoints.steps() == [5, 10, 25] or checkpoints.steps() == [10, 25]


def test_the_moving_average_is_what_is_evaluated(tmp_path):
    seen = []

    def evaluate(params):
        seen.append(jax.device_get(params))
        return {"accuracy": 0.0}

    state = run(tmp_path / "ema", total_steps=5, evaluate=evaluate, ema_decay=0.9, optimiser={"lr": 1e-2})
    assert_same(seen[-1], state.ema)
    state = run(tmp_path / "plain", total_steps=5, evaluate=evaluate, ema_decay=None, optimiser={"lr": 1e-2})
    assert_same(seen[-1], state.params)


def test_a_missing_best_metric_warns(tmp_path):
    with pytest.warns(UserWarning, match="best_metric is 'accuracy', but evaluate gives loss"):
        run(tmp_path, total_steps=3, optimiser={"lr": 1e-2}, evaluate=lambda _: {"loss": 1.0})


def test_data_that_end_too_soon(tmp_path):
    class Short(tiny_run.Points):
        def __iter__(self):
            class Iterator(tiny_run.PointsIterator):
                def __next__(iterator):
                    if iterator.batch == 7:
                        raise StopIteration
                    return super().__next__()

            return Iterator(self)

    with pytest.raises(UserError, match="train_loader ended after 7 of 20 batches; it must not end"):
        run(tmp_path, total_steps=20, loader=Short())


def test_data_of_another_kind_are_refused_on_restart(tmp_path):
    run(tmp_path, total_steps=5, optimiser={"lr": 1e-2})

    class Other(tiny_run.Points):
        def __iter__(self):
            class Iterator(tiny_run.PointsIterator):
                def set_state(iterator, state):
                    raise ValueError("it counts other batches")

            return Iterator(self)

    with pytest.raises(UserError, match="checkpoints/5 does not fit train_loader: it counts other batches"):
        run(tmp_path, total_steps=9, optimiser={"lr": 1e-2}, loader=Other())


def test_a_bad_config_is_found_before_the_data_are_touched(tmp_path):
    with pytest.raises(UserError, match=r"optimiser\.lr is -1"):
        train({"total_steps": 5, "optimiser": {"lr": -1}}, tmp_path, init_params={}, loss_fn=None, train_loader=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_prefetch_keeps_the_place_of_what_it_hands_out(ahead):
    read: list[int] = []

    class Numbers(Iterator):
        def __init__(self):
            self.state = {"next": 0}  # one dict that changes: the place must be a copy

        def __next__(self):
            if self.state["next"] == 6:
                raise StopIteration
            read.append(self.state["next"])
            self.state["next"] += 1
            return {"image": np.array(read[-1])}

        def get_state(self):
            return self.state

    placed = prefetch(Numbers(), jax.device_put, ahead)
    batch, place = next(placed)
    assert (int(batch["image"]), place, read) == (0, {"next": 1}, list(range(ahead + 1)))
    assert isinstance(batch["image"], jax.Array)
    rest = list(placed)
    assert [(int(b["image"]), p["next"]) for b, p in rest] == [(i, i + 1) for i in range(1, 6)]


def test_sharded_over_devices_gives_the_same_curve(tmp_path):
    """Two CPU devices in a process of their own: batch split, state on both; then back on one device."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests/train")!r})
import jax, tiny_run
from jax.sharding import NamedSharding, PartitionSpec as P
from tokjax.train.loop import train
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
for total in (8, 12):
    state = train(
        tiny_run.config(total_steps=total, optimiser={{"lr": 3e-3, "accumulate": 2}}), {str(tmp_path / "two")!r},
        init_params=tiny_run.init_params(), loss_fn=tiny_run.loss_fn, train_loader=tiny_run.Points(),
        place_batch=lambda batch: jax.device_put(batch, split),
        state_sharding=lambda shapes: jax.tree.map(lambda _: everywhere, shapes),
    )
assert len(state.params["head"]["kernel"].sharding.device_set) == 2, state.params["head"]["kernel"].sharding
"""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", total_steps=8, optimiser={"lr": 3e-3, "accumulate": 2}, evaluate=None)
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [row["step"] for row in two] == list(range(1, 13))
    np.testing.assert_allclose([row["train/loss"] for row in two[:8]], [row["train/loss"] for row in one], rtol=1e-4)
    assert all(np.isfinite(row["train/loss"]) for row in two)
    assert Checkpoints(tmp_path / "two" / "checkpoints").restore_params(jax.eval_shape(tiny_run.init_params))


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, total_steps=30, log_every=10, evaluate=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 10/30", "step 20/30", "step 30/30"]
    assert all("loss" in line and "accuracy" in line for line in lines)
    assert "images_per_s" in lines[-1]


def test_every_batch_is_seen_once(tmp_path):
    """Over a restart, with batches read ahead each time."""
    expected = [b["label"].tolist() for b in itertools.islice(iter_of(tiny_run.Points()), 30)]
    seen = []

    def recording(params, batch, key):
        jax.debug.callback(lambda label: seen.append(label.tolist()), batch["label"], ordered=True)
        return tiny_run.loss_fn(params, batch, key)

    for total in (11, 30):
        run(tmp_path, total_steps=total, loss_fn=recording, prefetch=3, evaluate=None, optimiser={"lr": 1e-3})
        jax.effects_barrier()
    assert seen == expected


def test_the_loop_around_the_step_costs_little(tmp_path, monkeypatch):
    """CPU time of this thread a step, where the step itself does nothing: microseconds beside any real one."""
    times = []

    class Timed(tiny_run.Points):
        def __iter__(self):
            batch = next(super().__iter__())

            class Iterator(tiny_run.PointsIterator):
                def __next__(iterator):
                    times.append(time.thread_time())
                    return batch

            return Iterator(self)

    metrics = {name: np.int32(0) for name in ("loss", "skipped", "bad")}
    monkeypatch.setattr("tokjax.train.loop.make_step", lambda *_, **__: lambda state, batch: (state, metrics))
    run(tmp_path, total_steps=2000, log_every=1000, checkpoint_every=2000, loader=Timed(), evaluate=None)
    assert np.median(np.diff(times)) < 50e-6


def iter_of(loader):
    iterator = iter(loader)
    while True:
        yield next(iterator)


@pytest.mark.long
def test_two_processes_share_a_run(tmp_path):
    """Each its half of the batch, one folder; SIGTERM to one stops both at one step, and a restart goes on."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests/train")!r})
import jax, numpy as np, tiny_run
from jax.sharding import NamedSharding, PartitionSpec as P
from tokjax.train.loop import train
rank, port, total, pause = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
jax.distributed.initialize("localhost:" + port, 2, rank)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
class Half(tiny_run.Points):
    def __iter__(self):
        class Iterator(tiny_run.PointsIterator):
            def __next__(i):
                return {{k: v[8 * rank :][:8] for k, v in super().__next__().items()}}
            def get_state(i):
                return super().get_state() | {{"rank": rank}}
            def set_state(i, state):
                assert state["rank"] == rank
                super().set_state(state)
        return Iterator(self)
train(
    tiny_run.config(total_steps=total, eval_every=10, checkpoint_every=15), {str(tmp_path / "two")!r},
    init_params=tiny_run.init_params(), loss_fn=tiny_run.loss_fn, train_loader=Half(pause),
    evaluate=lambda params: tiny_run.evaluate(jax.tree.map(np.asarray, params)),
    place_batch=lambda batch: jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch),
    state_sharding=lambda shapes: jax.tree.map(lambda _: everywhere, shapes),
)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def start(pause):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        commands = ([sys.executable, "-c", script, str(rank), str(port), "60", str(pause)] for rank in range(2))
        return [
            subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
        ]

    both = start(pause=0.1)
    wait_for(both[0], tmp_path / "two", 12)
    both[1].terminate()
    ends = [finish(process) for process in both]
    assert [code for code, _ in ends] == [TERMINATED, TERMINATED], ends
    stopped = Checkpoints(tmp_path / "two" / "checkpoints").latest()
    assert stopped is not None and 12 <= stopped < 60
    ends = [finish(process) for process in start(pause=0)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"going on from {tmp_path / 'two' / 'checkpoints' / str(stopped)}" in ends[0][1]

    run(tmp_path / "one", total_steps=60, eval_every=10, checkpoint_every=15)
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_losses_that_follow_one_another(tmp_path):
    """Each counts from its step on; the parameters are those of one loss."""

    def stage(number):
        def loss(params, batch, key):
            value, metrics = tiny_run.loss_fn(params, batch, key)
            return value, metrics | {"stage": jnp.float32(number)}

        return loss

    stages = [(0, stage(0)), (9, stage(1)), (11, stage(2))]
    changes = {"total_steps": 14, "log_every": 1, "checkpoint_every": 2, "eval_every": 0}
    state = run(tmp_path / "whole", loss_fn=stages, **changes)
    told = [row["train/stage"] for row in curve(tmp_path / "whole") if "train/stage" in row]
    assert told == [0] * 9 + [1] * 2 + [2] * 3
    assert_same(state.params, run(tmp_path / "one", **changes).params)
    for wrong in ([], [(1, stage(0))], [(0, stage(0)), (0, stage(1))]):
        with pytest.raises(ValueError, match="the first must be 0, the others ascend"):
            run(tmp_path / "wrong", loss_fn=wrong)
