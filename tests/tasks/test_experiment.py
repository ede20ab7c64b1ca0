"""What all tasks share: any pooling under a class head, two-tower checkpoints, results that are not mixed up."""

import importlib
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

import tokjax
from tokjax import api, tasks
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.tasks import experiment
from tokjax.tasks.classify import with_classes

CONFIGS = Path(__file__).parents[2] / "configs"
POOLINGS = {
    "map": {"pooling": "map", "class_token": False},
    "mean": {"pooling": "mean", "class_token": False, "fc_norm": True},
}


def config_of(**model):
    """The digits experiment on a model for a test."""
    spec = importlib.util.spec_from_file_location("digits", CONFIGS / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("short")
    config.model.update({"patch_size": 8, "width": 32, "depth": 1, "heads": 2, **model})
    config.data.subset, config.data.test_subset = 64, 30
    config.batch_size, config.eval_batch_size = 16, 16
    config.train.total_steps, config.train.eval_every, config.train.optimiser.warmup_steps = 3, 0, 1
    config.sweep.repeats, config.sweep.seconds = 1, 0.0
    return config


def rows_of(workdir, mode):
    return [row for row in report.read_jsonl(workdir / "results.jsonl") if row["mode"] == mode]


@pytest.mark.parametrize("name", POOLINGS)
def test_a_class_head_stands_on_any_pooling(name, tmp_path):
    config = config_of(**POOLINGS[name])
    config.reduce.name, config.reduce.r = "tome", 3
    task = tasks.make(config, tmp_path, "")
    task.run("train")
    task.run("eval")
    model = api.load(tmp_path)
    assert model.config.pooling == name and model.config.num_classes == 10 and model.methods
    base, reduced = rows_of(tmp_path, "eval")
    assert base["images"] == reduced["images"] == 30 and reduced["macs"] < base["macs"]


def test_the_image_encoder_of_two_towers_gets_classes(tmp_path):
    """CLIP's image encoder: its projection makes way for a head with a bias; the text encoder stays behind."""
    vision = ViTConfig(
        (32, 32), 8, width=32, depth=1, heads=2, num_classes=16, head_bias=False, pre_norm=True, patch_bias=False,
        gelu="quick", norm_eps=1e-5,
    )  # fmt: skip
    text = TextConfig(vocab_size=50, length=8, width=32, depth=1, heads=2, embed_dim=16)
    dual = api.build(DualConfig(vision, text))
    tokjax.save(dual, tmp_path / "clip")
    config = config_of()
    config.init = str(tmp_path / "clip")
    task = tasks.make(config, tmp_path / "run", "")
    assert isinstance(task.fresh(), api.Model)
    with pytest.raises(UserError, match="projection"):
        task.run("eval")
    start = with_classes(task.fresh(), 10)
    assert set(start.params["model"]["head"]) == {"kernel", "bias"}
    jax.tree.map(np.testing.assert_array_equal, start.params["model"]["blocks"], dual.vision.params["model"]["blocks"])
    task.run("train")
    task.run("eval")
    assert api.load(tmp_path / "run").config.num_classes == 10


def test_weights_are_hashed_once(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(experiment, "fingerprint", lambda model: hashed.append(model) or f"weights {len(hashed)}")
    task = tasks.make(config_of(), tmp_path, "")
    model = api.build(ViTConfig((32, 32), 8, width=16, depth=1, heads=2))
    other = model.with_params(jax.tree.map(lambda leaf: leaf + 1, model.params))
    for each, name in ((model, "a"), (model.unreduced, "a"), (api.reduce(model, "tome", r=1).unreduced, "b")):
        task.once(name, each, dict)
    assert hashed == [model]
    assert task.once("a", other, list) == [] and task.once("a", other, dict) == [] and len(hashed) == 2


def test_all_modes_of_the_command_line_belong_to_a_task():
    config = config_of()
    with pytest.raises(UserError, match="mode='features': must be one of all, train, eval, sweep, bench, viz"):
        tasks.make(config, Path("nowhere"), "").run("features")
    modes = {mode for task in tasks.TASKS for mode in _class(task).modes}
    assert modes | {"all"} == set(tasks.MODES)


def _class(task):
    module, name = tasks.TASKS[task]
    return getattr(importlib.import_module(f"tokjax.tasks.{module}"), name)
