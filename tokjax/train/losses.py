"""Losses and counts in float32, over the valid rows of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _rows(labels: jax.Array, logits: jax.Array, valid: jax.Array | None) -> jax.Array:
    batch, classes = logits.shape
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != ((batch,) if integer else (batch, classes)):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; for logits {logits.shape} they must be "
            f"integers ({batch},) or floats ({batch}, {classes})"
        )
    if valid is None:
        return jnp.ones(batch, bool)
    if valid.shape != (batch,):
        raise ValueError(f"valid is {valid.shape}; for logits {logits.shape} it must be ({batch},)")
    return valid


def cross_entropy(
    logits: Float[Array, "B K"],
    labels: Int[Array, "B"] | Float[Array, "B K"],
    valid: Bool[Array, "B"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean softmax cross-entropy over the valid rows.

    Args:
        logits: of any float type; the arithmetic is float32.
        labels: class numbers, or a distribution over the classes for each row (mixed or smoothed by the data).
        valid: rows that count; None: all. What an invalid row holds, NaN too, changes neither value nor gradient.
        label_smoothing: s in `(1 - s) one_hot + s / K`, for class numbers only.

    Returns:
        float32 []; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit, smoothing outside [0, 1), or smoothing of labels that are distributions.
    """
    valid = _rows(labels, logits, valid)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    # Both ends are masked: a zero weight alone would let a NaN of an invalid row into the gradient.
    logits = jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0)
    logp = jax.nn.log_softmax(logits)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        picked = jnp.take_along_axis(logp, jnp.where(valid, labels, 0)[:, None], axis=1)[:, 0]
        rows = -(1.0 - label_smoothing) * picked - label_smoothing * logp.mean(axis=1)
    elif label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing}; labels that are distributions must bring their own")
    else:
        # A class of probability 0 adds 0 even where its logit is -inf.
        targets = labels.astype(jnp.float32)
        rows = -(targets * jnp.where(targets == 0, 0.0, logp)).sum(axis=1)
    return jnp.where(valid, rows, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def accuracy(
    logits: Float[Array, "B K"],
    labels: Int[Array, "B"] | Float[Array, "B K"],
    valid: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many valid rows have their largest logit at the label (or at the label's largest share), and how many count.

    Counts, not a ratio, so that batches and processes add up. Ties go to the lower class.

    Returns:
        correct and total, float32 [] each.

    Raises:
        ValueError: shapes that do not fit.
    """
    valid = _rows(labels, logits, valid)
    wanted = labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(labels, axis=1)
    correct = (jnp.argmax(logits, axis=1) == wanted) & valid
    return correct.sum(dtype=jnp.float32), valid.sum(dtype=jnp.float32)
