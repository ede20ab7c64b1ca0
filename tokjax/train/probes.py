"""Linear probes on frozen features, solved instead of trained: both losses are convex, so that a result has no learning
rate, no number of epochs and no order of examples to depend on, and is the same again after a restart.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np
import optax


class Linear(NamedTuple):
    """An affine map of features."""

    kernel: Float[Array, "C K"]
    bias: Float[Array, " K"]

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n K"]:
        return jnp.dot(x, self.kernel, precision="highest") + self.bias


def ridge(x: Float[np.ndarray, "n C"], y: Float[np.ndarray, "n K"], l2: float = 1e-4) -> Linear:
    """Least squares, in closed form in float64: mean |x W + b - y|^2 + l2 |W|^2 for features scaled to deviation 1.

    Args:
        x: features.
        y: targets.
        l2: above 0; the bias is free.

    Raises:
        ValueError: shapes that do not fit, no rows, values that are not finite, or `l2` not above 0.
    """
    x, mean, std = _scaled(x, y, l2)
    y = np.asarray(y, np.float64)
    middle = y.mean(0)
    gram = x.T.astype(np.float64) @ x / len(x)
    kernel = np.linalg.solve(gram + l2 * np.eye(len(gram)), x.T.astype(np.float64) @ (y - middle) / len(x))
    return _unscaled(kernel, middle, mean, std)


def logistic(
    x: Float[np.ndarray, "n C"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    l2: float = 1e-4,
    iterations: int = 200,
    tolerance: float = 1e-4,
) -> Linear:
    """Softmax regression by L-BFGS on all rows: mean cross-entropy + l2 / 2 |W|^2 for features scaled to deviation 1.

    Args:
        x: features.
        labels: 0 to `classes` - 1.
        classes: K; those without a row become improbable.
        l2: above 0, so that there is one solution; the bias is free.
        iterations: at most.
        tolerance: of the largest entry of the gradient, at which it ends.

    Raises:
        ValueError: shapes that do not fit, no rows, values that are not finite, labels out of range, or `l2` not above
            0.
    """
    x, mean, std = _scaled(x, labels, l2)
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be [n] in 0..{classes - 1}, got {labels.shape}, {labels.min()}..{labels.max()}")
    # From the classes' frequencies, where the gradient of every bias is zero already.
    start = np.log((np.bincount(labels, minlength=classes) + 1) / (len(labels) + classes))
    first = Linear(jnp.zeros((x.shape[1], classes)), jnp.asarray(start, jnp.float32))
    found = _minimise(first, jnp.asarray(x), jnp.asarray(labels), l2, iterations, tolerance)
    return _unscaled(np.asarray(found.kernel, np.float64), np.asarray(found.bias, np.float64), mean, std)


@functools.partial(jax.jit, static_argnames="iterations")
def _minimise(first: Linear, x: Array, labels: Array, l2: float, iterations: int, tolerance: float) -> Linear:
    def loss(probe: Linear) -> Array:
        own = optax.softmax_cross_entropy_with_integer_labels(probe(x), labels)
        return own.mean() + l2 / 2 * jnp.sum(probe.kernel**2)

    optimiser = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def goes_on(carry):
        _, state, step = carry
        gradient = optax.tree_utils.tree_get(state, "grad")
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))
        return (step == 0) | ((step < iterations) & (largest > tolerance))

    def step(carry):
        probe, state, count = carry
        value, gradient = value_and_grad(probe, state=state)
        updates, state = optimiser.update(gradient, state, probe, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(probe, updates), state, count + 1

    return jax.lax.while_loop(goes_on, step, (first, optimiser.init(first), 0))[0]


def _scaled(x, y, l2: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of mean 0 and deviation 1, float32; channels that never change become 0."""
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or not len(x) or len(y) != len(x):
        raise ValueError(f"x is {x.shape} and y {np.shape(y)}; they must have the same number of rows, at least 1")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x and y must be finite")
    if not l2 > 0:
        raise ValueError(f"l2 must be above 0, got {l2}")
    mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    std = np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, np.inf)
    return ((x - mean) / std).astype(np.float32), mean, std


def _unscaled(kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Linear:
    """The map of features as they are."""
    kernel = kernel / std[:, None]
    return Linear(jnp.asarray(kernel, jnp.float32), jnp.asarray(bias - mean @ kernel, jnp.float32))
