"""Evaluation sees what `model.preprocess` gives, bit for bit, whatever the checkpoint's preprocessing."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pytest

import tokjax
from tokjax import api, tasks
from tokjax.bench import report
from tokjax.data.transforms import Evaluation
from tokjax.errors import UserError
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import Patches, ViTConfig
from tokjax.pretrained.preprocess import Naflex, Preprocess, clip_eval, timm_eval
from tokjax.pretrained.tokenizer import Tokenizer
from tokjax.tasks.preprocessing import AsPretrained

CONFIGS = Path(__file__).parents[2] / "configs"
SIZE = (32, 32)
VIT = ViTConfig(SIZE, 8, width=16, depth=2, heads=2, num_classes=2)
NAFLEX = dataclasses.replace(VIT, position="naflex", class_token=False, pooling="map")
GREY = dataclasses.replace(VIT, channels=1)
PLAIN = Preprocess(SIZE, "square", 32, crop=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.7, 0.9))
KINDS = {
    "timm": (VIT, timm_eval(SIZE)),
    "clip": (VIT, clip_eval(SIZE)),
    "rescale": (VIT, dataclasses.replace(PLAIN, rescale=1 / 127.5, filter="bilinear")),
    "dinov3": (VIT, dataclasses.replace(PLAIN, float_resize=True, filter="bilinear")),
    "grey": (GREY, dataclasses.replace(PLAIN, mean=(0.3,), std=(0.6,))),
    "grey floats": (GREY, dataclasses.replace(PLAIN, mean=(0.3,), std=(0.6,), float_resize=True)),
    "naflex": (NAFLEX, Naflex(8, 12, mean=(0.1, 0.2, 0.3), std=(0.4, 0.7, 0.9))),
}


def config_of(name, init, arg=None, **fields):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.init, config.eval_batch_size, config.batch_size = str(init), 4, 4
    config.sweep.targets, config.sweep.methods = (0.7,), config.sweep.methods[:1]
    config.sweep.repeats, config.sweep.seconds, config.viz.images = 1, 0.0, 2
    config.train.total_steps, config.train.eval_every, config.train.optimiser.warmup_steps = 2, 0, 1
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Six test images of all aspects in two classes, one of them not to be read, and four to train on."""
    root = tmp_path_factory.mktemp("tree")
    sizes = [(40, 52), (90, 20), (17, 64), (32, 32), (50, 41)]
    for split, count in (("val", 5), ("train", 4)):
        for i, (height, width) in enumerate(sizes[:count]):
            file = root / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(file)
    (root / "val" / "b" / "broken.png").write_bytes(b"not an image")
    return root


def files(tree):
    return sorted((tree / "val").glob("*/?.png"), key=lambda path: (path.parent.name, path.name))


def saved(folder, config, preprocess):
    model = api.build(config, preprocess=preprocess)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), model.params)
    tokjax.save(model.with_params(noisy), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_what_preprocess_gives(kind, tree, tmp_path):
    config = config_of("imagenet", saved(tmp_path / "m", *KINDS[kind]), **{"data.path": str(tree)})
    config.data.bad_image_limit = 1
    task = tasks.make(config, tmp_path / "run", "")
    given, valid = [], []
    for batch in task.batches("test", ""):
        given.append(task.inputs(task.initial, batch))
        valid.append(batch["valid"])
    given = jax.tree.map(lambda *parts: np.concatenate(parts)[np.concatenate(valid)], *given)
    wanted = task.initial.preprocess(files(tree))
    assert isinstance(given, Patches) == (kind == "naflex")
    jax.tree.map(np.testing.assert_array_equal, given, wanted)
    if kind == "naflex":
        assert len({tuple(row) for row in wanted.shape.tolist()}) > 2 and not wanted.valid.all()
    np.testing.assert_array_equal(task.initial(given), task.initial(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_show_the_pixels_that_the_model_sees(kind):
    own = AsPretrained(KINDS[kind][1])
    image = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    made = own(image)
    normalised = own.normalise(made["image"][None])[0]
    assert normalised.dtype == np.float32
    seen = own.preprocess.transform(image).convert("RGB")
    shown = own.picture(normalised, made.get("shape"))
    assert shown.dtype == np.uint8
    np.testing.assert_allclose(shown.astype(int), np.asarray(seen), atol=1 if own.dtype == "float32" else 0)


@pytest.mark.parametrize("kind", ["naflex", "grey floats"])
def test_a_whole_evaluation(kind, tree, tmp_path):
    config = config_of("imagenet", saved(tmp_path / "m", *KINDS[kind]), **{"data.path": str(tree)})
    config.data.bad_image_limit = 1
    config.model.dtype = "float32"
    task = tasks.make(config, tmp_path / "run", "")
    for mode in ("eval", "sweep", "viz"):
        task.run(mode)
    base = report.read_jsonl(tmp_path / "run" / "results.jsonl")[0]
    model = task.initial
    found = np.asarray(model(model.preprocess(files(tree)))).argmax(1)
    assert base["images"] == 5
    assert base["accuracy"] == np.mean(found == [0, 0, 0, 1, 1])
    assert (tmp_path / "run" / "report.html").is_file()


def test_features_of_patches(tree, tmp_path):
    folder = saved(tmp_path / "m", *KINDS["naflex"])
    config = config_of("features_digits", folder, "short", **{"data.path": str(tree), "data.source": "imagefolder"})
    config.data.bad_image_limit, config.data.subset, config.data.test_subset, config.knn.k = 1, None, None, 1
    task = tasks.make(config, tmp_path / "run", "")
    (found,) = task.collect(task.initial, ["test"], "")
    inputs = task.initial.preprocess(files(tree))
    pooled = task.initial.forward(task.initial.params, inputs).pooled
    np.testing.assert_allclose(found.features, pooled, atol=1e-5)


@pytest.mark.parametrize("name", ["zero_shot_scenes", "retrieval_scenes"])
def test_image_text_tasks_on_scenes(name, tmp_path):
    vision = dataclasses.replace(NAFLEX, num_classes=0)
    tokenizer = Tokenizer.train_words(["a photo of the digit 1 2 3 red green"], 8)
    text = TextConfig(tokenizer.vocab_size, 8, 16, 1, 2, causal=False, pooling="last", head_bias=True, embed_dim=16)
    model = api.build(DualConfig(vision, text, 2.0, -10.0), preprocess=Naflex(8, 12), tokenizer=tokenizer)
    tokjax.save(model, tmp_path / "m")
    config = config_of(name, tmp_path / "m", "short")
    counts = {"train_count": 8, "test_count": 6}
    for data in (config.data, *([config.zero_shot.data] if name.startswith("zero") else [])):
        data.scenes.update({key: value for key, value in counts.items() if key in data.scenes})
        data.test_subset, data.patch_size = 6, 8
    task = tasks.make(config, tmp_path / "run", "")
    batch = next(iter(task.test_loader()))
    source = task.test_loader().source
    wanted = task.initial.preprocess([source[i]["image"] for i in range(4)])
    jax.tree.map(np.testing.assert_array_equal, task.inputs(task.initial, batch), wanted)
    task.run("eval")
    (row,) = report.read_jsonl(tmp_path / "run" / "results.jsonl")
    assert row["images"] == 6
    task.run("train")  # on whole square patches


def test_training_from_a_naflex_checkpoint_takes_squares(tree, tmp_path):
    config = config_of("imagenet", saved(tmp_path / "m", *KINDS["naflex"]), **{"data.path": str(tree)})
    config.data.bad_image_limit = 1
    task = tasks.make(config, tmp_path / "run", "")
    task.run("train")
    assert "shape" not in next(iter(task.loader("train", train=True)))
    assert tokjax.load(tmp_path / "run").preprocess == KINDS["naflex"][1]


def test_what_is_refused(tree, tmp_path):
    grey = saved(tmp_path / "grey", *KINDS["grey"])
    config = config_of("imagenet", grey, **{"data.path": str(tree)})
    with pytest.raises(UserError, match="takes grey images, on which nothing is trained"):
        tasks.make(config, tmp_path / "run", "").run("train")
    config = config_of("dense_scenes", grey, "short")
    with pytest.raises(UserError, match="images of scenes are in colour, the model's are grey"):
        tasks.make(config, tmp_path / "run", "").run("eval")
    config = config_of("dense_scenes", saved(tmp_path / "naflex", *KINDS["naflex"]), "short")
    with pytest.raises(UserError, match="a NaFlex encoder has no one grid of patches"):
        tasks.make(config, tmp_path / "run", "").run("eval")
    two = saved(tmp_path / "two", dataclasses.replace(VIT, channels=2), None)
    with pytest.raises(UserError, match=r"images has shape \(4, 32, 32, 3\): must be \(batch, 32, 32, 2\)"):
        tasks.make(config_of("imagenet", two, **{"data.path": str(tree)}), tmp_path / "run", "").run("eval")
    whole = dataclasses.replace(KINDS["naflex"][1], resize=False)
    config = config_of("imagenet", saved(tmp_path / "whole", NAFLEX, whole), **{"data.path": str(tree)})
    with pytest.raises(UserError, match="is not resized"):
        tasks.make(config, tmp_path / "run", "").run("eval")


def test_the_configs_own_transform_stays_without_a_checkpoint(tree, tmp_path):
    config = config_of("imagenet", "", "deit-ti/16", **{"data.path": str(tree)})
    task = tasks.make(config, tmp_path / "run", "")
    assert task.transform() is None and task.normalise() is None
    assert isinstance(task.test_loader()._transform, Evaluation)
