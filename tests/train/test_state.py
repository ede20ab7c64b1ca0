import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.errors import UserError
from tokjax.train import optimisers
from tokjax.train.state import Teacher, TrainState, make_step

from . import tiny_run

SGD = optax.sgd(0.1)


def quadratic(params, batch, key):
    """Mean of (w - x)^2 / 2: the gradient is w minus the batch's mean."""
    error = params["w"] - batch["image"]
    return 0.5 * (error**2).sum(axis=1).mean(), {"error": jnp.abs(error).mean()}


def start(optimiser=SGD, **options):
    return TrainState.create({"w": np.zeros(3, np.float32)}, optimiser, jax.random.key(0), **options)


def rows(*values):
    return {"image": np.repeat(np.array(values, np.float32)[:, None], 3, axis=1)}


def test_a_step():
    step = make_step(quadratic, SGD)
    state, metrics = step(start(), rows(1.0, 3.0))
    np.testing.assert_allclose(state.params["w"], 0.2, rtol=1e-6)
    assert state.step == 1 and state.step.dtype == jnp.int32
    np.testing.assert_allclose(metrics["loss"], 0.5 * 3 * 5, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], 2 * np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], 2.0, rtol=1e-6)
    assert metrics["skipped"] == 0


def test_it_is_compiled_once_and_takes_over_the_state():
    params = tiny_run.init_params()
    optimiser = optimisers.make_optimiser({"warmup_steps": 2, "frozen": "head/bias"}, 10, params)
    traced = []

    def loss_fn(*args):
        traced.append(None)
        return tiny_run.loss_fn(*args)

    step = make_step(loss_fn, optimiser, ema_decay=0.9)
    data = iter(tiny_run.Points())
    state = TrainState.create(params, optimiser, jax.random.key(0), ema=True)
    for _ in range(3):
        before, (state, _) = state, step(state, next(data))
    assert len(traced) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params))


def test_the_callers_parameters_stay_usable():
    params = {"w": jnp.zeros(3)}
    state = TrainState.create(params, SGD, jax.random.key(0))
    make_step(quadratic, SGD)(state, rows(1.0))
    assert not params["w"].is_deleted()


def test_parameters_become_float32_masters():
    state = TrainState.create({"w": jnp.zeros(3, jnp.bfloat16)}, SGD, jax.random.key(0))
    assert state.params["w"].dtype == jnp.float32


def test_an_old_key_is_refused():
    with pytest.raises(ValueError, match="key has dtype uint32"):
        TrainState.create({"w": jnp.zeros(3)}, SGD, jax.random.PRNGKey(0))


def test_the_key_of_a_step_depends_on_its_number():
    def noise(params, batch, key):
        return 0.0 * params["w"].sum(), {"drawn": jax.random.uniform(key)}

    step, state = make_step(noise, SGD), start()
    for t in range(3):
        state, metrics = step(state, rows(0.0))
        assert metrics["drawn"] == jax.random.uniform(jax.random.fold_in(jax.random.key(0), t))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    optimiser = optax.adam(0.1)
    step = make_step(quadratic, optimiser, ema_decay=0.9)
    state, _ = step(start(optimiser, ema=True), rows(1.0))

    def learnt():
        return jax.device_get((state.params, state.opt_state, state.ema))

    kept = learnt()
    for count in (1, 2):
        state, metrics = step(state, rows(1.0, bad))
        assert (metrics["skipped"], metrics["bad"], state.step) == (count, count, 1 + count)
        assert jax.tree.all(jax.tree.map(np.array_equal, kept, learnt()))
    state, metrics = step(state, rows(1.0))
    assert (metrics["skipped"], metrics["bad"]) == (2, 0)
    assert (state.params["w"] != kept[0]["w"]).all() and jnp.isfinite(state.params["w"]).all()


def test_a_finite_loss_with_gradients_that_are_not():
    def root(params, batch, key):
        return jnp.sqrt(params["w"]).sum(), {}

    state, metrics = make_step(root, SGD)(start(), rows(1.0))
    assert jnp.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert (state.params["w"] == 0).all()


def test_moving_average_warms_up():
    step, state, expected = make_step(quadratic, SGD, ema_decay=0.2), start(ema=True), np.zeros(3)
    for t in range(4):
        state, _ = step(state, rows(1.0))
        decay = min(0.2, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * np.asarray(state.params["w"])
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)
    assert state.eval_params is state.ema
    assert start().eval_params is not None and start().ema is None


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_equals_large_batch(accumulate):
    params = tiny_run.init_params()
    optimiser = optimisers.make_optimiser({"lr": 1e-2}, 10, params)

    def without_dropout(params, batch, key):
        return tiny_run.loss_fn(params, batch, None)

    def run(parts):
        step = make_step(without_dropout, optimiser, accumulate=parts)
        state, data = TrainState.create(params, optimiser, jax.random.key(0)), iter(tiny_run.Points())
        for _ in range(3):
            state, metrics = step(state, next(data))
        return state, metrics

    (whole, metrics), (parts, metrics_of_parts) = run(1), run(accumulate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts.params, whole.params)
    for name in metrics:
        np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-4)
    assert parts.step == 3


def test_accumulated_parts_draw_apart():
    def noise(params, batch, key):
        return (params["w"] * jax.random.normal(key, (3,))).sum(), {}

    state, _ = make_step(noise, SGD, accumulate=2)(start(), rows(0.0, 0.0))
    key = jax.random.fold_in(jax.random.key(0), 0)
    drawn = [jax.random.normal(jax.random.fold_in(key, i), (3,)) for i in range(2)]
    np.testing.assert_allclose(state.params["w"], -0.1 * (drawn[0] + drawn[1]) / 2, rtol=1e-5)


def test_accumulate_must_divide_the_batch():
    with pytest.raises(UserError, match="accumulate is 2; it must divide the batch, which has 3 rows"):
        make_step(quadratic, SGD, accumulate=2)(start(), rows(0.0, 0.0, 0.0))


def test_frozen_parameters_stay_and_cost_no_gradient():
    params = tiny_run.init_params()
    cfg = {"lr": 0.1, "weight_decay": 0.1, "frozen": "blocks/.*"}
    optimiser, frozen = optimisers.make_optimiser(cfg, 10, params), optimisers.frozen(cfg, params)
    step = make_step(tiny_run.loss_fn, optimiser, frozen=frozen, ema_decay=0.9)
    state, data = TrainState.create(params, optimiser, jax.random.key(0), ema=True), iter(tiny_run.Points())
    for _ in range(3):
        state, _ = step(state, next(data))
    for tree in (state.params, state.ema):
        assert jax.tree.all(jax.tree.map(np.array_equal, tree["blocks"], params["blocks"]))
        assert (tree["head"]["kernel"] != params["head"]["kernel"]).all()

    def flops(**options):
        step = make_step(tiny_run.loss_fn, optimiser, **options)
        fresh = TrainState.create(params, optimiser, jax.random.key(0))
        return step.lower(fresh, next(data)).compile().cost_analysis()["flops"]

    assert flops(frozen=frozen) < 0.7 * flops()


def test_names_that_the_step_reports_are_taken():
    with pytest.raises(ValueError, match="'grad_norm', which the step reports itself"):
        make_step(lambda params, batch, key: (params["w"].sum(), {"grad_norm": 0.0}), SGD)(start(), rows(1.0))


# Moving statistics


def moving(params, batch, key):
    """A batch norm's way: the loss looks at the batch only, `mean` follows it with momentum 0.5."""
    mean = params["norm"]["mean"] + 0.5 * (batch["image"].mean(0) - params["norm"]["mean"])
    value, metrics = quadratic(params, batch, key)
    return value, {**metrics, "statistics": {"norm": {"mean": mean}}}


def moving_start(**options):
    params = {"w": np.zeros(3, np.float32), "norm": {"mean": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}
    cfg = {"lr": 0.1, "weight_decay": 0.1}
    optimiser, frozen = optimisers.make_optimiser(cfg, 10, params), optimisers.frozen(cfg, params)
    return TrainState.create(params, optimiser, jax.random.key(0), **options), optimiser, frozen


def test_moving_statistics_are_written_after_the_update():
    state, optimiser, frozen = moving_start(ema=True)
    assert frozen["norm"] == {"mean": True, "scale": False}
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 4  # two of w, two of scale
    state, metrics = make_step(moving, optimiser, frozen=frozen, ema_decay=0.9)(state, rows(1.0, 3.0))
    np.testing.assert_allclose(state.params["norm"]["mean"], 1.0)
    np.testing.assert_allclose(state.ema["norm"]["mean"], 0.9)  # the average is at (1 + 0) / (10 + 0)
    assert "statistics" not in metrics


def test_moving_statistics_are_averaged_over_the_parts():
    state, optimiser, frozen = moving_start()
    step = make_step(moving, optimiser, frozen=frozen, accumulate=2)
    state, _ = step(state, rows(1.0, 2.0, 3.0, 6.0))  # parts of means 2 and 4
    np.testing.assert_allclose(state.params["norm"]["mean"], 1.5)


def test_moving_statistics_stay_where_a_step_is_skipped():
    state, optimiser, frozen = moving_start()
    step = make_step(moving, optimiser, frozen=frozen)
    state, _ = step(state, rows(1.0))
    state, metrics = step(state, rows(np.nan))
    assert metrics["skipped"] == 1
    np.testing.assert_allclose(state.params["norm"]["mean"], 0.5)


def test_statistics_that_are_not_finite_skip_the_step():
    def overflows(params, batch, key):
        return params["w"].sum(), {"statistics": {"norm": {"mean": jnp.full(3, jnp.inf)}}}

    state, optimiser, _ = moving_start()
    state, metrics = make_step(overflows, optimiser)(state, rows(1.0))
    assert metrics["skipped"] == 1 and (state.params["w"] == 0).all()


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"norm": {"var": jnp.ones(3)}}, "'norm/var', which params do not have"),
        ({"norm": {"mean": jnp.ones(2)}}, r"\(2,\) at 'norm/mean/', where params have \(3,\)"),
        ({"norm": jnp.ones(3)}, r"\(3,\) at 'norm/', where params have a tree"),
    ],
)
def test_statistics_that_do_not_fit(statistics, message):
    state, optimiser, _ = moving_start()
    with pytest.raises(ValueError, match=message):
        make_step(lambda p, batch, key: (p["w"].sum(), {"statistics": statistics}), optimiser)(state, rows(1.0))


# Teachers


def pupil(params, batch, key, teacher):
    """Half a square to the batch, and the teacher's place as a metric."""
    value, _ = quadratic(params, batch, key)
    return value + 0 * (params["w"] * teacher["w"]).sum(), {"told": teacher["w"].mean()}


def test_a_teacher_follows_after_each_step_with_rising_momentum():
    teacher = Teacher(lambda params: {"w": params["w"]}, 0.5, total_steps=4)
    step, state = make_step(pupil, SGD, teacher=teacher), start(teacher=teacher)
    expected = np.zeros(3)
    for update in range(1, 5):
        state, metrics = step(state, rows(1.0))
        np.testing.assert_allclose(metrics["told"], expected.mean(), rtol=1e-6)  # as it was before the step
        momentum = 1 - 0.5 * 0.5 * (1 + np.cos(np.pi * update / 4))
        expected = momentum * expected + (1 - momentum) * np.asarray(state.params["w"])
        np.testing.assert_allclose(state.teacher["w"], expected, rtol=1e-6)
    assert teacher.momentum_at(0) == 0.5 and teacher.momentum_at(4) == teacher.momentum_at(9) == 1


def test_a_teacher_starts_as_its_part_and_stays_where_a_step_is_skipped():
    params = {"w": np.ones(3, np.float32), "other": np.ones(2, np.float32)}
    teacher = Teacher(lambda params: {"w": params["w"]}, 0.9, total_steps=10)
    state = TrainState.create(params, SGD, jax.random.key(0), teacher=teacher)
    assert list(state.teacher) == ["w"] and (state.teacher["w"] == 1).all()
    step = make_step(pupil, SGD, teacher=teacher, accumulate=2)
    state, _ = step(state, rows(3.0, np.nan))
    assert (state.teacher["w"] == 1).all()
    state, metrics = step(state, rows(3.0, 3.0))
    assert (state.teacher["w"] > 1).all() and metrics["told"] == 1


def test_parameters_are_kept_in_their_range():
    def clamp(params):
        return {"w": jnp.clip(params["w"], 0, 0.05)}

    teacher = Teacher(lambda params: params, 0.0, total_steps=10)
    step = make_step(pupil, SGD, teacher=teacher, constrain=clamp, ema_decay=0.9)
    state, _ = step(start(ema=True, teacher=teacher), rows(1.0))
    np.testing.assert_array_equal(state.params["w"], np.float32(0.05))
    assert (state.ema["w"] <= 0.05).all() and (state.teacher["w"] <= 0.05).all()


def test_a_momentum_out_of_range():
    with pytest.raises(ValueError, match=r"momentum is 1.5; it must be in \[0, 1\]"):
        Teacher(lambda params: params, 1.5, 10)
