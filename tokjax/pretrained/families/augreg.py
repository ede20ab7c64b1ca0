"""The `.npz` files of google-research/vision_transformer (ViT, AugReg) and of big_vision's plain ViTs.

A view presents JAX's arrays under timm's names and in torch's layouts, each when it is asked for; from there on they
are timm's models. The files hold no configuration: sizes come from the arrays, heads from the attention's shape.

ViT's first files for ImageNet-21k have a layer between the pooled feature and the classifier (`pre_logits`), which no
later model has. They are read as backbones, without either.

Positions at another size: bilinear without anti-aliasing. Images: short side / 0.9, crop, mean and std 0.5.

References: google-research/vision_transformer `vit_jax/checkpoint.py`; big_vision `models/vit.py`; timm 1.0
`models/vision_transformer.py`, `_load_weights`.
"""

import dataclasses
from functools import partial
import re

import numpy as np

from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.families.base import Json
from tokjax.pretrained.families.timm import TIMM
from tokjax.pretrained.names import Made, Readable, View
from tokjax.pretrained.preprocess import Preprocess, timm_eval

_ROOTS = ("", "opt/target/", "params/", "params/img/", "img/")
_BLOCK = r"Transformer/encoderblock_(?P<block>\d+)/"
_ATTENTION, _MLP = r"MultiHeadDotProductAttention_\d/", r"MlpBlock_\d/"

# Array -> tensor; both have kernels and biases, or scales and biases.
_MODULES = (
    (r"embedding", "patch_embed.proj"),
    (_BLOCK + r"LayerNorm_0", "blocks.{block}.norm1"),
    (_BLOCK + _ATTENTION + "out", "blocks.{block}.attn.proj"),
    (_BLOCK + r"LayerNorm_[12]", "blocks.{block}.norm2"),
    (_BLOCK + _MLP + "Dense_0", "blocks.{block}.mlp.fc1"),
    (_BLOCK + _MLP + "Dense_1", "blocks.{block}.mlp.fc2"),
    (r"Transformer/encoder_norm", "norm"),
    (r"head", "head"),
    (r"MAPHead_0/" + _ATTENTION + "query", "attn_pool.q"),
    (r"MAPHead_0/" + _ATTENTION + "out", "attn_pool.proj"),
    (r"MAPHead_0/LayerNorm_0", "attn_pool.norm"),
    (r"MAPHead_0/" + _MLP + "Dense_0", "attn_pool.mlp.fc1"),
    (r"MAPHead_0/" + _MLP + "Dense_1", "attn_pool.mlp.fc2"),
)
_JOINED = (
    (_BLOCK + _ATTENTION, ("query", "key", "value"), "blocks.{block}.attn.qkv"),
    (r"MAPHead_0/" + _ATTENTION, ("key", "value"), "attn_pool.kv"),
)
_ARRAYS = {
    "cls": "cls_token",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "pos_embedding": "pos_embed",
    "MAPHead_0/probe": "attn_pool.latent",
}
# Left visible, as its shape [H, d] tells the heads.
_HEADS = r"(.*/)?Transformer/encoderblock_0/" + _ATTENTION + "query/bias"
_LAST = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _root(tensors: Readable) -> str:
    return next((root for root in _ROOTS if f"{root}embedding/kernel" in tensors), "")


def _torch_shape(shape: tuple[int, ...], module: str, part: str) -> tuple[int, ...]:
    if part != "kernel":
        return (int(np.prod(shape)),)
    if len(shape) == 4:  # a convolution [p, p, channels, C]
        return shape[3], shape[2], shape[0], shape[1]
    if len(shape) == 3:  # [C, H, d] of queries, keys, values; [H, d, C] of the output
        return (shape[2], shape[0] * shape[1]) if module.endswith("out") else (shape[1] * shape[2], shape[0])
    return shape[::-1]


def _torch(array: np.ndarray, module: str, part: str) -> np.ndarray:
    if part != "kernel":
        return array.reshape(-1)
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 3:
        array = array.reshape(-1, array.shape[2]) if module.endswith("out") else array.reshape(len(array), -1)
    return array.T


def _view(config: Json, tensors: Readable) -> Readable:
    root = _root(tensors)
    if any(name.startswith(f"{root}Transformer/encoderblock/") for name in tensors):
        raise UserError("The blocks are stored stacked (`encoderblock`), which is not known here; unstack them first.")
    backbone = f"{root}pre_logits/kernel" in tensors
    made: dict[str, Made] = {}
    used: set[str] = set()

    def add(to: str, part: str, *sources: str) -> None:
        shapes = [_torch_shape(tensors.shape(f"{source}/{part}"), source, part) for source in sources]
        names = [f"{source}/{part}" for source in sources]

        def make() -> np.ndarray:
            return np.concatenate([_torch(tensors[name], name.rpartition("/")[0], part) for name in names])

        made[f"{to}.{_LAST[part]}"] = Made((sum(shape[0] for shape in shapes), *shapes[0][1:]), make)
        used.update(names)

    for name in tensors:
        module, _, part = name.rpartition("/")
        module = module.removeprefix(root) if root else module
        for pattern, to in _MODULES:
            if part in _LAST and (found := re.fullmatch(pattern, module)) and not (backbone and to == "head"):
                add(to.format(**found.groupdict()), part, root + module)
        for pattern, parts, to in _JOINED:
            if part in _LAST and (found := re.fullmatch(pattern + parts[0], module)):
                stem = root + module.removesuffix(parts[0])
                add(to.format(**found.groupdict()), part, *(stem + other for other in parts))
        if name.removeprefix(root) in _ARRAYS:
            made[_ARRAYS[name.removeprefix(root)]] = Made(tensors.shape(name), partial(tensors.__getitem__, name))
            used.add(name)
    return View(tensors, made=made, without=frozenset(name for name in used if not re.fullmatch(_HEADS, name)))


def _configure(config: Json, tensors: Readable) -> ViTConfig:
    heads = next((tensors.shape(name)[0] for name in tensors if re.fullmatch(_HEADS, name)), None)
    return TIMM.configure({"num_heads": heads}, tensors)  # type: ignore[return-value]


def _images(config: Json, processor: Json | None, model: ViTConfig) -> Preprocess:
    return timm_eval(model.image_size, crop_pct=0.9 if max(model.image_size) < 384 else 1.0)


AUGREG = dataclasses.replace(
    TIMM,
    name="augreg",
    configure=_configure,
    preprocess=_images,
    expresses=lambda model: False,
    view=_view,
    ignored=rf"{_HEADS}|(.*/)?(pre_logits|head)/.*",
    interpolation=("bilinear", False),
)
