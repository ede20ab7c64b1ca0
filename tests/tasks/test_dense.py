"""Dense targets on features at every patch: un-merging, probes, and the task on scenes and on folders of masks."""

import importlib.util
from pathlib import Path
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

import tokjax
from tokjax import api, tasks
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig

CONFIG = Path(__file__).parents[2] / "configs" / "dense_scenes.py"


def config_of(arg="short", **changes):
    """The config's own recipe on a model for a test."""
    spec = importlib.util.spec_from_file_location("dense_scenes", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    config.model.update({"patch_size": 8, "width": 32, "depth": 2, "heads": 2})
    config.data.patch_size = 8
    config.data.scenes.train_count, config.data.scenes.test_count = 40, 20
    config.batch_size, config.eval_batch_size = 8, 16  # neither split is whole batches of 16
    config.train.total_steps, config.train.eval_every, config.train.checkpoint_every = 4, 2, 2
    config.train.log_every, config.train.optimiser.warmup_steps = 1, 1
    config.sweep.targets, config.sweep.methods = (0.7,), config.sweep.methods[:2]
    config.sweep.repeats, config.sweep.seconds, config.viz.images = 1, 0.0, 1
    config.bench.batch_sizes, config.bench.repeats, config.bench.seconds = (2,), 1, 0.0
    config.bench.methods = ()
    config.update(changes)
    return config


def rows_of(workdir, mode):
    return [row for row in report.read_jsonl(workdir / "results.jsonl") if row["mode"] == mode]


def test_dense_features_are_those_of_the_token_that_a_patch_lives_on():
    config = ViTConfig((32, 32), 8, width=16, depth=1, heads=2, num_classes=0, registers=1)
    model = tokjax.build(config)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))

    def run(model, trace=True):
        return jax.jit(lambda params: model.forward(params, images, trace=trace))(model.params)

    whole = run(model, trace=False)
    np.testing.assert_array_equal(model.restore(whole).reshape(2, 16, 16), whole.features[:, 2:])
    assert model.dense(images).shape == (2, 4, 4, 16)
    np.testing.assert_allclose(model.dense(images), model.restore(whole), atol=1e-5)

    merged = tokjax.reduce(model, "tome", r=6)
    out = run(merged)
    features = np.asarray(merged.restore(out)).reshape(2, 16, 16)
    np.testing.assert_allclose(merged.dense(images).reshape(2, 16, 16), features, atol=1e-5)
    assert out.features.shape[1] == 12 and features.shape == (2, 16, 16)
    origin = np.asarray(out.tokens.origin)[:, 2:]
    for b in range(2):
        np.testing.assert_array_equal(features[b], np.asarray(out.features)[b, origin[b]])
    with pytest.raises(ValueError, match="trace=True"):
        merged.restore(whole)
    with pytest.raises(ValueError, match="fill='mean': must be one of nearest, zeros"):
        model.dense(images, fill="mean")
    with pytest.raises(ValueError, match="images has shape"):
        model.dense(images[:, :16])
    text = tokjax.build(TextConfig(vocab_size=9, length=4, width=16, depth=1, heads=2))
    with pytest.raises(ValueError, match="has no one grid of patches"):
        text.dense(np.zeros((1, 4), np.int32))

    pruned = tokjax.reduce(model, "strided", keep_rate=0.5, layers=(0,))
    out = run(pruned)
    dropped = np.asarray(out.tokens.origin)[:, 2:] == out.features.shape[1]
    zeros, nearest = (np.asarray(pruned.restore(out, fill=f)).reshape(2, 16, 16) for f in ("zeros", "nearest"))
    assert dropped.any() and (zeros[dropped] == 0).all() and (nearest[dropped] != 0).any(-1).all()
    np.testing.assert_array_equal(zeros[~dropped], nearest[~dropped])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense")
    tasks.make(config_of(), workdir, "python -m tokjax.main").run("all")
    return workdir


def test_rows(finished):
    base, *rows = rows_of(finished, "sweep")
    assert [row["method"] for row in rows] == ["ToMe", "Top-K"]
    for row in (base, *rows):
        assert all(0 <= row[name] <= 1 for name in ("mean_iou", "pixel_accuracy", "delta1")) and row["rmse"] > 0
        assert row["images"] == 20 and row["speedup"] > 0
    assert base["pixel_accuracy"] > 0.75 and base["rmse"] < 1  # most patches are background, which is easy
    lines = report.read_jsonl(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/mean_iou" in line] == [2, 4]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert all(line["train/depth_loss"] > 0 for line in lines if "train/loss" in line)


def test_pictures_and_report(finished):
    names = sorted(path.name for path in (finished / "pictures").iterdir())
    assert names == ["pareto.png", "tokens.png", "tome_0.png", "topk_0.png", "training.png"]
    with Image.open(finished / "pictures" / "tome_0.png") as picture:
        assert picture.width > 4 * 192 and picture.height > 2 * 192  # eight pictures, four in a row
    page = (finished / "report.html").read_text()
    assert all(text in page for text in ("mean IoU", "RMSE", "segmentation\nreduced", "depth\ntruth"))


def test_an_interrupted_sweep_goes_on(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    lines = (workdir / "results.jsonl").read_text().splitlines(keepends=True)
    (workdir / "results.jsonl").write_text("".join(lines[:2]))
    tasks.make(config_of(), workdir, "").run("sweep")
    again, before = rows_of(workdir, "sweep"), rows_of(finished, "sweep")
    timed = ("images_per_s", "speedup")
    assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
        {k: v for k, v in row.items() if k not in timed} for row in before
    ]


def test_every_example_counts_once(finished):
    """Whatever the batches and their padding, the probe and the metrics are the same."""
    model = api.load(finished)
    fitted = []
    for batch in (16, 20, 7):
        task = tasks.make(config_of(eval_batch_size=batch), finished, "")
        probe = task.fit_probe(model, "")
        row = task.measure(task.timed(model), probe, "")
        fitted.append((probe, row))
    for probe, row in fitted[1:]:
        assert row["images"] == 20
        np.testing.assert_allclose(probe["depth"].kernel, fitted[0][0]["depth"].kernel, atol=1e-3)
        assert row["rmse"] == pytest.approx(fitted[0][1]["rmse"], rel=1e-3)
        assert row["pixel_accuracy"] == pytest.approx(fitted[0][1]["pixel_accuracy"], abs=0.01)


def test_a_probe_of_its_own_for_each_method(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = config_of()
    config.probe.on = "reduced"
    config.sweep.methods = config.sweep.methods[:1]
    tasks.make(config, workdir, "").run("sweep")
    rows = rows_of(workdir, "sweep")
    assert len(rows) == 5 and "on=reduced" in rows[-1]["probe"]
    assert rows[3]["rmse"] == rows[0]["rmse"] and rows[4]["rmse"] != rows[1]["rmse"]


def test_segmentation_of_a_folder_with_a_frozen_encoder(tmp_path):
    """Red and blue halves, told apart by a random encoder's features; a part of the masks does not count."""
    folder = tmp_path / "set"
    for split, count in (("train", 6), ("val", 5)):
        for part in ("images", "labels"):
            (folder / split / part).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng(i)
            mask = np.zeros((32, 48), np.uint8)
            mask[:, 8 * rng.integers(2, 5) :] = 1
            image = rng.integers(0, 80, (32, 48, 3))
            image[mask == 1, 0] += 150
            image[mask == 0, 2] += 150
            mask[:8, :8] = 255
            Image.fromarray(image.astype(np.uint8)).save(folder / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(folder / split / "labels" / f"{i}.png")
    (folder / "classes.txt").write_text("blue\nred\n")
    encoder = ViTConfig((32, 48), 8, width=16, depth=2, heads=2, num_classes=7, pooling="mean", class_token=False)
    api.save(api.build(encoder), tmp_path / "encoder")
    config = config_of("probe", init=str(tmp_path / "encoder"), eval_batch_size=4)
    config.data.path, config.data.image_size = str(folder), (32, 48)
    config.reduce.name, config.reduce.r = "tome", 4
    task = tasks.make(config, tmp_path / "run", "")
    assert task.steps == ("sweep", "bench", "viz")
    task.run("eval")
    rows = rows_of(tmp_path / "run", "eval")
    assert [row["setting"] for row in rows] == ["", "r=4"] and all("rmse" not in row for row in rows)
    assert rows[0]["mean_iou"] > 0.95 and rows[1]["mean_iou"] > 0.8 and rows[0]["images"] == 5
    with pytest.raises(UserError, match="is a frozen encoder"):
        task.run("train")
    config.data.patch_size = 4
    with pytest.raises(UserError, match=r"patch_size=4: .* on a grid of \(8, 12\), .* are \(4, 6\)"):
        tasks.make(config, tmp_path / "run", "").run("eval")
    config.targets = ("depth",)
    with pytest.raises(UserError, match="the data have no depth; of places they have segmentation"):
        tasks.make(config, tmp_path / "run", "").run("eval")


def test_a_head_that_is_trained_has_the_classes_of_the_data(tmp_path):
    config = config_of(label_weight=1.0)
    config.model.num_classes = 3
    with pytest.raises(UserError, match=r"num_classes=3: the training data have \d+ classes of images"):
        tasks.make(config, tmp_path, "").run("train")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("normals",)}, "must be one or both of segmentation, depth"),
        ({"fill": "mean"}, "config.fill='mean': must be one of nearest, zeros"),
        ({"probe": {"on": "both"}}, "config.probe.on='both': must be one of unreduced, reduced"),
    ],
)
def test_bad_config(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        tasks.make(config_of(**changes), tmp_path, "")


@pytest.mark.long
def test_the_config_learns(tmp_path):
    spec = importlib.util.spec_from_file_location("dense_scenes", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tasks.make(module.get_config(), tmp_path, "").run("train")
    tasks.make(module.get_config(), tmp_path, "").run("eval")
    (row,) = rows_of(tmp_path, "eval")
    assert row["mean_iou"] > 0.35 and row["delta1"] > 0.95
