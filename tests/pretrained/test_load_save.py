import collections
import dataclasses
import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tokjax.errors import UserError
from tokjax.models import layers
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViT, ViTConfig
from tokjax.pretrained import Preprocess, files, load_checkpoint, save_checkpoint
from tokjax.pretrained import preprocess as pp
from tokjax.pretrained.checkpoint import shapes, vision_of
from tokjax.pretrained.naflex import Naflex
from tokjax.pretrained.positions import resize_positions
from tokjax.writing import UNFINISHED

TINY = ViTConfig((16, 16), 8, width=8, depth=2, heads=2, mlp_ratio=2.0, num_classes=5)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, dtype=np.float32), shapes(config))


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


CLIP = tiny(pre_norm=True, patch_bias=False, norm_eps=1e-5, gelu="quick", head_bias=False)
CLIP_TEXT = TextConfig(20, 6, 8, 3, 4, 3.0, embed_dim=5)
SIGLIP = tiny(class_token=False, pooling="map", gelu="tanh", num_classes=0)
SIGLIP_TEXT = TextConfig(
    20, 6, 8, 2, 4, 2.0, causal=False, pooling="last", norm_eps=1e-6, gelu="tanh", embed_dim=8, head_bias=True
)
NAFLEX = dataclasses.replace(SIGLIP, position="naflex", image_size=(32, 32))
SIGLIP_LOGITS = {"logit_scale": math.log(10), "logit_bias": -10.0}
DINO = tiny(layer_scale=1.0, num_classes=0)
DINO_HEAD = dataclasses.replace(DINO, num_classes=5, pooling="cls_mean")
DINOV3 = dataclasses.replace(DINO, position="rope", registers=2, key_bias=False, norm_eps=1e-5)

# Name -> (config, the form that "hf" gives it, that of "timm", whether these libraries' keys alone tell it all).
TOWERS = {
    "CLIP": (DualConfig(CLIP, CLIP_TEXT, 2.5), "clip", "clip", True),
    "CLIP with a known end": (
        DualConfig(CLIP, dataclasses.replace(CLIP_TEXT, eos_id=19, gelu="exact")),
        "clip",
        "clip",
        True,
    ),
    "CLIP's image tower": (CLIP, "clip_vision_model", "timm", False),
    "CLIP's image tower without its projection": (
        dataclasses.replace(CLIP, num_classes=0),
        "clip_vision_model",
        "timm",
        False,
    ),
    "SigLIP": (DualConfig(SIGLIP, SIGLIP_TEXT, **SIGLIP_LOGITS), "siglip", "siglip", True),
    "SigLIP's image tower": (SIGLIP, "siglip_vision_model", "timm", True),
    "SigLIP with a classifier": (dataclasses.replace(SIGLIP, num_classes=3), "timm", "timm", True),
    "NaFlex": (DualConfig(NAFLEX, SIGLIP_TEXT, **SIGLIP_LOGITS), "siglip2", "siglip2", True),
    "NaFlex's image tower": (NAFLEX, "siglip2_vision_model", "siglip2_vision_model", True),
    "DINOv2": (DINO, "dinov2", "timm", True),
    "DINOv2 gated": (
        dataclasses.replace(DINO, mlp="swiglu", width=16, mlp_ratio=1.5, qkv_bias=False),
        "dinov2",
        "timm",
        True,
    ),
    "DINOv2 with registers": (dataclasses.replace(DINO, registers=3), "dinov2_with_registers", "timm", True),
    "DINOv2's classifier": (DINO_HEAD, "dinov2", "dinov2", True),
    "DINOv2's classifier with registers": (
        dataclasses.replace(DINO_HEAD, registers=3),
        "dinov2_with_registers",
        "dinov2_with_registers",
        True,
    ),
    "CLS and mean, rotary": (dataclasses.replace(DINO_HEAD, position="rope"), "timm", "timm", False),
    "DINOv3": (DINOV3, "dinov3_vit", "timm_eva", True),
    "DINOv3 gated": (dataclasses.replace(DINOV3, mlp="swiglu", mlp_ratio=1.5), "dinov3_vit", "timm_eva", True),
    "DINOv3 without biases": (
        dataclasses.replace(DINOV3, qkv_bias=False, key_bias=True, rope_base=50.0),
        "dinov3_vit",
        "timm_eva",
        True,
    ),
    "DINOv3 as timm pools it": (dataclasses.replace(DINOV3, pooling="size_mean"), "timm_eva", "timm_eva", True),
    "two towers of no library": (
        DualConfig(dataclasses.replace(DINOV3, num_classes=8), SIGLIP_TEXT, logit_bias=1.0),
        "open_clip",
        "open_clip",
        False,
    ),
}

# Name -> (config, the form that "hf" gives it, whether timm's and Hugging Face's keys alone tell it all).
PLAIN = {
    "plain": (tiny(), "vit", True),
    "backbone": (tiny(num_classes=0, norm_eps=1e-12), "vit", True),
    "rectangle": (tiny(image_size=(32, 16), qkv_bias=False, gelu="tanh"), "vit", True),
    "odd hidden width": (tiny(width=12, mlp_ratio=17 / 12, gelu="quick"), "vit", True),
    "distilled": (tiny(distilled=True), "deit", True),
    "distilled backbone": (tiny(distilled=True, num_classes=0), "deit", True),
    "MAE fine-tuned": (tiny(pooling="size_mean", fc_norm=True), "timm", True),
    "mean of normed": (tiny(pooling="size_mean"), "timm", True),
    "DeiT-3": (tiny(layer_scale=1e-6, position_prefix=False), "timm", True),
    "q and k norms": (tiny(qk_norm=True, registers=3, position_prefix=False, channels=1), "timm", True),
    "registers behind a positioned CLS": (tiny(registers=3), "timm", True),
    "CLIP": (tiny(pre_norm=True, patch_bias=False, norm_eps=1e-5, gelu="quick", drop_path=0.1), "timm", True),
    "no CLS": (tiny(class_token=False, pooling="size_mean", position_prefix=False), "timm", True),
    "what no other library has": (
        tiny(distilled=True, registers=2, pooling="size_mean", position="sincos", pre_norm=True, dtype="bfloat16"),
        "timm",
        False,
    ),
}


CONFIGS = {name: (config, form, "timm", told) for name, (config, form, told) in PLAIN.items()} | TOWERS


@pytest.mark.parametrize("family", ["hf", "timm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_everything_comes_back_bit_for_bit(tmp_path, name, family):
    config, *forms, _ = CONFIGS[name]
    params = random_params(config)
    vision = vision_of(config)
    preprocess = None if vision.channels == 1 else pp.timm_eval(vision.image_size)
    if vision.position == "naflex":
        preprocess = Naflex(vision.patch_size, 5)
    save_checkpoint(tmp_path / "new" / "folder", config, params, preprocess, family)
    loaded = load_checkpoint(tmp_path / "new" / "folder")
    assert loaded.config == config
    assert loaded.preprocess == preprocess
    assert_same(loaded.params, params)
    assert loaded.source["format"] == forms[family == "timm"]

    written = (tmp_path / "new" / "folder" / "model.safetensors").read_bytes()
    save_checkpoint(tmp_path / "again", loaded.config, loaded.params, loaded.preprocess, loaded.family)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written


@pytest.mark.parametrize("family", ["hf", "timm"])
@pytest.mark.parametrize("name", [name for name, (*_, told) in CONFIGS.items() if told])
def test_the_keys_of_the_other_libraries_tell_the_model(tmp_path, name, family):
    config, params = CONFIGS[name][0], random_params(CONFIGS[name][0])
    save_checkpoint(tmp_path, config, params, family=family)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    del content["tokjax"]
    file.write_text(json.dumps(content))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == config
    assert_same(loaded.params, params)


def test_the_tree_is_the_models():
    for config, *_ in PLAIN.values():
        model = nnx.eval_shape(lambda config=config: ViT(config, rngs=nnx.Rngs(0)))
        want = jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        assert jax.tree.map(lambda leaf: leaf.shape, shapes(config)) == want


def test_stacked_blocks_of_any_float_type_are_written(tmp_path):
    config = tiny(scan=True)
    params = random_params(config)
    stacked = {**params, "blocks": layers.stack(params["blocks"])}
    save_checkpoint(tmp_path, config, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), stacked))
    rounded = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32), params)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == tiny(scan=False)
    assert_same(loaded.params, rounded)
    loaded = load_checkpoint(tmp_path, scan=True)
    assert loaded.config == config
    assert_same(loaded.params, {**rounded, "blocks": layers.stack(rounded["blocks"])})


def test_both_towers_can_be_stacked_and_every_array_is_placed(tmp_path):
    config = DualConfig(CLIP, CLIP_TEXT)
    params = random_params(config)
    both = {
        **params,
        **{t: {**params[t], "blocks": layers.stack(params[t]["blocks"])} for t in ("vision", "text")},
    }
    stacked = dataclasses.replace(
        config, **{t: dataclasses.replace(getattr(config, t), scan=True) for t in ("vision", "text")}
    )
    save_checkpoint(tmp_path, stacked, both)
    placed = {}

    def place(path, array):
        assert array.dtype == np.float32
        placed[path] = array.shape
        return jnp.asarray(array)

    loaded = load_checkpoint(tmp_path, scan=True, dtype="bfloat16", place=place)
    assert loaded.config.text.scan
    assert loaded.config.vision.dtype == loaded.config.text.dtype == "bfloat16"
    assert_same(loaded.params, both)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
    assert placed["text", "blocks", "attn", "qkv", "kernel"] == (3, 8, 24)
    assert len(placed) == len(jax.tree.leaves(loaded.params))


def test_another_image_size_is_for_the_image_tower(tmp_path):
    config = DualConfig(CLIP, CLIP_TEXT)
    params = random_params(config)
    save_checkpoint(tmp_path / "clip", config, params, pp.clip_eval((16, 16)))
    loaded = load_checkpoint(tmp_path / "clip", image_size=(32, 24))
    assert loaded.config.vision.image_size == loaded.preprocess.size == (32, 24)
    want = resize_positions(params["vision"]["pos_embed"], 1, (2, 2), (4, 3), "bicubic", antialias=False)
    np.testing.assert_array_equal(loaded.params["vision"]["pos_embed"], want)
    np.testing.assert_array_equal(loaded.params["text"]["pos_embed"], params["text"]["pos_embed"])

    save_checkpoint(tmp_path / "rope", DINOV3, random_params(DINOV3))
    assert load_checkpoint(tmp_path / "rope", image_size=24).config.grid == (3, 3)
    save_checkpoint(tmp_path / "naflex", NAFLEX, random_params(NAFLEX))
    assert load_checkpoint(tmp_path / "naflex", image_size=24).config == NAFLEX  # takes any size


def test_transformers_saves_a_tower_alone_without_its_prefix(tmp_path):
    for name, config in (("clip", CLIP), ("siglip", SIGLIP)):
        config = dataclasses.replace(config, num_classes=0)
        params = random_params(config)
        save_checkpoint(tmp_path / name, config, params)
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert all(tensor.startswith("vision_model.") for tensor in tensors)
        stripped = {tensor.removeprefix("vision_model."): value for tensor, value in tensors.items()}
        save_file(stripped, tmp_path / name / "model.safetensors")
        assert_same(load_checkpoint(tmp_path / name).params, params)


def test_tensors_that_other_libraries_expect_are_written_as_zeros(tmp_path):
    for name, config, tensor, shape in (
        ("hf", dataclasses.replace(DINO, registers=3), "embeddings.mask_token", (1, 8)),
        ("hf", DINOV3, "embeddings.mask_token", (1, 1, 8)),
        ("timm", CLIP, "head.bias", (5,)),
    ):
        save_checkpoint(tmp_path, config, random_params(config), family=name)
        np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")[tensor], np.zeros(shape))
        assert load_checkpoint(tmp_path).config == config


@pytest.mark.parametrize("dtype", [np.int8, np.int64, ml_dtypes.float8_e4m3fn])
def test_quantised_weights_are_refused(tmp_path, dtype):
    def edit(tensors):
        tensors["classifier.weight"] = tensors["classifier.weight"].astype(dtype)

    with pytest.raises(UserError, match=r"classifier\.weight has the wrong dtype: \w+; .* one of float16"):
        load_checkpoint(edited(tmp_path, edit))


def test_half_a_file_of_two_towers_lists_what_is_missing(tmp_path):
    config = DualConfig(CLIP, CLIP_TEXT)
    save_checkpoint(tmp_path, config, random_params(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"], tensors["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    tensors["text_model.encoder.layers.1.self_attn.qkv.weight"] = np.zeros((8, 8), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path)
    assert "issing: text_model.encoder.layers.1.self_attn.k_proj.weight, text_projection.weight" in str(error.value)
    assert "unexpected: text_model.encoder.layers.1.self_attn.qkv.weight" in str(error.value)


def test_names_that_transformers_and_timm_read(tmp_path):
    save_checkpoint(tmp_path / "hf", tiny(distilled=True), random_params(tiny(distilled=True)), family="hf")
    names = load_file(tmp_path / "hf" / "model.safetensors")
    assert names["deit.embeddings.distillation_token"].shape == (1, 1, 8)
    assert names["deit.encoder.layer.1.attention.attention.key.weight"].shape == (8, 8)
    assert names["cls_classifier.weight"].shape == (5, 8)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["DeiTForImageClassificationWithTeacher"]
    with files.safe_open(tmp_path / "hf" / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}

    registers = tiny(registers=3)
    params = random_params(registers)
    save_checkpoint(tmp_path / "timm", registers, params, family="timm")
    names = load_file(tmp_path / "timm" / "model.safetensors")
    assert names["blocks.0.attn.qkv.weight"].shape == (24, 8)
    assert names["patch_embed.proj.weight"].shape == (8, 3, 8, 8)
    # timm's table has a row for every prefix token.
    np.testing.assert_array_equal(names["pos_embed"][:, 1:4], np.zeros((1, 3, 8)))
    np.testing.assert_array_equal(np.delete(names["pos_embed"], [1, 2, 3], 1), params["pos_embed"])


def test_layouts_against_plain_arithmetic(tmp_path):
    config = tiny(depth=1)
    params = random_params(config)
    save_checkpoint(tmp_path, config, params, family="hf")
    torch = load_file(tmp_path / "model.safetensors")
    x = np.random.default_rng(1).standard_normal((3, 8), dtype=np.float32)
    block = params["blocks"][0]
    qkv = x @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
    prefix = "vit.encoder.layer.0.attention.attention"
    for i, part in enumerate(("query", "key", "value")):
        want = x @ torch[f"{prefix}.{part}.weight"].T + torch[f"{prefix}.{part}.bias"]
        np.testing.assert_allclose(qkv[:, 8 * i : 8 * i + 8], want, rtol=1e-5)
    patch = np.random.default_rng(2).standard_normal((8, 8, 3), dtype=np.float32)  # rows, columns, channels
    convolution = torch["vit.embeddings.patch_embeddings.projection.weight"]
    want = np.einsum("ochw,hwc->o", convolution, patch)
    np.testing.assert_allclose(patch.reshape(-1) @ params["patch_embed"]["kernel"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "antialias"), [("hf", False), ("timm", True)])
def test_another_image_size_interpolates_as_the_family_does(tmp_path, family, antialias):
    config = tiny(image_size=(32, 32))
    params = random_params(config)
    save_checkpoint(tmp_path, config, params, pp.script_eval((32, 32)), family)
    loaded = load_checkpoint(tmp_path, image_size=(16, 48), dtype="bfloat16")
    assert loaded.config == tiny(image_size=(16, 48), dtype="bfloat16")
    want = resize_positions(params["pos_embed"], 1, (4, 4), (2, 6), "bicubic", antialias)
    np.testing.assert_array_equal(loaded.params["pos_embed"], want)
    assert loaded.params["pos_embed"].dtype == np.float32
    assert loaded.preprocess.size == (16, 48)
    assert load_checkpoint(tmp_path, image_size=16).config.image_size == (16, 16)
    with pytest.raises(ValueError, match="image_size"):
        load_checkpoint(tmp_path, image_size=1)
    with pytest.raises(ValueError, match="float64"):
        load_checkpoint(tmp_path, dtype="float64")


def edited(folder, edit, family="hf"):
    """A saved model whose tensors went through `edit`."""
    save_checkpoint(folder, TINY, random_params(TINY), family=family)
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_all_that_does_not_fit_is_listed(tmp_path):
    def edit(tensors):
        del tensors["vit.layernorm.weight"], tensors["vit.encoder.layer.1.output.dense.bias"]
        tensors["vit.extra"] = np.zeros(1, np.float32)
        tensors["classifier.bias"] = np.zeros(7, np.float32)

    with pytest.raises(UserError) as error:
        load_checkpoint(edited(tmp_path, edit))
    message = str(error.value)
    assert str(tmp_path) in message
    assert "issing: encoder.layer.1.output.dense.bias, layernorm.weight" in message
    assert "unexpected: extra" in message
    assert "classifier.bias is 7 instead of 5" in message


def test_poolers_and_decoders_are_left_unread(tmp_path):
    def edit(tensors):
        tensors["vit.pooler.dense.weight"] = tensors["decoder.decoder_embed.weight"] = np.zeros((8, 8), np.float32)

    assert_same(load_checkpoint(edited(tmp_path, edit)).params, random_params(TINY))


def test_maes_pretrained_encoder(tmp_path):
    encoder = tiny(num_classes=0, position="sincos")
    params = random_params(encoder)
    save_checkpoint(tmp_path, encoder, params, family="timm")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"mask_token": np.zeros((1, 1, 4), np.float32), "decoder_pos_embed": np.zeros((1, 5, 4), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "model_args": sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == encoder
    assert loaded.preprocess.mean == pp.IMAGENET_MEAN
    assert_same(loaded.params, params)


def test_hugging_faces_mae(tmp_path):
    encoder = tiny(num_classes=0, position="sincos", norm_eps=1e-12)
    params = random_params(encoder)
    save_checkpoint(tmp_path, encoder, params, family="hf")
    tensors = {f"vit.{name}": value for name, value in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"decoder.mask_token": np.zeros((1, 1, 4), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["tokjax"]
    content |= {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == encoder
    assert_same(loaded.params, params)
    assert (loaded.family, loaded.source["format"]) == ("hf", "vit_mae")


def test_low_precision_files_are_widened(tmp_path):
    folder = edited(tmp_path, lambda tensors: {name: value.astype(np.float16) for name, value in tensors.items()})
    want = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), random_params(TINY))
    assert_same(load_checkpoint(folder).params, want)


def test_every_tensor_is_read_once(tmp_path, monkeypatch):
    counts = collections.Counter()
    for way in ("__getitem__", "view"):
        read = getattr(files.Tensors, way)
        monkeypatch.setattr(files.Tensors, way, lambda self, name, read=read: counts.update([name]) or read(self, name))
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    load_checkpoint(tmp_path, image_size=32)
    assert counts.keys() == load_file(tmp_path / "model.safetensors").keys()
    assert set(counts.values()) == {1}


def test_deit3s_own_names(tmp_path):
    config = tiny(layer_scale=1e-6, position_prefix=False)
    params = random_params(config)
    save_checkpoint(tmp_path, config, params, family="timm")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for n, v in tensors.items()},
        tmp_path / "model.safetensors",
    )
    assert_same(load_checkpoint(tmp_path).params, params)


def test_positions_of_registers_are_not_lost_in_silence(tmp_path):
    config = tiny(registers=3)
    save_checkpoint(tmp_path, config, random_params(config), family="timm")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["pos_embed"][0, 2] = 1  # the row of the second register
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path).params
    np.testing.assert_array_equal(loaded["reg_token"][0, 1], tensors["reg_token"][0, 1] + 1)
    np.testing.assert_array_equal(loaded["reg_token"][0, ::2], tensors["reg_token"][0, ::2])
    np.testing.assert_array_equal(loaded["pos_embed"], np.delete(tensors["pos_embed"], [1, 2, 3], 1))


def test_params_that_are_not_the_configs_are_listed(tmp_path):
    params = random_params(TINY)
    params["head"]["bias"] = np.zeros(7)
    del params["norm"]["scale"]
    with pytest.raises(
        ValueError, match=r"norm\.scale is absent instead of 8; head\.bias is 7 instead of 5|head\.bias"
    ):
        save_checkpoint(tmp_path / "new", TINY, params)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="family = 'keras'"):
        save_checkpoint(tmp_path, TINY, random_params(TINY), family="keras")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        save_checkpoint(tmp_path / "file", TINY, random_params(TINY))


def test_nothing_is_half_written(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, TINY, random_params(TINY), pp.script_eval((16, 16)))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # A square image without a crop is a processor of Hugging Face, a short side is one too.
    assert before.keys() == {"config.json", "model.safetensors", "preprocessor_config.json"}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("tokjax.pretrained.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, TINY, random_params(TINY, seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_between_two_models_is_not_loaded(tmp_path):
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    (tmp_path / UNFINISHED).touch()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match="left by a save that did not end"):
            load_checkpoint(path)
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    load_checkpoint(tmp_path)


def test_what_an_earlier_model_had_is_removed(tmp_path):
    """Files that loading would take for this model's."""
    for name in ("reducers.json", "reducers.safetensors", "tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / name).touch()
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}


def test_a_stale_processor_is_removed(tmp_path):
    save_checkpoint(tmp_path, TINY, random_params(TINY), pp.script_eval((16, 16)))
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert load_checkpoint(tmp_path).preprocess is None
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["tokjax"].update(version=2), "another version"),
        (lambda c: c["tokjax"]["model"].update(colour=1), "colour"),
        (lambda c: c["tokjax"]["model"].update(heads=3), "heads=3"),
        (lambda c: (c.pop("tokjax"), c.update(hidden_size="wide")), "of a wrong type"),
        (lambda c: (c.pop("tokjax"), c.update(layer_norm_eps="small")), "of a wrong type"),
        (lambda c: (c.pop("tokjax"), c.update(layer_norm_eps=-1.0)), "norm_eps=-1.0"),
        (lambda c: (c.pop("tokjax"), c.update(architecture="vit_base_patch16_224", pretrained_cfg="x")), "wrong type"),
        (lambda c: (c.pop("tokjax"), c.update(model_type="swin")), "'swin'"),
    ],
)
def test_configurations_that_are_wrong(tmp_path, edit, message):
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    content = json.loads((tmp_path / "config.json").read_text())
    edit(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_model_of_unusual_channels_has_no_default_preprocessing(tmp_path):
    config = tiny(channels=4)
    save_checkpoint(tmp_path, config, random_params(config), family="timm")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["tokjax"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_checkpoint(tmp_path).preprocess is None


def test_preprocessing_that_others_lack_comes_back(tmp_path):
    odd = Preprocess((16, 16), "short", (20, 18), "bilinear", crop_rule="hf", rescale=0.01)
    for family in ("hf", "timm"):
        save_checkpoint(tmp_path / family, TINY, random_params(TINY), odd, family)
        assert load_checkpoint(tmp_path / family).preprocess == odd
