"""A-CLIP from training to a plain model; going on after an interruption; the heads beside it."""

import json
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import a_clip as recipe
import tokjax
from tokjax import tasks
from tokjax.bench import flops
from tokjax.errors import UserError
from tokjax.models.projector import BatchNorm, Projector
from tokjax.tasks.a_clip import bounded
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.config import TrainConfig
from tokjax.train.optimisers import make_optimiser
from tokjax.train.state import Teacher, TrainState


def small():
    config = recipe.get_config("short")
    config.model.update({"width": 16, "depth": 1, "heads": 2, "patch_size": 12})
    config.text.update({"width": 16, "depth": 1, "heads": 2})
    config.embed_dim, config.batch_size = 8, 16
    config.a_clip.hidden, config.a_clip.embedding, config.a_clip.jitter = 16, 8, 0.5
    config.a_clip.simclr_weight, config.a_clip.byol_weight, config.a_clip.whole_steps = 1.0, 2.0, 0
    config.train.total_steps, config.train.eval_every, config.train.checkpoint_every = 4, 0, 2
    config.train.log_every, config.train.keep_best = 1, False
    return config


def task_of(config, workdir):
    return tasks.make(config, workdir, "a test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("a_clip")
    task_of(small(), workdir).run("train")
    return workdir


def state_of(workdir):
    config = small()
    task = task_of(config, workdir)
    parameters = task.parameters(task.fresh())
    settings = TrainConfig.of(config.train)
    frozen = {"frozen": ("vision/model/patch_embed/.*",)}
    optimiser = make_optimiser({**config.train.optimiser, **frozen}, settings.total_steps, parameters)
    follow = Teacher(lambda p: {"vision": p["model"]["vision"]["model"], "projector": p["heads"]["projector"]}, 0.9, 4)
    target = jax.eval_shape(lambda p: TrainState.create(p, optimiser, jax.random.key(0), teacher=follow), parameters)
    return parameters, Checkpoints(workdir / "checkpoints").restore(target).state


def test_what_training_leaves(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 4
    for line in steps:
        total = line["train/clip"] + line["train/simclr"] + 2 * line["train/byol"]
        assert line["train/loss"] == pytest.approx(total, rel=1e-5)
        assert 1 <= line["train/scale"] <= 100.001
    model = tokjax.load(trained / "model")
    assert not model.methods and model.vision.token_counts() == (17,)
    start, state = state_of(trained)
    vision = state.params["model"]["vision"]["model"]
    for name, leaf in vision["patch_embed"].items():
        np.testing.assert_array_equal(leaf, start["model"]["vision"]["model"]["patch_embed"][name])
    for now, first, follows in (
        (vision, start["model"]["vision"]["model"], state.teacher["vision"]),
        (state.params["heads"]["projector"], start["heads"]["projector"], state.teacher["projector"]),
    ):
        here, there, between = (jax.tree.leaves(tree)[-1] for tree in (now, first, follows))
        assert 0 < np.abs(between - there).max() < np.abs(here - there).max()


def test_a_run_goes_on_exactly_with_its_teacher(trained, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(trained / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    task_of(small(), tmp_path).run("train")
    whole, again = (state_of(workdir)[1] for workdir in (trained, tmp_path))
    for part in ("params", "teacher"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, part), getattr(again, part))


def test_two_devices_train_as_one(trained, tmp_path):
    config = small()
    config.devices = 2
    task_of(config, tmp_path).run("train")

    def losses(workdir):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [line["train/loss"] for line in lines if "train/loss" in line]

    one, two = losses(trained), losses(tmp_path)
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)  # all pairs are contrasted, and normalised, over both
    np.testing.assert_allclose(two, one, rtol=1e-3)


def test_at_first_all_patches_stay(tmp_path, monkeypatch):
    config, given = small(), {}
    config.a_clip.whole_steps = 3
    task = task_of(config, tmp_path)
    monkeypatch.setattr(task, "fit", lambda *args, teacher, **rest: given.update(args=args, teacher=teacher))
    task.train()
    (first, whole), (then, masked) = given["args"][2]
    assert (first, then) == (0, 3)
    model, batch = given["args"][0], next(iter(task.loader("train", train=True)))
    params = task.parameters(model)

    def cost(loss):
        def value(params, batch):
            return loss(params, batch, jax.random.key(0), given["teacher"].of(params))[0]

        arrays = {name: jnp.asarray(batch[name]) for name in ("image", "ids", "valid", "boxes")}
        return flops.count(value, params, arrays).total

    saved = cost(whole) - cost(masked)
    views, tokens_gone, width = 2 * config.batch_size, 16 - 4 * 3, 16  # three of the four super-patches stay
    assert saved > views * tokens_gone * 12 * width**2


def test_evaluation_is_that_of_retrieval(trained):
    task = task_of(small(), trained)
    row = task.evaluate(task.model(), "x")
    assert row["images"] == 64 and 0 <= row["image_to_text@1"] <= row["image_to_text@10"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "siglip"}, "config.loss='siglip': must be clip"),
        ({"a_clip.byol_weight": -1.0}, "byol_weight=-1.0: must be at least 0"),
        ({"a_clip.temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"a_clip.whole_steps": -1}, "whole_steps=-1: must be at least 0"),
        ({"a_clip.keep_rate": 2.0}, "keep_rate=2.0"),
        ({"a_clip.grey": 2.0}, "grey must be between 0 and 1"),
        ({"a_clip.momentum": 2.0}, "momentum is 2.0"),
        ({"a_clip.hidden": 0}, r"widths=\(16, 0, 0, 8\)"),
    ],
)
def test_bad_config(tmp_path, change, message):
    config = small()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        task_of(config, tmp_path).run("train")


@pytest.mark.parametrize("arg", [None, "small", "scenes", "plain"])
def test_every_variant_is_a_config(arg, tmp_path):
    config = recipe.get_config(arg)
    assert TrainConfig.of(config.train).total_steps > 0
    task_of(config, tmp_path)


def test_the_temperature_stays_in_its_range():
    for given, kept in ((-1.0, 0.0), (2.0, 2.0), (9.0, np.log(100))):
        tree = {"model": {"logit_scale": jnp.float32(given), "other": 1}, "heads": {}}
        assert bounded(tree)["model"]["logit_scale"] == pytest.approx(kept)


def test_heads_normalise_over_the_valid_rows():
    rng = np.random.default_rng(0)
    x, valid = rng.normal(size=(6, 4)).astype(np.float32) * 3 + 1, np.array([1, 1, 0, 1, 1, 0], bool)
    out = np.asarray(BatchNorm(4)(jnp.asarray(x), jnp.asarray(valid)))
    np.testing.assert_allclose(out[valid].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(out[valid].std(0), 1, rtol=1e-4)
    head = Projector((4, 8, 8, 3), bias=True, rngs=nnx.Rngs(0))
    broken = np.where(valid[:, None], x, np.nan)
    whole, alone = head(jnp.asarray(broken), jnp.asarray(valid)), head(jnp.asarray(x[valid]), jnp.ones(4, bool))
    np.testing.assert_allclose(np.asarray(whole)[valid], alone, atol=1e-5)
