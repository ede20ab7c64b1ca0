"""Reference counts of multiply-accumulates: our walk over the jaxpr of a model with these token counts."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from tokjax.bench.flops import count, vit_macs
from tokjax.hooks import Hook
from tokjax.models.vit import ViT, ViTConfig
from tokjax.token_map import HardMap, Plan

INPUTS = ("*.tokens_attention", "*.tokens_mlp", "*.width", "*.patch", "*.num_patches")
TOLERANCE = {"*": (1e-9, 0.0)}


def run(case, arrays):
    ours = {}
    for name in arrays:
        model, _, quantity = name.rpartition(".")
        if quantity not in QUANTITIES:
            continue
        attention, mlp = (arrays[f"{model}.tokens_{where}"].tolist() for where in ("attention", "mlp"))
        sizes = {key: int(arrays[f"{model}.{key}"]) for key in ("width", "patch", "num_patches")}
        ours[name] = QUANTITIES[quantity](attention, mlp, **sizes)
    return ours


@dataclasses.dataclass(frozen=True)
class Resize:
    """Goes on with this many tokens."""

    length: int

    def plan(self, tokens, signals):
        if self.length == tokens.length:
            return None
        place = jnp.arange(self.length)
        keep = jnp.broadcast_to(jnp.minimum(place, tokens.length), (tokens.batch, self.length))
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(HardMap(keep, nobody, nobody, tokens.length), how="keep")


def counted(attention, mlp, *, width, patch, num_patches):
    cfg = ViTConfig(image_size=(patch, patch * num_patches), patch_size=patch, width=width, depth=len(mlp), heads=1)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))
    hooks = [
        hook
        for layer, (before, after) in enumerate(zip(attention, mlp, strict=True))
        for hook in (
            Hook("before_block", layer, Resize(before)),
            Hook("after_attention", layer, Resize(after)),
        )
    ]
    images = jax.ShapeDtypeStruct((1, *cfg.image_size, cfg.channels), jnp.float32)
    cost = count(lambda params, images: nnx.merge(graphdef, params)(images, hooks).logits, params, images)
    assert not cost.notes, cost.notes
    return cost.model


def by_formula(attention, mlp, **sizes):
    return vit_macs(attention, mlp, convention="diffrate", **sizes)


QUANTITIES = {"macs_f64": counted, "macs_diffrate_convention_f64": by_formula}
