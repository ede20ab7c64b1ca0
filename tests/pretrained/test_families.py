import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.pretrained import families
from tokjax.pretrained.families.base import ratio
from tokjax.pretrained.families.dino import swiglu_width
from tokjax.pretrained.preprocess import CLIP_MEAN, HALF, IMAGENET_MEAN, Naflex


class Shapes(dict):
    """Tensors of which only names and shapes are known."""

    def shape(self, name):
        return self[name]


NONE = Shapes()

CLIP = {"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}
SIGLIP = {"class_token": False, "gelu": "tanh"}
MEAN = {"class_token": False, "pooling": "size_mean", "fc_norm": True}
DINOV3 = {"image_size": (256, 256), "layer_scale": 1e-5, "norm_eps": 1e-5, "registers": 4, "pooling": "size_mean"}
DINOV3 |= {"position": "rope"}


@pytest.mark.parametrize(
    ("architecture", "want"),
    [
        ("vit_tiny_patch16_224", ViTConfig(width=192, heads=3)),
        ("vit_small_patch32_384", ViTConfig(image_size=(384, 384), patch_size=32)),
        ("vit_base_patch8_224.augreg_in21k_ft_in1k", ViTConfig(width=768, heads=12, patch_size=8)),
        ("vit_large_patch16_224_in21k", ViTConfig(width=1024, depth=24, heads=16)),
        ("vit_huge_patch14_224", ViTConfig(width=1280, depth=32, heads=16, patch_size=14)),
        ("deit_small_patch16_224", ViTConfig()),
        ("deit_base_distilled_patch16_384", ViTConfig((384, 384), width=768, heads=12, distilled=True)),
        ("deit3_medium_patch16_224", ViTConfig(width=512, heads=8, layer_scale=1e-6, position_prefix=False)),
        ("vit_giant_patch14_224", ViTConfig(patch_size=14, width=1408, depth=40, heads=16, mlp_ratio=48 / 11)),
        ("vit_base_patch16_clip_224.laion2b", ViTConfig(width=768, heads=12, **CLIP)),
        ("vit_large_patch14_clip_quickgelu_336", ViTConfig((336, 336), 14, 3, 1024, 24, 16, **CLIP, gelu="quick")),
        ("vit_base_patch16_plus_clip_240", ViTConfig((240, 240), width=896, heads=14, **CLIP)),
        # timm gives this one the exact GELU, its training had the tanh form.
        ("vit_base_patch16_siglip_256.v2_webli", ViTConfig((256, 256), width=768, heads=12, **SIGLIP, pooling="map")),
        ("vit_base_patch16_siglip_gap_224", ViTConfig(width=768, heads=12, **SIGLIP, pooling="size_mean")),
        ("vit_small_patch14_dinov2", ViTConfig((518, 518), 14, layer_scale=1e-5)),
        (
            "vit_small_patch14_reg4_dinov2",
            ViTConfig((518, 518), 14, layer_scale=1e-5, registers=4, position_prefix=False),
        ),
        (
            "vit_medium_patch16_reg1_gap_256",
            ViTConfig((256, 256), width=512, heads=8, registers=1, layer_scale=1e-5, **MEAN, position_prefix=False),
        ),
        ("vit_base_patch16_gap_224", ViTConfig(width=768, heads=16, **{**MEAN, "fc_norm": False})),
        ("vit_small_patch16_dinov3", ViTConfig(**DINOV3, qkv_bias=False)),
        ("vit_small_patch16_dinov3_qkvb.lvd1689m", ViTConfig(**DINOV3, key_bias=False)),
        ("vit_small_plus_patch16_dinov3_qkvb", ViTConfig(**DINOV3, key_bias=False, mlp="swiglu")),
    ],
)
def test_architectures_of_timm(architecture, want):
    family = families.recognise({"architecture": architecture}, NONE)
    assert (family is families.TIMM_EVA) == ("dinov3" in architecture)
    assert family.configure({"architecture": architecture}, NONE) == want


def test_arguments_of_dinov3_in_timm():
    config = {
        "architecture": "vit_small_patch16_dinov3",
        "global_pool": "token",
        "num_classes": 0,
        "model_args": {"swiglu_mlp": True, "swiglu_align_to": 64, "mlp_ratio": 1.1, "num_reg_tokens": 2},
    }
    model = families.TIMM_EVA.configure(config, NONE)
    assert (model.pooling, model.registers, int(model.width * model.mlp_ratio)) == ("cls", 2, 448)
    for name, value in (("rope_type", "mixed"), ("use_abs_pos_emb", True)):
        with pytest.raises(UserError, match=f"{name} = {value!r}"):
            families.TIMM_EVA.configure({**config, "model_args": {name: value}}, NONE)


def test_timms_arguments_go_over_published_facts_over_the_architecture():
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 10,
        "global_pool": "avg",
        "model_args": {
            "depth": 3,
            "fc_norm": False,
            "act_layer": "gelu_tanh",
            "norm_layer": None,
            "img_size": [64, 32],
        },
        "pretrained_cfg": {"input_size": [1, 384, 384], "num_classes": 1000},
    }
    model = families.TIMM.configure(config, NONE)
    assert model == ViTConfig((64, 32), depth=3, num_classes=10, pooling="size_mean", gelu="tanh", channels=1)
    del config["model_args"]["img_size"], config["model_args"]["fc_norm"]
    model = families.TIMM.configure(config, NONE)
    assert (model.image_size, model.fc_norm) == ((384, 384), True)


def test_old_flat_files_of_timm():
    config = {"architecture": "deit_tiny_patch16_224", "num_classes": 7, "input_size": [3, 160, 160], "crop_pct": 0.8}
    model = families.TIMM.configure(config, NONE)
    assert (model.num_classes, model.image_size) == (7, (160, 160))
    assert families.TIMM.preprocess(config, None, model).resize_to == 200


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "vit_base_patch16_rope_224"}, "vit_base_patch16_rope_224"),
        ({"architecture": "vit_small_patch16_224", "model_args": {"mlp_layer": "swiglu"}}, "mlp_layer"),
        ({"architecture": "vit_small_patch16_224", "model_args": {"act_layer": "relu"}}, "act_layer = 'relu'"),
        ({"architecture": "vit_small_patch16_224", "global_pool": "map"}, "global_pool = 'map'"),
    ],
)
def test_what_timm_has_and_this_does_not(config, message):
    with pytest.raises(UserError, match=message):
        families.TIMM.configure(config, NONE)


def test_hugging_face_configurations():
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": 1152,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "intermediate_size": 4304,  # no whole multiple of the width
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": [64, 32],
        "patch_size": 16,
        "num_channels": 1,
        "qkv_bias": False,
        "id2label": {"0": "cat", "1": "dog", "2": "owl"},
    }
    model = families.HF_VIT.configure(config, NONE)
    assert int(model.width * model.mlp_ratio) == 4304
    assert (model.norm_eps, model.gelu, model.num_classes, model.qkv_bias) == (1e-12, "tanh", 3, False)
    assert (model.image_size, model.channels, model.heads) == ((64, 32), 1, 16)
    assert families.HF_VIT.configure({**config, "architectures": ["ViTModel"]}, NONE).num_classes == 0
    with pytest.raises(UserError, match="relu"):
        families.HF_VIT.configure({**config, "hidden_act": "relu"}, NONE)


@pytest.mark.parametrize("width", [3, 7, 49, 384, 1152, 1408])
def test_every_hidden_width_has_a_ratio(width):
    for hidden in range(1, 5 * width, 7):
        assert int(width * ratio(width, hidden)) == hidden


def timm_shapes(*, width=128, rows=17, **more):
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "head.weight": (5, width),
    }
    for i in range(11):
        shapes |= {f"blocks.{i}.norm1.weight": (width,), f"blocks.{i}.attn.qkv.bias": (3 * width,)}
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (4 * width, width), f"blocks.{i}.mlp.fc2.weight": (width, 4 * width)}
    return Shapes({name: shape for name, shape in {**shapes, **more}.items() if shape})


PLAIN = ViTConfig((32, 32), 8, width=128, depth=11, heads=2, num_classes=5)
NAMED = {
    "plain": ({}, {}),
    "MAE fine-tuned": ({"fc_norm.weight": (128,)}, {"pooling": "size_mean", "fc_norm": True}),
    "MAE pre-trained": (
        {"head.weight": None, "decoder_pos_embed": (1, 17, 64), "mask_token": (1, 1, 64)},
        {"num_classes": 0, "position": "sincos"},
    ),
    "distilled": ({"dist_token": (1, 1, 128), "rows": 18}, {"distilled": True}),
    "DeiT-3": ({"blocks.0.ls1.gamma": (128,), "rows": 16}, {"layer_scale": 1e-6, "position_prefix": False}),
    "registers, a row each": ({"reg_token": (1, 4, 128), "rows": 21}, {"registers": 4}),
    "registers, no rows": ({"reg_token": (1, 4, 128), "rows": 16}, {"registers": 4, "position_prefix": False}),
    "a packed gate": (
        {f"blocks.{i}.mlp.fc1.weight": (8 * 128, 128) for i in range(11)},
        {"mlp": "swiglu"},
    ),
    "an attention pool": (
        {"cls_token": None, "rows": 16, "attn_pool.latent": (1, 1, 128)},
        {"class_token": False, "pooling": "map", "gelu": "tanh", "position_prefix": False},
    ),
    "without CLS": (
        {"cls_token": None, "rows": 16},
        {"class_token": False, "pooling": "size_mean", "position_prefix": False},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_alone_tell_the_model(name):
    changes, fields = NAMED[name]
    shapes = timm_shapes(**changes)
    assert families.recognise({}, shapes) is families.TIMM
    assert families.TIMM.configure({}, shapes) == ViTConfig(**{**vars(PLAIN), **fields})
    assert families.TIMM.preprocess({}, None, PLAIN).mean == IMAGENET_MEAN


def test_names_alone_can_be_too_little():
    with pytest.raises(UserError, match="number of heads"):
        families.TIMM.configure({}, timm_shapes(width=96))
    with pytest.raises(UserError, match="no square"):
        families.TIMM.configure({}, timm_shapes(rows=19))
    with pytest.raises(UserError, match=r"pos_embed with 2 or 3 axes"):
        families.TIMM.configure({}, timm_shapes(pos_embed=None))


@pytest.mark.parametrize(
    ("config", "tensors", "want"),
    [
        ({"architecture": "deit_tiny_patch16_224"}, {}, "timm"),
        ({"model_type": "deit"}, {}, "deit"),
        ({"model_type": "vit_mae"}, {}, "vit_mae"),
        ({}, {"vit.embeddings.patch_embeddings.projection.weight": ()}, "vit"),
        ({}, {"embeddings.patch_embeddings.projection.weight": ()}, "vit"),
        ({}, {"vit.embeddings.patch_embeddings.projection.weight": (), "decoder.mask_token": ()}, "vit_mae"),
        ({"model_type": "siglip2"}, {"text_model.head.bias": ()}, "siglip2"),
        ({"model_type": "siglip2"}, {"vision_model.head.probe": ()}, "siglip2_vision_model"),
        ({"model_type": "clip"}, {"vision_model.post_layernorm.bias": ()}, "clip_vision_model"),
        ({"model_type": "dinov2_with_registers"}, {}, "dinov2_with_registers"),
        ({"architecture": "vit_base_patch16_dinov3.lvd1689m"}, {}, "timm_eva"),
        ({}, {"opt/target/embedding/kernel": ()}, "augreg"),
        ({}, {"visual.class_embedding": ()}, "openai_clip"),
        ({"model_cfg": {}}, {"visual.trunk.patch_embed.proj.weight": ()}, "open_clip"),
        ({}, {"patch_embed.proj.weight": (), "storage_tokens": ()}, "dinov3_upstream"),
        ({}, {"patch_embed.proj.weight": (), "register_tokens": ()}, "dinov2_upstream_registers"),
        ({}, {"patch_embed.proj.weight": (), "blocks.0.ls1.gamma": (), "mask_token": ()}, "dinov2_upstream"),
        ({}, {"patch_embed.proj.weight": (), "decoder_pos_embed": (), "mask_token": ()}, "timm"),
        (
            {},
            {"deit.embeddings.patch_embeddings.projection.weight": (), "deit.embeddings.distillation_token": ()},
            "deit",
        ),
    ],
)
def test_recognises(config, tensors, want):
    assert families.recognise(config, Shapes(tensors)).name == want


def test_what_is_not_recognised_is_told_what_would_be():
    with pytest.raises(UserError, match=r"'swin'.*known are vit, deit, vit_mae"):
        families.recognise({"model_type": "swin"}, NONE)
    with pytest.raises(UserError, match=r"timm, timm_eva, vit, deit.*conv1\.weight"):
        families.recognise({}, Shapes({"conv1.weight": (1,)}))


def images(family, config, size=(224, 224), processor=None, **fields):
    return family.preprocess(config, processor, ViTConfig(size, **fields))


def test_preprocessing_of_each_family():
    augreg = images(families.TIMM, {"architecture": "vit_small_patch16_224"})
    assert (augreg.resize, augreg.resize_to, augreg.crop, augreg.mean) == ("short", 248, True, HALF)
    assert images(families.TIMM, {"architecture": "vit_small_patch16_384"}, (384, 384)).resize_to == 384
    deit = images(families.TIMM, {"architecture": "deit_small_patch16_224"})
    assert (deit.resize_to, deit.mean) == (248, IMAGENET_MEAN)
    mae = images(families.TIMM, {"architecture": "vit_base_patch16_224"}, fc_norm=True, pooling="size_mean")
    assert mae.mean == IMAGENET_MEAN
    published = {"crop_pct": 0.95, "interpolation": "bilinear", "mean": [0.1] * 3, "std": [0.2] * 3}
    own = images(families.TIMM, {"architecture": "vit_small_patch16_224", "pretrained_cfg": published})
    assert (own.resize_to, own.filter, own.mean, own.std) == (235, "bilinear", (0.1,) * 3, (0.2,) * 3)

    vit = images(families.HF_VIT, {})
    assert (vit.resize, vit.resize_to, vit.filter, vit.crop, vit.mean) == ("square", 224, "bilinear", False, HALF)
    deit = images(families.HF_DEIT, {})
    assert (deit.resize, deit.resize_to, deit.filter, deit.crop_rule) == ("square", 256, "bicubic", "hf")
    assert deit.mean == IMAGENET_MEAN
    processor = {"size": 256, "do_center_crop": True, "crop_size": 224, "resample": 3}
    assert images(families.HF_DEIT, {}, (448, 448), processor).resize_to == 512
    mae = images(families.HF_MAE, {})
    assert (mae.resize, mae.resize_to, mae.mean) == ("short", 256, IMAGENET_MEAN)


def test_one_head_of_deit_is_the_mean_of_two():
    class Stored(Shapes):
        def shape(self, name):
            return self[name].shape

    weight = np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)
    stored = Stored({"deit.layernorm.bias": np.zeros(8), "classifier.weight": weight, "classifier.bias": weight[:, 0]})
    view = families.HF_DEIT.view({}, stored)
    assert "classifier.weight" not in view
    assert view.shape("cls_classifier.weight") == (5, 8)
    for part, value in (("weight", weight), ("bias", weight[:, 0])):
        mean = (view[f"cls_classifier.{part}"] + view[f"distillation_classifier.{part}"]) / 2
        np.testing.assert_array_equal(mean, value)
    assert families.HF_DEIT.configure({"architectures": ["DeiTForImageClassification"]} | DEIT, view).num_classes == 5


DEIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DEIT |= {"image_size": 32, "patch_size": 8, "num_channels": 3}


CLIP_FILE = {"architectures": ["CLIPModel"], "model_type": "clip"}


def clip_shapes(text=64, image=128):
    """A CLIP of Hugging Face with one block in each tower."""
    shapes = {"logit_scale": (), "visual_projection.weight": (32, image), "text_projection.weight": (32, text)}
    shapes["vision_model.embeddings.patch_embedding.weight"] = (image, 3, 8, 8)
    shapes["text_model.embeddings.token_embedding.weight"] = (50, text)
    shapes["text_model.embeddings.position_embedding.weight"] = (9, text)
    for tower, width, last in (("vision", image, "post_layernorm"), ("text", text, "final_layer_norm")):
        shapes[f"{tower}_model.{last}.weight"] = (width,)
        shapes[f"{tower}_model.encoder.layers.0.layer_norm1.weight"] = (width,)
        shapes[f"{tower}_model.encoder.layers.0.mlp.fc2.weight"] = (width, 2 * width)
    return Shapes(shapes)


def test_silent_configurations_of_two_towers_take_the_tensors_sizes_and_the_librarys_defaults():
    """Published SigLIP files state only what differs from the base model."""
    config = {
        **CLIP_FILE,
        "text_config": {"eos_token_id": 2},
        "vision_config": {"num_attention_heads": 2, "image_size": 32},
    }
    model = families.HF_CLIP.configure(config, clip_shapes())
    fields = {"width": 128, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "num_classes": 32, "gelu": "quick"}
    vision = ViTConfig((32, 32), 8, **fields, **CLIP, head_bias=False)
    text = TextConfig(50, 9, 64, 1, 8, 2.0, eos_id=None, embed_dim=32)
    assert model == DualConfig(vision, text, 2.6592)
    config["text_config"] = {"eos_token_id": 49, "hidden_act": "gelu"}
    model = families.HF_CLIP.configure(config, clip_shapes())
    assert (model.text.eos_id, model.text.gelu, model.vision.gelu) == (49, "exact", "quick")


def test_old_files_repeat_a_tower_under_another_key():
    config = {**CLIP_FILE, "text_config": None, "text_config_dict": {"eos_token_id": 2, "num_attention_heads": 4}}
    config["vision_config_dict"] = {"image_size": 64}
    model = families.HF_CLIP.configure(config, clip_shapes(image=96))
    assert (model.text.heads, model.text.eos_id, model.vision.image_size) == (4, None, (64, 64))


def openai_shapes(**more):
    shapes = {"visual.class_embedding": (128,), "visual.conv1.weight": (128, 3, 8, 8), "visual.proj": (128, 32)}
    shapes |= {"visual.positional_embedding": (17, 128), "positional_embedding": (9, 64), "text_projection": (64, 32)}
    shapes |= {"visual.ln_post.weight": (128,), "ln_final.weight": (64,), "token_embedding.weight": (50, 64)}
    for prefix, width in (("visual.", 128), ("", 64)):
        block = f"{prefix}transformer.resblocks.0"
        shapes |= {f"{block}.ln_1.weight": (width,), f"{block}.mlp.c_proj.weight": (width, 4 * width)}
    return Shapes({**shapes, **more})


def test_whose_clip_it_is_decides_the_activation():
    archive = families.OPENAI_CLIP.configure({}, openai_shapes(input_resolution=()))
    assert (archive.vision.heads, archive.text.heads, archive.vision.image_size) == (2, 1, (32, 32))
    assert archive.vision.gelu == archive.text.gelu == "quick"
    assert archive.logit_bias is None
    stated = {"quick_gelu": False, "vision_heads": 4, "text_heads": 8}
    lone = families.OPENAI_CLIP.configure(stated, openai_shapes())
    assert (lone.vision.heads, lone.text.heads, lone.vision.gelu) == (4, 8, "exact")
    with pytest.raises(UserError, match="quick_gelu"):
        families.OPENAI_CLIP.configure({}, openai_shapes())
    cfg = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "head_width": 32}, "text_cfg": {"heads": 2}}
    open_clip = families.OPENAI_CLIP.configure({"model_cfg": cfg}, openai_shapes(logit_bias=()))
    assert (open_clip.vision.heads, open_clip.text.heads, open_clip.logit_bias) == (4, 2, -10.0)
    assert open_clip.text.gelu == "exact"
    for tower, key in (("vision_cfg", "attentional_pool"), ("text_cfg", "no_causal_mask"), ("vision_cfg", "pos_embed")):
        wrong = {**cfg, tower: {**cfg[tower], key: True}}
        with pytest.raises(UserError, match=key):
            families.OPENAI_CLIP.configure({"model_cfg": wrong}, openai_shapes())


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("dinov3_vit", {"value_bias": False}, "value_bias = False"),
        ("dinov3_vit", {"mlp_bias": False}, "mlp_bias"),
        ("dinov3_vit", {"use_gated_mlp": True, "hidden_act": "gelu"}, "use_gated_mlp"),
        ("dinov3_vit", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("open_clip", {}, "open_clip_config.json"),
        ("open_clip", {"model_cfg": {"vision_cfg": {"timm_proj": "linear"}}}, "timm_proj"),
    ],
)
def test_what_is_refused_says_why(family, config, message):
    with pytest.raises(UserError, match=message):
        families.FAMILIES[family].configure(config, NONE)


def test_dinov2_with_a_classifier_reads_cls_and_mean():
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config |= {"intermediate_size": 32, "num_channels": 3, "id2label": {"0": "cat", "1": "dog", "2": "owl"}}
    for labels in ({}, {"architectures": ["Dinov2ForImageClassification"]}):
        model = families.HF_DINOV2.configure({**config, **labels}, Shapes({"classifier.weight": (3, 16)}))
        assert (model.pooling, model.num_classes, model.pooled_width) == ("cls_mean", 3, 16)
    model = families.HF_DINOV2.configure({**config, "architectures": ["Dinov2Model"]}, NONE)
    assert (model.pooling, model.num_classes) == ("cls", 0)


def test_the_hidden_width_of_a_gated_mlp():
    assert swiglu_width(1536, 4) == 4096  # DINOv2 giant
    assert swiglu_width(8, 2) == 16


def test_sizes_without_whole_patches_are_cut():
    model = families.TIMM.configure({"architecture": "vit_so400m_patch14_siglip_384"}, NONE)
    assert model.image_size == (384, 384)


def test_preprocessing_of_towers():
    clip = images(families.HF_CLIP, {})
    assert (clip.resize, clip.resize_to, clip.crop, clip.mean) == ("short", 224, True, CLIP_MEAN)
    assert images(families.OPENAI_CLIP, {}).crop_rule == "torchvision"
    siglip = images(families.HF_SIGLIP, {}, (384, 384))
    assert (siglip.resize, siglip.resize_to, siglip.filter, siglip.mean) == ("square", 384, "bicubic", HALF)
    naflex = images(families.HF_SIGLIP2, {}, class_token=False, pooling="map", position="naflex")
    assert naflex == Naflex(16)
    dinov2 = images(families.HF_DINOV2, {})
    assert (dinov2.resize, dinov2.resize_to, dinov2.mean) == ("short", 256, IMAGENET_MEAN)
    dinov3 = images(families.HF_DINOV3, {})
    assert (dinov3.resize, dinov3.filter, dinov3.float_resize) == ("square", "bilinear", True)
    augreg = images(families.AUGREG, {})
    assert (augreg.resize_to, augreg.mean) == (248, HALF)
    for name, mean, resize in (
        ("vit_base_patch16_clip_224", CLIP_MEAN, 248),
        ("vit_large_patch14_clip_224", CLIP_MEAN, 224),
        ("vit_base_patch16_siglip_224", HALF, 248),
        ("vit_small_patch14_dinov2", IMAGENET_MEAN, 224),
    ):
        made = images(families.TIMM, {"architecture": name})
        assert (made.mean, made.resize_to) == (mean, resize)


def test_the_authors_names_of_dino():
    chunks = Shapes({f"blocks.{i // 2}.{i}.norm1.weight": (128,) for i in range(4)})
    view = families.DINOV2_UPSTREAM.view({}, chunks)
    assert list(view) == [f"blocks.{i}.norm1.weight" for i in range(4)]

    class Stored(Shapes):
        def shape(self, name):
            return self[name].shape

    bias = np.arange(6, dtype=np.float32)
    stored = Stored({"blocks.3.attn.qkv.bias": bias, "blocks.3.attn.qkv.bias_mask": bias, "norm.bias": bias})
    view = families.DINOV3_UPSTREAM.view({}, stored)
    assert set(view) == {"blocks.3.attn.qv_bias", "norm.bias"}
    assert view.shape("blocks.3.attn.qv_bias") == (4,)
    np.testing.assert_array_equal(view["blocks.3.attn.qv_bias"], [0, 1, 4, 5])
