"""A-CLIP: relevance maps moved to the views, which patches stay, the masked encoder, and the losses."""

import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch_params

from tokjax.models.dual import unit
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit import aclip
from tokjax.signals import Context, Signals
from tokjax.tokens import Tokens
from tokjax.train.losses import byol_loss, clip_loss, simclr_loss

INPUTS = (
    *("ema_attention", "positions_tlhw", "attention", "images", "removed", "num_heads", "patch_size", "param.*"),
    *("image_embed", "text_embed", "image_ssl_embed", "byol_feats", "byol_feats_e", "logit_scale"),
    "simclr_temperature",
)
TOLERANCE = {"*": (0.0, 1e-5)}
KEEP_RATE, BYOL_WEIGHT = 0.5, 2.0


def run(case, arrays):
    kinds = {"positions_tlhw": views, "attention": ratios, "images": encoder, "image_embed": losses}
    return next(kind for name, kind in kinds.items() if name in arrays)(arrays)


def square(attention):
    side = math.isqrt(attention.shape[1])
    return attention.reshape(-1, side, side)


@jax.jit(static_argnames="reducer")
def removed(reducer, relevance, boxes=None):
    """True where a patch goes."""
    batch, *grid = relevance.shape
    context = Context(grid=tuple(grid), relevance=relevance, boxes=boxes)
    keep = reducer.plan(Tokens(jnp.zeros((batch, math.prod(grid), 1))), Signals(context=context)).map.keep
    return jnp.ones((batch, math.prod(grid)), bool).at[jnp.arange(batch)[:, None], keep].set(False)


def views(arrays):
    relevance, ours = jnp.asarray(square(arrays["ema_attention"])), {}
    grid = relevance.shape[1:]
    for view in (1, 2):
        boxes = jnp.asarray(arrays["positions_tlhw"][:, [view - 1, 2]], jnp.int32)
        map = jax.jit(aclip.moved, static_argnames="grid")(relevance, boxes, grid)
        ours[f"view{view}_attention"] = map.reshape(len(map), -1)
        ours[f"view{view}_removed"] = removed(aclip.AClip(KEEP_RATE), relevance, boxes)
        name = f"view{view}_pooled{grid[0] // 2}x{grid[1] // 2}"
        if name in arrays:
            ours[name] = aclip.pooled(map, aclip.super_patch(grid, 2))
    return ours


def ratios(arrays):
    rates = {name: re.fullmatch(r"removed_r(\d)(\d+)", name) for name in arrays}
    relevance = jnp.asarray(square(arrays["attention"]))
    return {
        name: removed(aclip.AClip(float(f"{found[1]}.{found[2]}")), relevance) for name, found in rates.items() if found
    }


def encoder(arrays):
    images, params = jnp.asarray(arrays["images"].transpose(0, 2, 3, 1)), torch_params.tree(arrays)
    params["patch_embed"] = params["patch_embed"]["proj"]
    width, hidden = params["pos_embed"].shape[-1], len(params["blocks"][0]["mlp"]["fc1"]["bias"])
    cfg = ViTConfig(
        image_size=images.shape[1:3],
        patch_size=int(arrays["patch_size"]),
        width=width,
        depth=len(params["blocks"]),
        heads=int(arrays["num_heads"]),
        mlp_ratio=(hidden + 0.5) / width,  # the config truncates the product
        num_classes=0,
    )
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))

    def forward(reducer, relevance=None):
        context = Context(relevance=relevance)
        hooks = reducer.hooks(cfg.info)
        return jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, hooks, context=context, trace=True))(params, images)

    # 1. The teacher: all tokens, and how CLS attends. These are inputs in other files, hence compared here.
    full = forward(aclip.Watch())
    attention = aclip.relevance(full.tokens.aux, cfg.grid).reshape(len(images), -1)
    np.testing.assert_allclose(attention, arrays["ema_attention"], rtol=0, atol=1e-5)

    # 2. The masked encoder, told which patches stay.
    stays, patches = ~arrays["removed"], cfg.num_patches
    reducer = aclip.AClip((int(stays[0].sum()) - 1) / patches, pool=1)
    masked = forward(reducer, jnp.asarray(square(stays.astype(np.float32))))
    origin = np.asarray(masked.trace[-1].origin)
    return {
        "full_tokens": full.features,
        "masked_cls": masked.pooled,
        "masked_tokens_sorted_note": masked.tokens.length,
        "kept_index_ascending": np.stack([np.flatnonzero(row < masked.tokens.length) for row in origin[:, 1:]]),
    }


@jax.jit(static_argnames="temperature")
def parts(image, text, views, predicted, target, scale, temperature):
    """The terms of the loss; `simclr`: of the second view, and of the first one twice, as the released code has it."""
    (first, second), goal = jnp.split(unit(image), 2), jnp.concatenate([target, target])
    one, two = jnp.split(views, 2)
    return {
        "contrastive_loss_view1": clip_loss(first, unit(text), scale),
        "contrastive_loss_view2": clip_loss(second, unit(text), scale),
        "simclr_loss_as_released": simclr_loss(one, one, temperature),
        "simclr_loss_two_views": simclr_loss(one, two, temperature),
        "byol_loss": byol_loss(predicted, goal),
    }


def losses(arrays):
    names = ("image_embed", "text_embed", "image_ssl_embed", "byol_feats", "byol_feats_e", "logit_scale")
    given, temperature = [jnp.asarray(arrays[name]) for name in names], float(arrays["simclr_temperature"])

    def released(*given):
        terms = parts(*given, temperature)
        contrast = (terms["contrastive_loss_view1"] + terms["contrastive_loss_view2"]) / 2
        return contrast + terms["simclr_loss_as_released"] + BYOL_WEIGHT * terms["byol_loss"], terms

    (loss, terms), grads = jax.value_and_grad(released, (0, 1, 3), has_aux=True)(*given)
    return {"loss": loss, **terms, **{f"grad_{names[i]}": g for i, g in zip((0, 1, 3), grads, strict=True)}}
