"""k-NN on frozen features: the numbers, the files, and that nothing is trained."""

import importlib.util
from pathlib import Path
import shutil

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tokjax import api, tasks
from tokjax.bench import report
from tokjax.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "features_digits.py"


def config_of(**changes):
    """The config's short form on a model for a test."""
    spec = importlib.util.spec_from_file_location("features_digits", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("short")
    config.model.update({"patch_size": 8, "width": 32, "depth": 2, "heads": 2})
    config.data.subset, config.data.test_subset = 100, 50
    config.eval_batch_size = 32  # neither split is whole batches of it
    config.train.total_steps, config.train.eval_every, config.train.optimiser.warmup_steps = 4, 0, 1
    config.sweep.methods = (config.sweep.methods[0], config.sweep.methods[4])
    config.sweep.repeats, config.sweep.seconds, config.viz.images = 1, 0.0, 1
    config.bench.batch_sizes, config.bench.repeats, config.bench.seconds = (2,), 1, 0.0
    config.bench.methods = ()
    config.update(changes)
    return config


def rows_of(workdir, mode):
    return [row for row in report.read_jsonl(workdir / "results.jsonl") if row["mode"] == mode]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("features")
    tasks.make(config_of(), workdir, "python -m tokjax.main").run("all")
    return workdir


def test_rows(finished):
    base, *rows = rows_of(finished, "sweep")
    assert (base["similarity"], base["images"]) == (pytest.approx(1), 50)
    assert [row["method"] for row in rows] == ["ToMe", "average pooling"]
    for row in rows:
        assert 0 < row["knn_accuracy"] < 1 and 0.5 < row["similarity"] < 1 and row["images"] == 50
        assert abs(row["macs_relative"] - 0.7) < 0.1
    page = (finished / "report.html").read_text()
    assert "k-NN accuracy" in page and not list(finished.rglob("*.part"))
    assert (finished / "pictures" / "pareto.png").is_file()


def test_files_hold_every_example_once(finished):
    model = api.load(finished)
    for split, count in (("train", 100), ("test", 50)):
        loader = tasks.make(config_of(), finished, "").evaluation_loader(split)
        with np.load(finished / f"features_{split}.npz", allow_pickle=False) as file:
            features, labels, ids = file["features"], file["labels"], file["ids"]
        assert features.shape == (count, 32) and features.dtype == np.float32
        np.testing.assert_array_equal(labels, loader.source.labels)
        assert ids.tolist() == [loader.source.name_of(i) for i in range(count)] and len(set(ids)) == count
        last = list(loader)[-1]
        pooled = model.forward(model.params, jnp.asarray(last["image"])).pooled
        rest = count % 32
        np.testing.assert_allclose(features[-rest:], pooled[:rest], atol=1e-5)


def test_accuracy_is_scikit_learns(finished):
    splits = {split: np.load(finished / f"features_{split}.npz") for split in ("train", "test")}
    k, temperature = 20, 0.07
    neighbours = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    neighbours.fit(splits["train"]["features"], splits["train"]["labels"])
    expected = neighbours.score(splits["test"]["features"], splits["test"]["labels"])
    assert rows_of(finished, "sweep")[0]["knn_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_another_bank_is_another_row(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    tasks.make(config_of(), workdir, "").run("sweep")
    assert len(rows_of(workdir, "sweep")) == 3  # nothing twice
    config = config_of()
    config.knn.bank = "reduced"
    tasks.make(config, workdir, "").run("sweep")
    rows = rows_of(workdir, "sweep")
    assert len(rows) == 6 and "bank=reduced" in rows[-1]["knn"]
    assert rows[3]["knn_accuracy"] == rows[0]["knn_accuracy"]
    assert rows[5]["similarity"] == pytest.approx(rows[2]["similarity"], abs=1e-6)
    config.knn.bank = "both"
    with pytest.raises(UserError, match=r"knn.bank='both': must be one of unreduced, reduced"):
        tasks.make(config, workdir, "").run("sweep")


def test_frozen_checkpoint_on_images_of_which_one_is_broken(finished, tmp_path):
    for split, count in (("train", 6), ("val", 3)):
        for label in range(3):
            folder = tmp_path / "tree" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng(10 * label + i).integers(0, 60, (40, 40, 3))
                noise[..., label] += 150
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "tree" / "val" / "class0" / "1.png").write_bytes(b"not an image")
    config = config_of(init=str(finished))
    config.data.source, config.data.path, config.data.bad_image_limit = "imagefolder", str(tmp_path / "tree"), 5
    config.data.subset = config.data.test_subset = None
    config.reduce.name, config.reduce.r = "tome", 3
    workdir = tmp_path / "run"
    task = tasks.make(config, workdir, "")
    task.run("eval")
    assert [(row["setting"], row["images"]) for row in rows_of(workdir, "eval")] == [("", 8), ("r=3", 8)]
    assert rows_of(workdir, "eval")[0]["knn_accuracy"] == 1.0  # by colour alone
    task.run("features")
    with np.load(workdir / "features_test.npz") as file:
        assert [Path(name).name for name in file["ids"][:3]] == ["0.png", "2.png", "0.png"]
        reduced = file["features"]
    model = api.reduce(api.load(finished), "tome", r=3)
    images = jnp.asarray(next(iter(task.test_loader()))["image"])
    np.testing.assert_allclose(reduced[0], model.forward(model.params, images).pooled[0], atol=1e-5)
    assert "train" not in task.steps and not (workdir / "model").exists()
    with pytest.raises(UserError, match="is a frozen encoder"):
        task.run("train")
