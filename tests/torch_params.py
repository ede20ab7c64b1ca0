"""Parameters and sizes of small vision transformers as golden vectors have them: timm's names, torch's layouts.

Adapters import this module by name: it lies beside `golden_harness`, on the same path.
"""

import jax.numpy as jnp

from tokjax.models.vit import ViTConfig


def tree(arrays, prefix="param."):
    """What lies below a prefix as a tree: kernels transposed, those of patches flat, `weight` of a norm as `scale`."""
    out = {}
    for name, value in arrays.items():
        if not name.startswith(prefix):
            continue
        *parents, leaf = (int(part) if part.isdigit() else part for part in name.removeprefix(prefix).split("."))
        here = out
        for parent in parents:
            here = here.setdefault(parent, {})
        if leaf == "weight":
            leaf = "kernel" if value.ndim > 1 else "scale"
            value = value.transpose(2, 3, 1, 0).reshape(-1, len(value)) if value.ndim == 4 else value.T
        here[leaf] = jnp.asarray(value)
    return out


MODEL = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm", "fc_norm", "head")


def vit(arrays, **fields):
    """Config, parameters and images of a model without its reducer; `fields` of the config: what no array tells."""
    images, whole = arrays["images"].transpose(0, 2, 3, 1), tree(arrays)
    params = {name: whole[name] for name in MODEL if name in whole}
    params["patch_embed"] = params["patch_embed"]["proj"]
    width = params["pos_embed"].shape[-1]
    hidden = len(params["blocks"][0]["mlp"]["fc1"]["bias"])
    cfg = ViTConfig(
        image_size=images.shape[1:3],
        patch_size=int(arrays["patch_size"]),
        channels=images.shape[3],
        width=width,
        depth=len(params["blocks"]),
        heads=int(arrays["num_heads"]),
        mlp_ratio=(hidden + 0.5) / width,  # the config truncates the product
        num_classes=len(params["head"]["bias"]),
        **fields,
    )
    return cfg, params, jnp.asarray(images)
