"""Differentiable stand-ins for choosing tokens, so that any score becomes learnable: pure functions of arrays.

    mask = relax.topk_mask(score, k, temperature=0.1)   # zeros and ones, k of them; the gradient of a soft mask
    x = x * mask[..., None]

All of them work along the last axis with any batch axes before it, compute in float32 and have finite gradients.
`valid [..., N]` tells which entries there are; the others get zero. A number `k` may be static, traced, or one a row,
and is at most the number of valid entries. Of equal scores the lower index wins wherever the choice is hard.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real
import numpy as np

Counts = Real[Array, "K"] | Real[np.ndarray, "K"]

STEPS = 40  # halvings of the interval in which a threshold lies: float32 has no finer ones
REACH = 40.0  # temperatures beyond the scores at which a sigmoid is 0 or 1 in float32


def straight_through(hard: Real[Array, "*n"], soft: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The value of `hard`, exactly, with the gradient of `soft` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(hard).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def ste_ceil(x: Float[Array, "*n"], slack: float = 0.0) -> Float[Array, "*n"]:
    """`ceil(x - slack)` with the gradient of `x`; a slack keeps a whole number whole that came out a hair above."""
    return straight_through(jnp.ceil(x - slack), x)


def _prepared(score: Array, valid: Array | None) -> tuple[Array, Array]:
    score = score.astype(jnp.float32)
    valid = jnp.ones(score.shape, bool) if valid is None else jnp.broadcast_to(valid, score.shape)
    return jnp.where(valid, score, 0), valid


def _count(k: int | Array, valid: Array) -> Array:
    """Of each row [..., 1], float32: k, at least 0 and at most the number of valid entries."""
    k = jnp.asarray(k, jnp.float32)
    k = jnp.broadcast_to(k, valid.shape[:-1])[..., None]
    return jnp.clip(k, 0, valid.sum(-1, keepdims=True).astype(jnp.float32))


def _check_temperature(temperature: float | Array) -> None:
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")


def soft_topk(
    score: Float[Array, "*b N"],
    k: int | Real[Array, "*b"],
    temperature: float | Float[Array, ""] = 1.0,
    valid: Bool[Array, "*b N"] | None = None,
) -> Float[Array, "*b N"]:
    """A soft mask of the k largest scores: entries in [0, 1] that add up to k, also for a fractional k.

    `sigmoid((score - threshold) / temperature)` with the threshold at which the sum is k, found by bisection. It is
    also the solution of entropic optimal transport to the two points "in" and "out" (Xie et al., "Differentiable Top-k
    with Optimal Transport", NeurIPS 2020). The gradient is the implicit one, towards scores and towards k. As the
    temperature falls the mask becomes hard; equal scores at the threshold share what is left.

    Raises:
        ValueError: a static temperature that is not above 0.
    """
    _check_temperature(temperature)
    score, valid = _prepared(score, valid)
    k = _count(k, valid)
    top = jax.lax.stop_gradient(jnp.where(valid, score, -jnp.inf).max(-1, keepdims=True))
    u = jnp.where(valid, (score - jnp.where(jnp.isfinite(top), top, 0)) / temperature, 0)  # at most 0

    def soft(u: Array, threshold: Array) -> Array:
        return jnp.where(valid, jax.nn.sigmoid(u - threshold), 0)

    fixed, wanted = jax.lax.stop_gradient((u, k))

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = soft(fixed, middle).sum(-1, keepdims=True) > wanted  # too many: the threshold rises
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    ends = fixed.min(-1, keepdims=True) - REACH, fixed.max(-1, keepdims=True) + REACH
    low, high = jax.lax.fori_loop(0, STEPS, halve, ends)
    threshold = (low + high) / 2
    # Newton's next step, whose value is nothing and whose derivative is that of the threshold.
    mask = soft(fixed, threshold)
    slope = jnp.maximum((mask * (1 - mask)).sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    step = (soft(u, threshold).sum(-1, keepdims=True) - k) / slope
    inside = (wanted > 0) & (wanted < valid.sum(-1, keepdims=True))
    mask = soft(u, straight_through(threshold, threshold + step))
    return jnp.where(inside, mask, jnp.where(wanted > 0, valid, False).astype(jnp.float32))


def ranks(score: Real[Array, "*b N"], valid: Bool[Array, "*b N"] | None = None) -> Int[Array, "*b N"]:
    """Place of every score in descending order, 0 the largest, ties to the lower index, invalid ones last."""
    score, valid = _prepared(score, valid)
    order = jnp.argsort(jnp.where(valid, -score, jnp.inf), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).astype(jnp.int32)


def topk_mask(
    score: Float[Array, "*b N"],
    k: int | Real[Array, "*b"],
    temperature: float | Float[Array, ""] = 1.0,
    valid: Bool[Array, "*b N"] | None = None,
) -> Float[Array, "*b N"]:
    """1 at the k largest scores (a fractional k is rounded up), 0 elsewhere; the gradient of `soft_topk`.

    Raises:
        ValueError: a static temperature that is not above 0.
    """
    soft = soft_topk(score, k, temperature, valid)
    _, inside = _prepared(score, valid)
    return straight_through((ranks(score, valid) < _count(k, inside)) & inside, soft)


def gumbel_topk(
    key: Array,
    score: Float[Array, "*b N"],
    k: int | Real[Array, "*b"],
    temperature: float | Float[Array, ""] = 1.0,
    valid: Bool[Array, "*b N"] | None = None,
) -> Float[Array, "*b N"]:
    """`topk_mask` of scores with Gumbel noise: k draws without replacement, the scores being log-probabilities.

    Kool et al., "Stochastic Beams and Where to Find Them", ICML 2019.

    Args:
        key: one for the whole array.
        score: unnormalised log-probabilities.
        k: how many to draw.
        temperature: of the soft mask that gives the gradient.
        valid: which entries there are.

    Raises:
        ValueError: a static temperature that is not above 0.
    """
    return topk_mask(score.astype(jnp.float32) + jax.random.gumbel(key, score.shape), k, temperature, valid)


def gumbel_softmax(
    key: Array,
    logits: Float[Array, "*b N"],
    temperature: float | Float[Array, ""] = 1.0,
    *,
    hard: bool = False,
    valid: Bool[Array, "*b N"] | None = None,
) -> Float[Array, "*b N"]:
    """A draw from a categorical distribution as a point of the simplex (Jang et al., ICLR 2017); zeros if none valid.

    Args:
        key: one for the whole array.
        logits: unnormalised log-probabilities.
        temperature: of the softmax; the draw becomes one-hot as it falls.
        hard: whether to give the one-hot draw itself, with the gradient of the soft one.
        valid: which entries there are.

    Raises:
        ValueError: a static temperature that is not above 0.
    """
    _check_temperature(temperature)
    logits, valid = _prepared(logits, valid)
    noisy = jnp.where(valid, (logits + jax.random.gumbel(key, logits.shape)) / temperature, -1e30)
    soft = jnp.where(valid, jax.nn.softmax(noisy, -1), 0)
    if not hard:
        return soft
    one = jax.nn.one_hot(noisy.argmax(-1), logits.shape[-1])
    return straight_through(jnp.where(valid, one, 0), soft)


def soft_rank(
    score: Float[Array, "*b N"],
    temperature: float | Float[Array, ""] = 1.0,
    valid: Bool[Array, "*b N"] | None = None,
) -> Float[Array, "*b N"]:
    """How many others are larger, softly: 0 for the largest score, N - 1 for the smallest as the temperature falls.

    The sum over the others of `sigmoid((theirs - own) / temperature)` (Qin et al., "A General Approximation Framework
    for Direct Optimization of Information Retrieval Measures", 2010), so that equal scores have equal ranks and all
    ranks add up to N (N - 1) / 2. Memory grows with N squared.

    Raises:
        ValueError: a static temperature that is not above 0.
    """
    _check_temperature(temperature)
    score, valid = _prepared(score, valid)
    larger = jax.nn.sigmoid((score[..., None, :] - score[..., :, None]) / temperature)
    others = valid[..., None, :] & ~jnp.eye(score.shape[-1], dtype=bool)
    return jnp.where(valid, jnp.where(others, larger, 0).sum(-1), 0)


def expected_count(logits: Float[Array, "*b K"], candidates: Counts) -> Float[Array, "*b"]:
    """The mean of the candidates under softmax(logits): a number that learns (DiffRate, Chen et al., ICCV 2023).

    Its gradient towards logit k is `chance[k] * (candidates[k] - mean)`. `ste_ceil` of it is a whole number.
    """
    chance = jax.nn.softmax(logits.astype(jnp.float32), -1)
    return jnp.sum(chance * jnp.asarray(candidates, jnp.float32), -1)


def kept_probability(logits: Float[Array, "*b K"], candidates: Counts, length: int) -> Float[Array, "*b N"]:
    """Probability that place i of a sorted sequence is kept, if candidate c keeps the first c places.

    That is the sum of softmax(logits) over the candidates above i, from 1 at the front to 0 behind the largest one: the
    soft form of the mask `arange(length) < count` (DiffRate, Chen et al., ICCV 2023, sec. 3.3).
    """
    chance = jax.nn.softmax(logits.astype(jnp.float32), -1)
    reaches = jnp.asarray(candidates)[:, None] > jnp.arange(length)
    return jnp.einsum("...k,kn->...n", chance, reaches.astype(jnp.float32), precision="highest")


def policy_softmax(
    logits: Float[Array, "*b Q N"],
    policy: Float[Array, "*b N"],
    queries: slice | Int[Array, "*b Q"] = slice(None),
    eps: float = 1e-6,
    *,
    chord: bool = False,
) -> Float[Array, "*b Q N"]:
    """Attention that dropped tokens take no part in, differentiable towards who is dropped.

    The exponentials of keys with policy 0 are left out of their row, all but a token's own, so that every row has at
    least one key (DynamicViT, Rao et al., NeurIPS 2021, eq. 10, with the epsilon of its released code).

    Args:
        logits: of the chosen query rows.
        policy: 1 kept, 0 dropped, of every key; axes before the last must broadcast with those of the logits' rows.
        queries: which rows these are, of as many as there are keys.
        eps: added to the sum of a row, an N-th of it to every key.
        chord: whether the gradient towards a dropped key is the slope of the chord, from dropped to kept, and not of
            the tangent. The tangent says what a first hair of the key would change, which is up to 1 / eps where the
            key outweighs all that are kept together; the chord says what the whole key would, at most 1.
    """
    n = logits.shape[-1]
    own = jnp.eye(n)[queries]
    policy = policy.astype(jnp.float32)[..., None, :]
    logits = logits.astype(jnp.float32)
    e = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    if chord:
        fixed = jax.lax.stop_gradient(policy)
        total = jnp.sum(e * (fixed + (1 - fixed) * own), -1, keepdims=True) + eps
        slope = jax.lax.stop_gradient(total / (total + e * (1 - fixed) * (1 - own)))
        policy = fixed + (policy - fixed) * slope
    e = e * (policy + (1 - policy) * own)
    return (e + eps / n) / (e.sum(-1, keepdims=True) + eps)
