"""AdamW with warm-up and cosine, weight decay where it belongs, clipping, and frozen parameters that cost nothing.

AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019). The cosine: the same authors' SGDR
(ICLR 2017), one period without restarts.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokjax.errors import UserError
from tokjax.train.config import OptimiserConfig

# Stacked blocks give a bias two axes, so rank alone does not tell what a parameter is: its name does too.
UNDECAYED = frozenset({"bias", "scale", "gamma", "cls_token", "dist_token", "reg_token", "clr", "pos_embed"})
STATISTICS = frozenset({"mean", "var"})  # moving statistics of norms: the step writes them, no gradient does


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's place in a tree as text: `blocks/0/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def schedule(cfg: Any, total_steps: int) -> optax.Schedule:
    """The learning rate of update t, counted from 0: `lr (t + 1) / warmup`, then a half cosine from lr to final_lr.

    So the first update is not lost to a rate of zero, and update `warmup - 1` already has the full rate.

    Args:
        cfg: an OptimiserConfig, or a ConfigDict with its fields.
        total_steps: updates of the whole run.

    Returns:
        A function of the number of updates made so far, a scalar (traced or not), giving float32 [].

    Raises:
        UserError: the warm-up does not end before the run does, or a field is out of range.
    """
    cfg = OptimiserConfig.of(cfg)
    warmup = cfg.warmup_steps or round(cfg.warmup_fraction * total_steps)
    if not 0 <= warmup < total_steps:
        raise UserError(f"optimiser.warmup_steps is {warmup}; it must be below total_steps, which is {total_steps}")

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / (total_steps - warmup), 0.0, 1.0)
        cosine = cfg.final_lr + (cfg.lr - cfg.final_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, cfg.lr * (step + 1.0) / max(warmup, 1), cosine)

    return rate


def decayed(params: Any) -> Any:
    """Which parameters weight decay touches: matrices, but no bias, norm, LayerScale, position table or extra token.

    Args:
        params: a tree of arrays (or of their shapes).

    Returns:
        The same tree with a bool at each leaf.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim >= 2 and path_name(path).rpartition("/")[2] not in UNDECAYED

    return jax.tree_util.tree_map_with_path(one, params)


def frozen(cfg: Any, params: Any) -> Any:
    """Which parameters are not trained: those that the config names, and the moving statistics of batch norms.

    Args:
        cfg: an OptimiserConfig, or a ConfigDict with its fields; there is said what an expression of `frozen` matches.
        params: a tree of arrays (or of their shapes).

    Returns:
        The same tree with a bool at each leaf.

    Raises:
        UserError: an expression that matches no parameter, or expressions that leave nothing to train.
    """
    cfg = OptimiserConfig.of(cfg)
    names = _names(params)
    hits = {pattern: _hits("frozen", pattern, names) for pattern in cfg.frozen}
    moving = [name.rpartition("/")[2] in STATISTICS for name in names]
    mask = [any(hit) for hit in zip(moving, *hits.values(), strict=True)]
    if all(mask):
        raise UserError(f"optimiser.frozen is {cfg.frozen!r}, which leaves nothing to train; {_some(names)}")
    return jax.tree.unflatten(jax.tree.structure(params), mask)


def scales(cfg: Any, params: Any) -> Any:
    """What the learning rate of every parameter is multiplied by.

    Args:
        cfg: an OptimiserConfig, or a ConfigDict with its fields.
        params: a tree of arrays (or of their shapes).

    Returns:
        The same tree with a float at each leaf.

    Raises:
        UserError: an expression that matches no parameter.
    """
    cfg, names = OptimiserConfig.of(cfg), _names(params)
    factors = [1.0] * len(names)
    for pattern, factor in reversed(cfg.scales):
        hit = _hits("scales", pattern, names)
        factors = [factor if h else before for h, before in zip(hit, factors, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), factors)


def _names(params: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _hits(field: str, pattern: str, names: list[str]) -> list[bool]:
    hit = [bool(re.fullmatch(f"(?:.*/)?(?:{pattern})", name)) for name in names]
    if not any(hit):
        raise UserError(f"optimiser.{field} has {pattern!r}, which is the path of no parameter; {_some(names)}")
    return hit


def _some(names: list[str]) -> str:
    shown = names if len(names) <= 8 else [*names[:4], "...", *names[-4:]]
    return f"the {len(names)} paths are {', '.join(shown)}"


def make_optimiser(cfg: Any, total_steps: int, params: Any) -> optax.GradientTransformation:
    """The optimiser of a config: clip by global norm, AdamW, frozen parameters left alone and without moments.

    `cfg.accumulate` is not here: `state.make_step` splits the batch, so that one step stays one update.

    Args:
        cfg: an OptimiserConfig, or a ConfigDict with its fields.
        total_steps: updates of the whole run.
        params: the parameters (or their shapes), read for their paths only.

    Returns:
        An optax transformation whose updates are added to the parameters.

    Raises:
        UserError: a field is out of range, or `frozen` or `scales` do not fit the parameters.
    """
    cfg = OptimiserConfig.of(cfg)
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    adamw = optax.adamw(
        schedule(cfg, total_steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed
    )
    fixed = frozen(cfg, params)
    update = optax.chain(clip, adamw)
    if any(jax.tree.leaves(fixed)):
        labels = jax.tree.map(lambda one: "frozen" if one else "trained", fixed)
        update = optax.partition({"trained": update, "frozen": optax.set_to_zero()}, labels)
    if not cfg.scales:
        return update
    factors = scales(cfg, params)  # an update of AdamW, decay included, is proportional to the learning rate
    scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, factors))
    return optax.chain(update, scale)
