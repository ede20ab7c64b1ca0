"""Retrieval and zero-shot classification: what is measured, training end to end, agreement with hand-made numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import retrieval_scenes, zero_shot_scenes
import tokjax
from tokjax import tasks
from tokjax.errors import UserError


def small(config):
    """Tiny towers and few scenes: seconds."""
    config.model.update({"width": 16, "depth": 3, "heads": 2, "patch_size": 8})
    config.text.update({"width": 16, "depth": 1, "heads": 2})
    config.embed_dim = 8
    config.sweep.methods = config.sweep.methods[:1]
    config.sweep.seconds = config.bench.seconds = 0.01
    return config


def run(config, workdir, mode="all"):
    tasks.make(config, workdir, "a test").run(mode)


def rows(workdir, mode):
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    return [row for row in lines if row["mode"] == mode]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("retrieval")
    run(small(retrieval_scenes.get_config("short")), workdir)
    return workdir


def test_retrieval_from_training_to_report(trained):
    found = rows(trained, "sweep")
    assert [row["method"] for row in found] == ["unreduced", "ToMe"]
    assert all(row["images"] == row["texts"] == 64 for row in found)
    for row in found:
        recalls = [row[f"image_to_text@{k}"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls)
        assert recalls[-1] > 0
    assert (trained / "report.html").is_file()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_what_was_trained_comes_back_with_its_tokenizer(trained):
    task = tasks.make(small(retrieval_scenes.get_config("short")), trained, "a test")
    model, again = task.model(), tokjax.load(trained / "model")
    images = np.asarray(next(iter(task.test_loader()))["image"])
    texts = ["a red three above a blue seven", "a white one left of a green two"]
    ids = model.tokenizer(texts)
    np.testing.assert_array_equal(again.tokenizer(texts), ids)
    np.testing.assert_array_equal(again(images, ids), model(images, ids))
    assert type(again) is tokjax.DualModel


def test_recall_is_that_of_the_similarities(trained):
    task = tasks.make(small(retrieval_scenes.get_config("short")), trained, "a test")
    model = task.model()
    source = task.test_loader().source
    image, _, places = task.image_features(model, "x")
    text = task.text_features(model, [source.captions[i][0] for i in places])
    best = (image @ text.T).argmax(1)
    assert task.evaluate(model, "x")["image_to_text@1"] == pytest.approx((best == np.arange(64)).mean(), abs=1e-6)


def test_zero_shot_with_a_model_that_is_trained_already(trained, tmp_path):
    config = small(zero_shot_scenes.get_config("short"))
    config.init = str(trained / "model")
    run(config, tmp_path, "sweep")
    whole, reduced = rows(tmp_path, "sweep")
    assert whole["agreement"] == 1
    assert 0 <= reduced["agreement"] <= 1
    assert whole["images"] == reduced["images"] == 64

    task = tasks.make(config, tmp_path, "a test")
    model, (image, labels, _) = task.model(), task.image_features(task.model(), "x")
    votes = np.zeros((len(labels), 10))
    for name_index, name in enumerate(task.test_loader().source.class_names):
        sentences = [template.replace("{}", name) for template in config.zero_shot.templates]
        mean = np.asarray(model.encode_text(model.tokenizer(sentences))).mean(0)
        votes[:, name_index] = image @ (mean / np.linalg.norm(mean))
    assert whole["accuracy"] == pytest.approx((votes.argmax(1) == labels).mean(), abs=1e-6)


def test_siglip_trains_too(tmp_path):
    config = small(retrieval_scenes.get_config("siglip"))
    short = retrieval_scenes.get_config("short")
    config.data, config.train, config.batch_size = short.data, short.train, short.batch_size
    config.model.width, config.text.width = 16, 16
    run(config, tmp_path, "train")
    model = tokjax.load(tmp_path / "model")
    assert "logit_bias" in model.params
    assert model.vision.config.pooling == "map"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "mse"}, "config.loss='mse': must be one of clip, siglip"),
        ({"zero_shot.templates": ("no name",)}, r"config.zero_shot.templates=\('no name',\)"),
        ({"zero_shot.classes": ("one", "two")}, "must be 10 names"),
        ({"init": "tests"}, "tests"),
    ],
)
def test_bad_config(trained, tmp_path, change, message):
    config = small(zero_shot_scenes.get_config("short"))
    if "loss" not in change:
        config.init = str(trained / "model")
    with config.unlocked():
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path, "train" if "loss" in change else "eval")


def test_a_model_without_a_bias_has_no_sigmoid_loss(trained, tmp_path):
    config = small(retrieval_scenes.get_config("short"))
    config.init, config.loss = str(trained / "model"), "siglip"
    with pytest.raises(UserError, match="needs a logit_bias"):
        run(config, tmp_path, "train")


def test_a_model_without_a_tokenizer_is_refused(trained, tmp_path):
    model = tokjax.load(trained)
    model.text.preprocess = None
    tokjax.save(model, tmp_path / "m")
    config = small(retrieval_scenes.get_config("short"))
    config.init = str(tmp_path / "m")
    with pytest.raises(UserError, match="no tokenizer"):
        run(config, tmp_path, "eval")


def test_a_model_without_texts_is_refused(tmp_path):
    from tokjax.models.vit import ViTConfig

    tokjax.save(tokjax.build(ViTConfig(image_size=(48, 48), patch_size=8, width=16, depth=1, heads=2)), tmp_path / "v")
    config = small(retrieval_scenes.get_config("short"))
    config.init = str(tmp_path / "v")
    with pytest.raises(UserError, match="holds no text encoder"):
        run(config, tmp_path, "eval")
