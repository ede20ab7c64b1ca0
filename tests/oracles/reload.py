"""Checks that transformers and timm read what is saved here, with the same numbers.

By hand, in two steps, as neither environment needs the packages of the other:

    python tests/oracles/reload.py write FOLDER        # with tokjax: saves random models, inputs and outputs
    python tests/oracles/reload.py check FOLDER        # with torch, transformers and timm: loads and compares
"""

import json
from pathlib import Path
import sys

import numpy as np

SIZE = 32


def write(root: Path) -> None:
    import dataclasses

    import jax

    from tokjax import api
    from tokjax.models.dual import DualConfig
    from tokjax.models.text import TextConfig
    from tokjax.models.vit import Patches, ViTConfig
    from tokjax.pretrained import save_checkpoint
    from tokjax.pretrained.checkpoint import shapes

    vit = ViTConfig((SIZE, SIZE), 8, width=16, depth=2, heads=2, mlp_ratio=2.0, num_classes=5)

    def but(config, **changes):
        return dataclasses.replace(config, **changes)

    clip = but(vit, pre_norm=True, patch_bias=False, head_bias=False, norm_eps=1e-5, gelu="quick", num_classes=12)
    words = TextConfig(vocab_size=50, length=8, width=16, depth=2, heads=4, mlp_ratio=2.0, embed_dim=12)
    siglip = but(vit, class_token=False, pooling="map", gelu="tanh", num_classes=0)
    texts = but(words, causal=False, pooling="last", head_bias=True, embed_dim=16, gelu="tanh", norm_eps=1e-6)
    dino = but(vit, layer_scale=1.0, num_classes=0)
    dino3 = but(dino, position="rope", registers=4, key_bias=False, norm_eps=1e-5)
    models = {
        "hf_vit": vit,
        "hf_vit_backbone": but(vit, num_classes=0, norm_eps=1e-12),
        "hf_deit": but(vit, distilled=True),
        "hf_clip": DualConfig(clip, words),
        "hf_clip_eos": DualConfig(but(clip, gelu="exact"), but(words, eos_id=45, gelu="exact")),
        "hf_clip_vision": clip,
        "hf_clip_vision_backbone": but(clip, num_classes=0),
        "hf_siglip": DualConfig(siglip, texts, np.log(10).item(), -10.0),
        "hf_siglip_vision": siglip,
        "hf_siglip2": DualConfig(but(siglip, position="naflex"), texts, np.log(10).item(), -10.0),
        "hf_siglip2_vision": but(siglip, position="naflex"),
        "hf_dinov2": dino,
        "hf_dinov2_swiglu": but(dino, mlp="swiglu", mlp_ratio=3.0),
        "hf_dinov2_registers": but(dino, registers=4),
        "hf_dinov2_classifier": but(dino, num_classes=5, pooling="cls_mean"),
        "hf_dinov2_registers_classifier": but(dino, num_classes=5, pooling="cls_mean", registers=4),
        "hf_dinov3": dino3,
        "hf_dinov3_gated": but(dino3, mlp="swiglu"),
        "hf_dinov3_key_bias": but(dino3, key_bias=True),
        "timm_vit": vit,
        "timm_deit": but(vit, distilled=True),
        "timm_deit3": but(vit, layer_scale=1e-6, position_prefix=False),
        "timm_mae": but(vit, pooling="size_mean", fc_norm=True),
        "timm_mean": but(vit, pooling="size_mean"),
        "timm_clip": clip,
        "timm_siglip": siglip,
        "timm_siglip_head": but(siglip, num_classes=5),
        "timm_dinov2": but(dino, registers=4, position_prefix=False),
        "timm_dinov2_swiglu": but(dino, mlp="swiglu", mlp_ratio=1.5),
        "timm_dinov3": but(dino3, qkv_bias=False, key_bias=True),
        "timm_dinov3_biased": but(dino3, mlp="swiglu"),
    }
    for number, (name, config) in enumerate(models.items()):
        rng = np.random.default_rng(number)
        leaves, tree = jax.tree.flatten(shapes(config))
        params = tree.unflatten([0.2 * rng.standard_normal(leaf.shape, dtype=np.float32) for leaf in leaves])
        folder = root / name
        save_checkpoint(folder, config, params, family=name.partition("_")[0])
        vision = config.vision if isinstance(config, DualConfig) else config
        x = rng.standard_normal((2, SIZE, SIZE, 3), dtype=np.float32)
        arrays = {"images": x.transpose(0, 3, 1, 2)}
        if vision.position == "naflex":
            shape, n = np.array([[3, 5], [4, 4]]), 18
            valid = np.arange(n) < shape.prod(1, keepdims=True)
            x = Patches(rng.standard_normal((2, n, 192), dtype=np.float32) * valid[..., None], valid, shape)
            arrays = {"patches": x.patches, "valid": valid, "shape": shape}
        model = api.load(folder)
        if isinstance(config, DualConfig):
            arrays["ids"] = np.array([[48, 3, 9, 45, 49, 1, 1, 1], [48, 47, 45, 3, 49, 1, 1, 1]], np.int32)
            out = model.forward(model.params, x, arrays["ids"])
            arrays |= {"image": out.image, "text": out.text, "logits": out.logits}
        else:
            out = model.forward(model.params, x)
            arrays |= {"features": out.features, "tokens": out.tokens.x, "pooled": out.pooled, "logits": out.logits}
        np.savez(folder / "expected.npz", **arrays)


def check(root: Path) -> None:
    import torch

    torch.set_grad_enabled(False)
    worst = 0.0
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        arrays = dict(np.load(folder / "expected.npz"))
        got = (of_timm if folder.name.startswith("timm") else of_transformers)(folder, arrays)
        differences = {name: float(np.abs(value.numpy() - arrays[name]).max()) for name, value in got.items()}
        assert differences
        worst = max(worst, *differences.values())
        print(folder.name, {name: f"{difference:.1e}" for name, difference in differences.items()})
    print(f"largest difference: {worst:.2e}")
    assert worst < 2e-5


def of_timm(folder: Path, arrays: dict):
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.from_numpy(arrays["images"])
    logits = model(x)
    if folder.name == "timm_mae":  # its features are those before the norm behind the pooling
        return {"logits": logits}
    return {"features": model.forward_features(x), "logits": logits}


def of_transformers(folder: Path, arrays: dict):
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"], report
    assert all("pooler" in name for name in report["missing_keys"]), report
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if "patches" in tensors:
        given = {
            "pixel_values": tensors["patches"],
            "pixel_attention_mask": tensors["valid"].int(),
            "spatial_shapes": tensors["shape"],
        }
    else:
        given = {"pixel_values": tensors["images"]}
    if "ids" in tensors:
        out = model.eval()(**given, input_ids=tensors["ids"].long())
        return {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
    out = model.eval()(**given)
    if "logits" in out:
        return {"logits": out.logits}
    clip = folder.name.startswith("hf_clip")
    got = {"tokens" if clip else "features": out.last_hidden_state}
    if "image_embeds" in out:
        return got | {"logits": out.image_embeds}
    return got if "vit" in folder.name else got | {"pooled": out.pooler_output}


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
