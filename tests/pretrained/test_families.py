import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.pretrained import families
from tokjax.pretrained.preprocess import HALF, IMAGENET_MEAN


class Shapes(dict):
    """Tensors of which only names and shapes are known."""

    def shape(self, name):
        return self[name]


NONE = Shapes()


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
    ],
)
def test_architectures_of_timm(architecture, want):
    assert families.TIMM.configure({"architecture": architecture}, NONE) == want


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
        assert int(width * families.ratio(width, hidden)) == hidden


def timm_shapes(*, width=128, rows=17, **more):
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, rows, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "head.weight": (5, width),
    }
    for i in range(11):
        shapes |= {f"blocks.{i}.norm1.weight": (width,), f"blocks.{i}.attn.qkv.bias": (3 * width,)}
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (4 * width, width)}
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
    with pytest.raises(UserError, match=r"pos_embed with 3 axes"):
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
    with pytest.raises(UserError, match=r"timm, vit, deit, vit_mae.*conv1\.weight"):
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
    view = families.HF_DEIT.view(stored)
    assert "classifier.weight" not in view
    assert view.shape("cls_classifier.weight") == (5, 8)
    for part, value in (("weight", weight), ("bias", weight[:, 0])):
        mean = (view[f"cls_classifier.{part}"] + view[f"distillation_classifier.{part}"]) / 2
        np.testing.assert_array_equal(mean, value)
    assert families.HF_DEIT.configure({"architectures": ["DeiTForImageClassification"]} | DEIT, view).num_classes == 5


DEIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DEIT |= {"image_size": 32, "patch_size": 8, "num_channels": 3}
