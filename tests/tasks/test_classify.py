"""The classification task on small trees of real image files, and from published-style checkpoints."""

import importlib.util
import io
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokjax import api, reducers, tasks
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig, preset
from tokjax.pretrained.checkpoint import save_checkpoint, shapes
from tokjax.tasks.classify import with_classes

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = {"preset": "", "patch_size": 8, "width": 32, "depth": 3, "heads": 2}


def config_of(name, arg=None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def shrink(config, size=32):
    """The config's own recipe on a model and a schedule for a test."""
    for key, value in TINY.items():
        config.model[key] = value
    config.data.image_size = (size, size)
    config.batch_size, config.eval_batch_size = 8, 8
    config.train.total_steps, config.train.eval_every, config.train.checkpoint_every = 6, 3, 3
    config.train.log_every, config.train.optimiser.warmup_steps = 1, 2
    config.sweep.targets, config.sweep.methods = (0.7,), config.sweep.methods[:1] + config.sweep.methods[3:4]
    config.sweep.repeats, config.sweep.seconds, config.viz.images = 1, 0.0, 1
    return config


def picture(label, seed):
    """A noisy image whose colour tells its class."""
    noise = np.random.default_rng(seed).integers(0, 60, (40, 52, 3))
    noise[..., label] += 150
    return Image.fromarray(noise.astype(np.uint8))


@pytest.fixture
def image_tree(tmp_path):
    for split, count in (("train", 8), ("val", 5)):
        for label, name in enumerate(("red", "green", "blue")):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(label, 100 * label + i).save(folder / f"{i}.jpg")
    return tmp_path / "tree"


def test_imagenet_config_on_a_folder_tree(image_tree, tmp_path, capsys):
    config = shrink(config_of("imagenet", "deit-ti/16"))
    config.data.path = str(image_tree)
    (image_tree / "val" / "red" / "broken.jpg").write_bytes(b"not an image")
    task = tasks.make(config, tmp_path / "run", "python -m tokjax.main")
    for mode in ("train", "eval", "sweep"):
        task.run(mode)
    assert "1 test images could not be read" in capsys.readouterr().out
    rows = report.read_jsonl(tmp_path / "run" / "results.jsonl")
    assert {row["images"] for row in rows} == {15}  # the broken one does not count
    assert [row["method"] for row in rows if row["mode"] == "sweep"] == ["unreduced", "ToMe", "random drop"]
    assert all(abs(row["macs_relative"] - 0.7) < 0.1 for row in rows if row["mode"] == "sweep" and row["target"])
    model = api.load(tmp_path / "run")
    assert model.config.distilled and model.config.num_classes == 3 and model.config.dtype == "bfloat16"


def test_cifar_config_on_parquet(tmp_path):
    for split, count in (("train", 24), ("test", 10)):
        images, labels = [], [i % 3 for i in range(count)]
        for i, label in enumerate(labels):
            file = io.BytesIO()
            picture(label, i).save(file, "JPEG")
            images.append({"bytes": file.getvalue(), "path": f"{i}.jpg"})
        pq.write_table(pa.table({"img": images, "label": labels}), tmp_path / f"{split}.parquet")
    config = shrink(config_of("cifar10"))
    config.data.path = str(tmp_path)
    task = tasks.make(config, tmp_path / "run", "python -m tokjax.main")
    task.run("train")
    lines = report.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 6 and np.isfinite(losses).all()


def published(folder, size=32, classes=3):
    """A checkpoint in Hugging Face's form, without any word of ours in its config."""
    config = ViTConfig(
        image_size=(size, size), patch_size=8, width=32, depth=3, heads=2, num_classes=classes, norm_eps=1e-12
    )
    model = api.build(config)
    save_checkpoint(folder, config, model.params["model"], None, family="hf")
    written = json.loads((folder / "config.json").read_text())
    written.pop("tokjax")
    (folder / "config.json").write_text(json.dumps(written))
    processor = {"do_resize": True, "size": {"height": size, "width": size}, "resample": 2, "do_rescale": True}
    processor |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**processor, "image_processor_type": "ViTImageProcessor"})
    )
    return model


def test_eval_of_a_published_checkpoint_uses_its_preprocessing(image_tree, tmp_path):
    published(tmp_path / "hf")
    config = shrink(config_of("imagenet"))
    config.model.dtype = "float32"
    config.data.path, config.init = str(image_tree), str(tmp_path / "hf")
    config.reduce.name, config.reduce.r = "tome", 3
    task = tasks.make(config, tmp_path / "run", "")
    batch = next(iter(task.test_loader()))
    paths = sorted((image_tree / "val").glob("*/*.jpg"), key=lambda p: (p.parent.name, p.name))
    expected = task.initial.preprocess([Image.open(path) for path in paths[:8]])
    np.testing.assert_allclose(batch["image"], expected, atol=1e-5)
    task.run("eval")
    rows = report.read_jsonl(tmp_path / "run" / "results.jsonl")
    assert [row["setting"] for row in rows] == ["", "r=3"]
    assert rows[1]["macs"] < rows[0]["macs"]


def test_a_checkpoint_is_evaluated_at_its_own_size_and_precision(image_tree, tmp_path):
    """Whatever the config says of a model from scratch; another size must be asked for."""
    published(tmp_path / "hf", size=40)
    config = shrink(config_of("imagenet"))
    config.model.dtype = "bfloat16"
    config.data.path, config.init = str(image_tree), str(tmp_path / "hf")
    assert tuple(config.data.image_size) != (40, 40)
    task = tasks.make(config, tmp_path / "run", "")
    assert (task.initial.config.image_size, task.initial.config.dtype) == ((40, 40), "float32")
    for train in (False, True):
        assert next(iter(task.loader("train", train=train)))["image"].shape[1:] == (40, 40, 3)
    config.init_image_size, config.init_dtype = (24, 32), "bfloat16"
    task = tasks.make(config, tmp_path / "run", "")
    assert (task.initial.config.image_size, task.initial.config.dtype) == ((24, 32), "bfloat16")
    assert next(iter(task.test_loader()))["image"].shape[1:] == (24, 32, 3)


def test_a_checkpoint_with_other_classes_gets_new_heads_only_in_training(image_tree, tmp_path):
    start = published(tmp_path / "hf", classes=2)
    config = shrink(config_of("imagenet"))
    config.model.dtype = "float32"
    config.data.path, config.init = str(image_tree), str(tmp_path / "hf")
    with pytest.raises(UserError, match="3 classes, the model 2"):
        tasks.make(config, tmp_path / "run", "").run("eval")
    published(tmp_path / "wide", classes=4)
    config.init = str(tmp_path / "wide")
    with pytest.raises(UserError, match="the test data have 3 classes, the model 4 classes: the labels are not the"):
        tasks.make(config, tmp_path / "run", "").run("eval")
    tuned = with_classes(api.reduce(start, "tome", r=2), 3)
    assert tuned.methods == api.reduce(start, "tome", r=2).methods
    assert tuned.params["model"]["head"]["kernel"].shape == (32, 3)
    for part in ("blocks", "cls_token", "patch_embed"):
        jax.tree.map(np.testing.assert_array_equal, tuned.params["model"][part], start.params["model"][part])


def test_training_and_test_data_have_the_same_classes(tmp_path):
    for split, classes in (("train", 2), ("test", 3)):
        files = [io.BytesIO() for _ in range(9)]
        for i, file in enumerate(files):
            picture(i % classes, i).save(file, "JPEG")
        table = {"img": [file.getvalue() for file in files], "label": [i % classes for i in range(9)]}
        pq.write_table(pa.table(table), tmp_path / f"{split}.parquet")
    config = shrink(config_of("cifar10"))
    config.data.path = str(tmp_path)
    with pytest.raises(UserError, match="the training data have 2 classes, the test data 3"):
        tasks.make(config, tmp_path / "run", "").run("train")


def test_bench_without_a_model_says_random(tmp_path, capsys):
    config = config_of("bench_vit")
    shrink(config)
    config.bench.batch_sizes, config.bench.repeats, config.bench.seconds = (2,), 1, 0.0
    config.bench.methods = config.bench.methods[:1]
    config.bench.methods[0]["settings"]["r"] = 3
    tasks.make(config, tmp_path / "run", "").run("bench")
    assert "random weights" in capsys.readouterr().out
    rows = report.read_jsonl(tmp_path / "run" / "results.jsonl")
    assert [row["weights"] for row in rows] == ["random", "random"]
    assert rows[0]["speedup"] == 1.0 and rows[0]["peak_mb"] > 0
    assert rows[1]["speedup_by_macs"] == rows[1]["speedup"] * rows[1]["macs_relative"] and 0 < rows[1]["overhead"] < 1


def test_bench_at_one_cost(tmp_path, capsys):
    config = config_of("bench_vit", "half")
    shrink(config)
    of_images = {name for name, entry in reducers.REGISTRY.items() if not entry.text}
    assert {method["name"] for method in config.bench.methods} == of_images - {"a_clip", "diffrate_search"}
    config.bench.batch_sizes, config.bench.repeats, config.bench.seconds = (2,), 1, 0.0
    config.bench.methods = [m for m in config.bench.methods if m["name"] in ("topk", "sinkhorn")]
    config.bench.macs = 0.6
    tasks.make(config, tmp_path / "run", "").run("bench")
    rows = {row["method"]: row for row in report.read_jsonl(tmp_path / "run" / "results.jsonl")}
    assert set(rows) == {"unreduced", "topk", "sinkhorn"}
    assert all(rows[name]["macs_relative"] == pytest.approx(0.6, abs=0.02) for name in ("topk", "sinkhorn"))
    config.bench.macs = 0.01
    tasks.make(config, tmp_path / "far", "").run("bench")
    rows = report.read_jsonl(tmp_path / "far" / "results.jsonl")
    assert [row["method"] for row in rows if "unreachable" in row] == ["topk", "sinkhorn"]
    assert "not reachable: reaches 0." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ti/16", "s/16", "b/16", "l/16", "h/14"])
def test_presets_have_their_sizes(name):
    config = config_of("bench_vit", name)
    shape = preset(config.model.preset, num_classes=1000)
    parameters = {"ti/16": 5.7, "s/16": 22.1, "b/16": 86.6, "l/16": 304.3, "h/14": 632.0}
    millions = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(shape))) / 1e6
    assert millions == pytest.approx(parameters[name], abs=0.06)
