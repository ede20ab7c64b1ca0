"""Writes the vectors of `golden/checkpoints` that no other source has, with the libraries that publish the encoders.

Run by hand, with torch, transformers, timm and open_clip, which the package itself never needs:

    python tests/oracles/encoders.py tests/golden/checkpoints

Every case is a random model of a few kilobytes: `param.<name in the file>`, inputs, outputs, and its configuration
beside it in JSON. Upstream DINO names are read by timm's converters.
"""

from collections.abc import Callable, Iterator
import json
from pathlib import Path
import sys
import tempfile
from typing import Any

import numpy as np
import open_clip
from safetensors.numpy import load_file
import timm
from timm.models import eva, vision_transformer
import torch
import transformers

Arrays = dict[str, np.ndarray]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def coarse(values: torch.Tensor) -> torch.Tensor:
    """Numbers of few digits, so that files stay small."""
    return torch.round(values * 64) / 64


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that make every part of a model count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.1 * noise if gain else noise * (0.3 if parameter.ndim > 1 else 0.1))
            if "gamma" in name or "lambda1" in name:
                parameter.copy_(0.5 + 0.1 * noise)
            parameter.copy_(coarse(parameter))
    return model.eval()


def images(seed: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return coarse(torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed)))


def params(model: torch.nn.Module) -> Arrays:
    return {f"param.{name}": value.numpy() for name, value in model.state_dict().items() if value.is_floating_point()}


def states_of(blocks: Any, run: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    """What `run` gives, and the tokens after every block meanwhile."""
    states: list[np.ndarray] = []

    def keep(module, inputs, output):
        states.append((output[0] if isinstance(output, tuple) else output).numpy())

    handles = [block.register_forward_hook(keep) for block in blocks]
    result = run()
    for handle in handles:
        handle.remove()
    return result, np.stack(states)


# ---------------------------------------------------------------------------------------------------------------- timm


def timm_case(architecture: str, seed: int, *, other: bool = False, pool: str = "token", classes: int = 0, **changes):
    """A model of timm; `other`: also with its table resampled for images of 48 x 40."""
    args = {**SMALL, **changes}
    build = {"num_classes": classes, "global_pool": pool}
    model = randomise(timm.create_model(architecture, **args, **build), seed)
    x = images(seed + 1)
    features, states = states_of(model.blocks, lambda: model.forward_features(x))
    arrays = {
        **params(model),
        "images": x.numpy(),
        "features_after_final_norm": features.numpy(),
        "states": states,
        "output": model(x).numpy(),
    }
    if other:
        y = images(seed + 2, 48, 40)
        larger = timm.create_model(architecture, **{**args, "img_size": (48, 40)}, **build).eval()
        module = eva if isinstance(larger, eva.Eva) else vision_transformer
        larger.load_state_dict(module.checkpoint_filter_fn(dict(model.state_dict()), larger))
        arrays |= {"images_other_size": y.numpy(), "output_other_size": larger(y).numpy()}
    return arrays, {
        "architecture": architecture,
        "num_classes": classes,
        "global_pool": pool,
        "model_args": {key: value for key, value in args.items() if isinstance(value, int | float | bool | str)},
    }


def upstream_case(architecture: str, seed: int, rename: Callable[[Arrays], Arrays], module: Any, **changes):
    """A state under its authors' names, read by timm's converter."""
    model = timm.create_model(architecture, **{**SMALL, **changes}, num_classes=0)
    state = rename(dict(randomise(model, seed).state_dict()))
    model.load_state_dict(module.checkpoint_filter_fn(dict(state), model))
    x = images(seed + 1)
    return {
        **{f"param.{name}": value.numpy() for name, value in state.items()},
        "images": x.numpy(),
        "features_after_final_norm": model.forward_features(x).numpy(),
    }, {"num_heads": SMALL["num_heads"]}


def dinov2_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> DINOv2's, with registers, in two chunks of blocks."""
    table, tokens = state.pop("pos_embed"), state.pop("cls_token")
    first = torch.full_like(tokens, 0.1)  # the row that timm has added to CLS
    state |= {"cls_token": tokens - first, "pos_embed": torch.cat([first, table], 1)}
    state |= {"register_tokens": state.pop("reg_token"), "mask_token": torch.zeros(1, tokens.shape[-1])}
    return {name.replace("fc1", "w12").replace("fc2", "w3"): value for name, value in state.items()}


def dinov3_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names -> DINOv3's, whose bias of keys is masked."""
    out = {}
    for name, value in state.items():
        if name.endswith("v_bias") or "rope" in name:
            continue
        if name.endswith("q_bias"):
            key = torch.full_like(value, 7.0)  # must not count
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat([value, key, state[name.replace("q_", "v_")]])
            mask = torch.ones_like(value)
            mask[len(key) : 2 * len(key)] = 0
            out[name + "_mask"] = mask
        for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w2"), ("fc2", "w3"), ("reg_token", "storage_tokens")):
            name = name.replace(ours, theirs)
        out[name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
    return out | {"rope_embed.periods": torch.tensor([1.0]), "mask_token": torch.zeros(1, 8)}


def augreg(seed: int, classes: int = 5):
    """JAX's arrays, read by timm's loader of `.npz` files."""
    rng, width, heads, hidden, patch, side = np.random.default_rng(seed), 8, 2, 16, 8, 4

    def array(*shape):
        return np.round(rng.standard_normal(shape) * 19).astype(np.float32) / 64

    def linear(name, *shape, bias):
        return {f"{name}/kernel": array(*shape), f"{name}/bias": array(*bias)}

    def norm(name):
        return {f"{name}/scale": 1 + array(width), f"{name}/bias": array(width)}

    state = linear("embedding", patch, patch, 3, width, bias=(width,)) | norm("Transformer/encoder_norm")
    state |= linear("head", width, classes, bias=(classes,)) | {"cls": array(1, 1, width)}
    state["Transformer/posembed_input/pos_embedding"] = array(1, 1 + side * side, width)
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
        state |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for part in ("query", "key", "value"):
            state |= linear(f"{attention}/{part}", width, heads, width // heads, bias=(heads, width // heads))
        state |= linear(f"{attention}/out", heads, width // heads, width, bias=(width,))
        state |= linear(f"{mlp}/Dense_0", width, hidden, bias=(hidden,))
        state |= linear(f"{mlp}/Dense_1", hidden, width, bias=(width,))
    path = Path("augreg_state.npz")
    np.savez(path, **state)
    arrays = {f"param.{name}": value for name, value in state.items()}
    for suffix, size in (("", (32, 32)), ("_other_size", (48, 40))):
        model = timm.create_model("vit_base_patch16_224", **{**SMALL, "img_size": size}, num_classes=classes).eval()
        model.load_pretrained(str(path))
        x = images(seed + 1, *size)
        arrays |= {f"images{suffix}": x.numpy(), f"output{suffix}": model(x).numpy()}
    path.unlink()
    return arrays, None


# -------------------------------------------------------------------------------------------------------- Hugging Face


def settings(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def clip_case(seed: int, eos: int, act: str):
    common = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    config = transformers.CLIPConfig(
        text_config={**common, "vocab_size": 50, "intermediate_size": 32, "max_position_embeddings": 8}
        | {"eos_token_id": eos, "bos_token_id": 48, "projection_dim": 12},
        vision_config={**common, "intermediate_size": 16, "image_size": 32, "patch_size": 8, "projection_dim": 12},
        projection_dim=12,
    )
    model = randomise(transformers.CLIPModel(config), seed)
    # The end's id is not the largest one, and it comes twice.
    ids = torch.tensor([[48, 3, 9, 45, 5, 45, 1, 1], [48, 47, 45, 1, 1, 1, 1, 1]])
    return two_towers(model, config, seed, ids)


def siglip_case(seed: int):
    common = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**common, "vocab_size": 60, "intermediate_size": 20, "max_position_embeddings": 6},
        vision_config={**common, "intermediate_size": 18, "image_size": 24, "patch_size": 8},
    )
    model = randomise(transformers.SiglipModel(config), seed)
    return two_towers(model, config, seed, torch.tensor([[7, 8, 1, 0, 0, 0], [59, 2, 3, 4, 5, 1]]))


def two_towers(model: Any, config: Any, seed: int, ids: torch.Tensor):
    arrays = {**file_names(model), "input_ids": ids.numpy()}
    side = config.vision_config.image_size
    for suffix, size in (("", (side, side)), ("_other_size", (side + 16, side + 8))):
        x = images(seed + 1, *size)
        out = model(input_ids=ids, pixel_values=x, interpolate_pos_encoding=bool(suffix))
        arrays |= {
            f"pixel_values{suffix}": x.numpy(),
            f"image_embeds_normalized{suffix}": out.image_embeds.numpy(),
            f"text_embeds_normalized{suffix}": out.text_embeds.numpy(),
            f"logits_per_image{suffix}": out.logits_per_image.numpy(),
        }
    return arrays, settings(config) | {"architectures": [type(model).__name__]}


def file_names(model: Any) -> Arrays:
    """The tensors as `save_pretrained` names them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {f"param.{name}": value for name, value in load_file(f"{folder}/model.safetensors").items()}


def dinov3_gated(seed: int):
    config = transformers.DINOv3ViTConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=3,
        use_gated_mlp=True,
        hidden_act="silu",
    )
    model = randomise(transformers.DINOv3ViTModel(config), seed)
    arrays = file_names(model)
    for suffix, size in (("", (32, 32)), ("_other_size", (24, 40))):
        x = images(seed + 1, *size)
        out = model(x)
        arrays |= {f"pixel_values{suffix}": x.numpy(), f"last_hidden_state{suffix}": out.last_hidden_state.numpy()}
    return arrays, settings(config) | {"architectures": ["DINOv3ViTModel"]}


def dinov2_classifier(seed: int, registers: int):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=8,
        mlp_ratio=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
        **({"num_register_tokens": registers} if registers else {}),
    )
    model = randomise(getattr(transformers, f"{kind}ForImageClassification")(config), seed)
    arrays = file_names(model)
    for suffix, size in (("", (32, 32)), ("_other_size", (48, 40))):
        x = images(seed + 1, *size)
        arrays |= {f"pixel_values{suffix}": x.numpy(), f"logits{suffix}": model(x).logits.numpy()}
    return arrays, settings(config) | {"architectures": [type(model).__name__]}


def mae(seed: int):
    config = transformers.ViTMAEConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        mask_ratio=0.0,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    model = transformers.ViTMAEForPreTraining(config)
    tables = {n: p.clone() for n, p in model.named_parameters() if "position" in n}
    randomise(model, seed)
    for name, parameter in model.named_parameters():
        if name in tables:
            parameter.data.copy_(tables[name])
    x = images(seed + 1)
    order = torch.arange(16.0)[None]  # of the patches: none is moved
    out = model.vit(x, noise=order)
    arrays = {**file_names(model), "pixel_values": x.numpy(), "last_hidden_state": out.last_hidden_state.numpy()}
    return arrays, settings(config) | {"architectures": ["ViTMAEForPreTraining"]}


# ------------------------------------------------------------------------------------------------------------ OpenCLIP


def open_clip_exact(seed: int):
    cfg = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 8, "head_width": 4, "patch_size": 8, "mlp_ratio": 3.0},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 4, "layers": 1},
    }
    model = randomise(open_clip.model.CLIP(**cfg), seed)
    x, text = images(seed + 1), torch.tensor([[48, 3, 9, 49, 0, 0, 0, 0], [48, 47, 49, 0, 0, 0, 0, 0]])
    image, words = model.encode_image(x), model.encode_text(text)
    scale = model.logit_scale.exp()
    logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(words).T
    arrays = {**params(model), "images": x.numpy(), "text": text.numpy()}
    outputs = {"image_features": image, "text_features": words, "logits_per_image": logits}
    return arrays | {name: value.numpy() for name, value in outputs.items()}, {"model_cfg": cfg}


def cases() -> Iterator[tuple[str, tuple[Arrays, dict[str, Any] | None]]]:
    clip, siglip = "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"
    dinov2, dinov3 = "vit_giant_patch14_reg4_dinov2", "vit_small_plus_patch16_dinov3_qkvb"
    tanh = {"class_token": False, "act_layer": "gelu_tanh"}
    swiglu = {"reg_tokens": 2, "no_embed_class": True, "mlp_ratio": 3}
    gated = {"init_values": 0.5, "num_reg_tokens": 2, "mlp_ratio": 1.5, "swiglu_align_to": 8}
    rows = {"reg_tokens": 3, "class_token": False, "fc_norm": False}
    yield "timm_clip_other_size", timm_case(clip, 1, other=True, classes=6)
    yield "timm_siglip_other_size", timm_case(siglip, 2, other=True, pool="map", **tanh)
    yield "timm_dinov2_swiglu", timm_case(dinov2, 3, other=True, **swiglu)
    yield "timm_dinov3_gated_biased", timm_case(dinov3, 4, other=True, pool="avg", **gated)
    yield (
        "timm_registers_with_positions",
        timm_case("vit_so150m_patch16_reg4_gap_256", 5, pool="avg", classes=5, **rows),
    )
    yield "dinov2_upstream", upstream_case(dinov2, 6, dinov2_names, vision_transformer, reg_tokens=2, mlp_ratio=3)
    yield "dinov3_upstream", upstream_case(dinov3, 7, dinov3_names, eva, num_reg_tokens=2, mlp_ratio=1.5)
    yield "augreg_npz", augreg(8)
    yield "hf_clip_largest_id", clip_case(9, eos=2, act="gelu")
    yield "hf_clip_first_eos", clip_case(10, eos=45, act="quick_gelu")
    yield "hf_siglip2_fixed", siglip_case(11)
    yield "hf_dinov3_gated", dinov3_gated(12)
    yield "hf_vit_mae", mae(13)
    yield "open_clip_exact_gelu", open_clip_exact(14)
    yield "hf_dinov2_classifier", dinov2_classifier(15, 0)
    yield "hf_dinov2_registers_classifier", dinov2_classifier(16, 3)


@torch.no_grad()
def main(folder: Path) -> None:
    for name, (arrays, config) in cases():
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        if config is not None:
            (folder / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")
        size = (folder / f"{name}.npz").stat().st_size
        print(f"{name}: {len(arrays)} arrays, {size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
