import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.train.controllers import PI, Constant, PIState
from tokjax.train.state import TrainState, make_step

SGD = optax.sgd(0.1)


def simulated(pi, rates, dtype=np.float64):
    """The rule in plain numpy."""
    p = i = dtype(0)
    for rate in rates:
        error = dtype(pi.target) - dtype(rate)
        p, i = dtype(0.9) * p + dtype(0.1 * pi.k_p) * error, i + dtype(pi.k_i) * error
        yield p, i, max(dtype(0), p + i)


def test_it_follows_the_rule_in_float64():
    rates, pi = np.random.default_rng(0).random(50), PI(target=0.4, k_i=5e-3)
    with jax.enable_x64(True):
        _, states = jax.lax.scan(lambda s, r: (pi.step(s, r),) * 2, pi.init(), rates)
        for ours, theirs in zip(
            (states.proportional, states.integral, states.weight), zip(*simulated(pi, rates), strict=True), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert (np.asarray(states.weight) == 0).any() and (np.asarray(states.weight) > 0).any()


def test_the_weight_rises_until_the_target_is_reached():
    """A plant whose rate grows with the weight comes to rest at the target, where P is gone and I alone is left."""
    pi = PI(target=0.5, k_i=1e-2)

    def react(state, _):
        rate = 1 - jnp.exp(-3 * state.weight)
        return pi.step(state, rate), rate

    state, rates = jax.lax.scan(react, pi.init(), None, length=2000)
    np.testing.assert_allclose(rates[-1], 0.5, atol=1e-3)
    assert abs(state.proportional) < 1e-4 and state.integral > 0


def counted(params, batch, key, weight):
    """A term that the weight scales; row values are the numbers of tokens that are deleted, of ten."""
    return weight * params["w"] + 0 * batch["x"].sum(), {"deleted": batch["x"].sum(), "tokens": batch["of"].sum()}


def rows(*deleted, of=None):
    return {"x": np.array(deleted, np.float32), "of": np.array(of or [10] * len(deleted), np.float32)}


def start(controller):
    return TrainState.create({"w": np.float32(1)}, SGD, jax.random.key(0), controller=controller)


def test_a_step_uses_the_weight_from_before_its_update():
    pi = PI(target=0.5, k_p=1.0, k_i=0.1, start=0.25)
    step, state = make_step(counted, SGD, controller=pi), start(pi)
    expected = [0.25, *(w for _, _, w in simulated(pi, [0.2, 0.3, 0.9]))]
    for rate, weight in zip([0.2, 0.3, 0.9], expected[:-1], strict=True):
        before = np.asarray(state.params["w"])
        state, metrics = step(state, rows(10 * rate))
        np.testing.assert_allclose([metrics["weight"], metrics["rate"]], [weight, rate], rtol=1e-6)
        np.testing.assert_allclose(state.params["w"], before - 0.1 * weight, rtol=1e-6)
    np.testing.assert_allclose(state.controller.weight, expected[-1], rtol=1e-6)
    assert state.controller.weight.dtype == jnp.float32


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_moves_once_a_step_with_the_rate_of_the_whole_batch(accumulate):
    """Parts of 0.9 and 0.1 with nine times as many tokens in the second: 1.8 of 10, not the mean of rates."""
    pi = PI(target=0.5)
    step = make_step(counted, SGD, controller=pi, accumulate=accumulate)
    state, metrics = step(start(pi), rows(0.9, 0.9, of=[1, 9]))
    np.testing.assert_allclose(metrics["rate"], 0.18, rtol=1e-6)
    np.testing.assert_allclose(state.controller.integral, 1e-5 * 0.32, rtol=1e-5)


def test_nothing_moves_before_the_delay_is_over():
    pi = PI(target=0.5, start=0.25, delay=2)
    step, state, weights = make_step(counted, SGD, controller=pi), start(pi), []
    for _ in range(4):
        state, metrics = step(state, rows(0.0))
        weights.append(float(metrics["weight"]))
        assert (state.controller.integral == 0) == (state.step <= 2)
    assert weights[:3] == [0, 0, 0.25] and weights[3] != 0.25


def test_a_skipped_step_leaves_it():
    pi = PI(target=0.5, start=0.25)
    step, state = make_step(counted, SGD, controller=pi), start(pi)
    state, metrics = step(state, rows(np.nan))
    assert metrics["skipped"] == 1 and state.controller.weight == 0.25 and state.controller.integral == 0


def test_a_batch_without_tokens_counts_as_a_rate_of_zero():
    pi = PI(target=0.5)
    state, metrics = make_step(counted, SGD, controller=pi)(start(pi), rows(0.0, of=[0]))
    assert metrics["rate"] == 0 and state.controller.integral > 0


def test_a_constant_weight_with_a_delay():
    constant = Constant(0.5, delay=1)
    step, state = make_step(lambda p, b, k, w: (w * p["w"], {}), SGD, controller=constant), start(constant)
    weights = []
    for _ in range(3):
        state, metrics = step(state, rows(0.0))
        weights.append(float(metrics["weight"]))
    assert weights == [0, 0.5, 0.5] and state.controller == ()


def test_the_state_is_written_and_read_as_any_other():
    state = start(PI(target=0.5))
    assert isinstance(state.controller, PIState)
    assert len({id(leaf) for leaf in jax.tree.leaves(state.controller)}) == 3
    assert start(None).controller is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PI(target=0.0), r"target=0.0: must be in \(0, 1\)"),
        (lambda: PI(target=1.0), r"target=1.0: must be in \(0, 1\)"),
        (lambda: PI(target=0.5, k_i=-1e-5), "k_i=-1e-05: must be at least 0"),
        (lambda: PI(target=0.5, start=np.inf), "start=inf: must be at least 0 and finite"),
        (lambda: PI(target=0.5, delay=-1), "delay=-1: must be at least 0"),
        (lambda: Constant(np.nan), "value=nan: must be finite"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_metrics_without_the_counts():
    pi = PI(target=0.5, counts=("gone", "all"))
    with pytest.raises(ValueError, match="the loss's metrics have no 'gone', only"):
        make_step(counted, SGD, controller=pi)(start(pi), rows(0.0))
