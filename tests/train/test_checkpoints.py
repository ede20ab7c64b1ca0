import json
from pathlib import Path
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.train import optimisers
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.state import TrainState, make_step

from . import tiny_run

OPTIMISER = optimisers.make_optimiser({"frozen": "head/bias"}, 10, tiny_run.init_params())


def make_state(seed=0, *, ema=True, params=None):
    state = TrainState.create(params or tiny_run.init_params(), OPTIMISER, jax.random.key(seed), ema=ema)
    rng = np.random.default_rng(seed)

    def fill(x):
        return jnp.array(rng.normal(size=x.shape), x.dtype)

    return state.replace(
        step=jnp.int32(seed), params=jax.tree.map(fill, state.params), opt_state=jax.tree.map(fill, state.opt_state)
    )


def shapes(**options):
    return jax.eval_shape(lambda: make_state(**options))


def plain(tree):
    return jax.tree.map(
        lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))


def fill(folder, scores, **options):
    """Saves steps 10, 20, ... with these accuracies."""
    with Checkpoints(folder, **options) as checkpoints:
        for i, score in enumerate(scores, 1):
            checkpoints.save(10 * i, make_state(i), {"batch": i}, {} if score is None else {"accuracy": score})
    return Checkpoints(folder, **options)


@pytest.fixture(autouse=True)
def no_warning():
    """What is not expected to warn must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("data_state", [{"epoch": 3, "deep": [1, {"x": None}]}, b"\x00\xff grain", None])
def test_everything_comes_back(tmp_path, data_state):
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, make_state(7), data_state, {"accuracy": jnp.float32(0.5), "loss": np.nan})
        restored = checkpoints.restore(shapes())
    assert (restored.step, restored.data_state) == (7, data_state)
    assert restored.metrics == {"accuracy": 0.5, "loss": None}
    assert_same(restored.state, make_state(7))
    assert jax.random.uniform(restored.state.key) == jax.random.uniform(jax.random.key(7))


def test_what_was_restored_trains_on(tmp_path):
    step, state, data = make_step(tiny_run.loss_fn, OPTIMISER), make_state(1, ema=False), iter(tiny_run.Points())
    batch = next(data)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)  # and the memory of the state is given away at once
        for _ in range(20):
            state, _ = step(state, batch)
        again = checkpoints.restore(shapes(ema=False)).state
    for _ in range(20):
        again, _ = step(again, batch)
    assert_same(again, state)


def test_only_the_parameters(tmp_path):
    fill(tmp_path / "a", [None])
    wanted = jax.eval_shape(tiny_run.init_params)
    averaged = Checkpoints(tmp_path / "a").restore_params(wanted)
    assert_same(averaged, make_state(1).ema)
    assert_same(Checkpoints(tmp_path / "a").restore_params(wanted, ema=False), make_state(1).params)
    with Checkpoints(tmp_path / "b") as checkpoints:
        checkpoints.save(1, make_state(4, ema=False))
    assert_same(checkpoints.restore_params(tiny_run.init_params()), make_state(4, ema=False).params)


@pytest.mark.parametrize(
    ("scores", "options", "left", "best"),
    [
        ([0.1, 0.9, 0.2, 0.3, 0.4], {}, [20, 40, 50], 20),
        ([0.1, 0.9, 0.2, 0.3, 0.9], {"keep_last": 1}, [20, 50], 20),
        ([0.1, 0.9, 0.2, 0.3, 0.4], {"keep_best": False}, [40, 50], 50),
        ([0.5, 0.9, 0.1, 0.3, 0.4], {"mode": "min", "keep_last": 1}, [30, 50], 30),
        ([None, 0.2, np.nan, None, None], {"keep_last": 1}, [20, 50], 20),
        ([None, None, None], {"keep_last": 1}, [30], None),
    ],
)
def test_the_last_and_the_best_stay(tmp_path, scores, options, left, best):
    checkpoints = fill(tmp_path, scores, **options)
    assert checkpoints.steps() == left
    assert checkpoints.best() == best
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, left))


def test_the_best_is_known_after_a_restart(tmp_path):
    fill(tmp_path, [0.1, 0.9, 0.2])
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.improves({"accuracy": 0.9})
        assert checkpoints.improves({"accuracy": 0.91})
        assert not checkpoints.improves({"loss": 0.1})
        for step in (40, 50, 60):
            checkpoints.save(step, make_state(step), None, {"accuracy": 0.3})
    assert checkpoints.steps() == [20, 50, 60]
    assert checkpoints.restore(shapes(), "best").step == 20
    assert checkpoints.restore(shapes(), 50).step == 50


def damage(kind, step: Path):
    arrays = max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = arrays.read_bytes()
    if kind == "truncated":
        arrays.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 2
        arrays.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "missing":
        arrays.unlink()
    elif kind == "empty files":
        for path in (p for p in step.rglob("*") if p.is_file()):
            path.write_bytes(b"")
    elif kind == "no record":
        (step / "step.json").unlink()
    elif kind == "torn record":
        record = step / "step.json"
        record.write_text(record.read_text()[:-40])
    elif kind == "changed record":
        record = step / "step.json"
        record.write_text(record.read_text().replace('"batch": 3', '"batch": 2'))


KINDS = ["truncated", "flipped", "missing", "empty files", "no record", "torn record", "changed record"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_step_gives_way_to_the_one_before(tmp_path, kind):
    checkpoints = fill(tmp_path, [0.1, 0.2, 0.3])
    damage(kind, tmp_path / "30")
    with pytest.warns(UserWarning, match=f"checkpoint {tmp_path / '30'} cannot be read: .*the one before it is used"):
        restored = checkpoints.restore(shapes())
    assert (restored.step, restored.data_state) == (20, {"batch": 2})
    assert_same(restored.state, make_state(2))
    with pytest.raises(UserError, match=f"{tmp_path / '30'} cannot be read"):
        checkpoints.restore(shapes(), 30)

    # Going on from 20, the run comes to 30 again: what lies there is moved aside and does not count.
    with pytest.warns(UserWarning, match=r"30 is in the way: moved to .*30\.aside"), checkpoints:
        checkpoints.save(25, make_state(25), {"batch": 25})
        checkpoints.save(30, make_state(33), {"batch": 33})
    assert checkpoints.steps() == [20, 25, 30]  # 20 is the best now
    assert_same(checkpoints.restore(shapes()).state, make_state(33))


def test_the_best_that_is_damaged_gives_way_to_the_next_best(tmp_path):
    checkpoints = fill(tmp_path, [0.9, 0.2, 0.1], keep_last=3)
    damage("truncated", tmp_path / "10")
    with pytest.warns(UserWarning, match="10 cannot be read"):
        assert checkpoints.restore(shapes(), "best").step == 20


def test_all_damaged(tmp_path):
    checkpoints = fill(tmp_path, [0.1, 0.2])
    for step in (10, 20):
        damage("truncated", tmp_path / str(step))
    with (
        pytest.warns(UserWarning, match="20 cannot be read"),
        pytest.raises(UserError, match=r"20 cannot be read: .*bytes instead of.*10 cannot be read"),
    ):
        checkpoints.restore(shapes())


def test_what_a_killed_run_left_half_written_counts_for_nothing(tmp_path):
    checkpoints = fill(tmp_path, [0.1, 0.2])
    for name in ("30.tmp", "10.tmp"):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "30.tmp" / "state" / "part").write_bytes(b"x")
    assert checkpoints.restore(shapes()).step == 20
    assert (tmp_path / "30.tmp").exists()  # reading changes nothing
    with checkpoints:
        checkpoints.save(30, make_state(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "30"]


def test_a_failed_save_is_told_and_harms_nothing(tmp_path, monkeypatch):
    checkpoints = fill(tmp_path, [0.1, 0.2])

    def full(path):
        raise OSError("no space left")

    monkeypatch.setattr("tokjax.train.checkpoints._checksum", full)
    checkpoints.save(30, make_state(3))
    with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.steps() == [10, 20]
    with checkpoints:
        checkpoints.save(40, make_state(4))
    assert checkpoints.steps() == [20, 40]


def test_another_model(tmp_path):
    checkpoints = fill(tmp_path, [0.1])
    wide = tiny_run.init_params()
    wide["blocks"][1]["kernel"] = np.zeros((16, 24), np.float32)
    wide["head"]["kernel"] = np.zeros((24, 3), np.float32)
    said = r"10 is of another model: params/blocks/1/kernel has shape \(16, 16\) there and has shape \(16, 24\)"
    with pytest.raises(UserError, match=said):
        checkpoints.restore(shapes(params=wide))
    with pytest.raises(UserError, match=said.replace("params/", "ema/")):
        checkpoints.restore_params(wide)

    less = tiny_run.init_params()
    del less["blocks"][1]
    with pytest.raises(UserError, match=r"ema/blocks/1/bias has shape \(16,\) there and does not exist in this run"):
        checkpoints.restore_params(less)
    more = tiny_run.init_params() | {"head_dist": {"bias": np.zeros(3, np.float32)}}
    with pytest.raises(UserError, match=r"ema/head_dist/bias does not exist there and has shape \(3,\) in this run"):
        checkpoints.restore_params(more)
    with pytest.raises(UserError, match="is of another model: ema/"):
        checkpoints.restore(shapes(ema=False))


def test_nothing_there(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    said = f"{folder} holds no checkpoint; train one with python -m tokjax.main .*--workdir={tmp_path / 'run'}"
    with pytest.raises(UserError, match=said):
        Checkpoints(folder).restore(shapes())
    assert not folder.exists()
    fill(folder, [None])
    with pytest.raises(UserError, match=r"no checkpoint of step 15; there are steps \[10\]"):
        Checkpoints(folder).restore(shapes(), 15)
    with pytest.warns(UserWarning, match="has the metric 'accuracy': the latest is used"):
        assert Checkpoints(folder).restore(shapes(), "best").step == 10


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(UserError, match="mode is 'largest'"):
        Checkpoints(tmp_path, mode="largest")


def test_the_record_can_be_read_by_eye(tmp_path):
    fill(tmp_path, [0.25])
    record = json.loads((tmp_path / "10" / "step.json").read_text().split("\n")[0])
    assert record["metrics"] == {"accuracy": 0.25}
    assert record["shapes"]["params/blocks/0/kernel"] == [12, 16]
