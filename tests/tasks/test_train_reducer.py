"""Training with a reducer on a few digits: what is trained, the terms of the loss, ramps, devices, restarts."""

import dataclasses
import functools
import json
from pathlib import Path
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import api, reducers, tasks
from tokjax.errors import UserError
from tokjax.hooks import Hook
from tokjax.tasks.experiment import model_config
from tokjax.tasks.train_reducer import TrainReducer, default_config, kept_tokens, mean, told_numbers
from tokjax.token_map import Plan
from tokjax.train import optimisers
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.metrics import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = {"patch_size": 8, "width": 16, "depth": 1, "heads": 2}


def config_of(name="tome", **settings):
    config = default_config()
    config.batch_size, config.eval_batch_size = 16, 16
    config.model = model_config(**TINY)
    config.data.image_size, config.data.subset, config.data.test_subset = (32, 32), 64, 16
    config.data.augment.crop = "none"
    config.train.total_steps, config.train.log_every, config.train.checkpoint_every = 4, 1, 2
    config.train.keep_last, config.train.optimiser.lr = 5, 1e-2
    config.reduce.name = name
    for field, value in settings.items():
        config.reduce[field] = value
    return config


def trained(config, workdir):
    """The training's own loss at every step, and the parameters at its end."""
    task = tasks.make(config, workdir, "")
    task.run("train")
    return curve(workdir), Checkpoints(workdir / "checkpoints").restore_params(task.parameters(task.fresh()), "latest")


def curve(workdir):
    return [
        {k: v for k, v in row.items() if "images_per_s" not in k} for row in read_metrics(workdir / "metrics.jsonl")
    ]


def losses(rows):
    return np.array([row["train/loss"] for row in rows if "train/loss" in row])


def changed(before, after):
    return jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), before, after)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint to start from; its head is not zero, so that all parts learn from the first step on."""
    folder = tmp_path_factory.mktemp("start")
    model = tasks.make(config_of(), folder, "").build()
    rng = np.random.default_rng(0)
    model = model.with_params(jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape), model.params))
    api.save(model, folder)
    return folder


def learning_config(start):
    """A reducer that learns by masks, draws, and distils from the start; the network and its head are frozen."""
    config = config_of("dynamicvit", keep_rate=0.5, layers=(0,))
    config.init = str(start)
    config.learn.network = config.learn.head = False
    config.learn.logits.weight = config.learn.tokens.weight = 0.5
    return config


@pytest.fixture(scope="module")
def learned(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("learned")
    return workdir, *trained(learning_config(start), workdir)


@pytest.fixture
def unscored(monkeypatch):
    """Trains without the program that evaluates, where only the training counts."""
    monkeypatch.setattr(TrainReducer, "evaluation", lambda task, model: lambda params: {"accuracy": 0.0})


# What is learned


def test_only_the_reducer_learns_in_a_frozen_network(learned, start):
    _, _, params = learned
    before = tasks.make(learning_config(start), start, "").fresh().params
    moved = changed(before, {name: params[name] for name in before})
    assert not any(jax.tree.leaves(moved["model"]))
    assert sum(jax.tree.leaves(moved["reducers"])) > len(jax.tree.leaves(moved["reducers"])) / 2
    assert not any(jax.tree.leaves(changed(before["model"], params["teacher"])))


def test_every_term_is_reported_and_they_add_up(learned):
    _, rows, _ = learned
    for row in [row for row in rows if "train/loss" in row]:
        terms = {k.removeprefix("train/loss/"): v for k, v in row.items() if k.startswith("train/loss/")}
        assert terms.keys() >= {"cross_entropy", "distillation", "token_distillation"}
        assert min(terms.values()) > 0
        np.testing.assert_allclose(sum(terms.values()), row["train/loss"], rtol=1e-5)


def test_what_is_saved_prunes(learned):
    workdir, _, params = learned
    model = api.load(workdir)
    assert model.token_counts() == (9,)
    assert not any(jax.tree.leaves(changed(model.params["reducers"], params["reducers"])))
    assert model.methods[0].settings == {"keep_rate": 0.5, "layers": [0]}


def test_a_finished_run_is_evaluated_with_what_it_learned(learned, start, capsys):
    workdir, _, _ = learned
    tasks.make(learning_config(start), workdir, "").run("eval")
    assert "dynamicvit" in capsys.readouterr().out.lower()


def test_other_settings_keep_what_was_learned(learned, start):
    workdir, _, params = learned
    config = learning_config(start)
    config.reduce.keep_rate = 0.25
    model = tasks.make(config, workdir, "").model()
    assert model.token_counts() == (5,)
    assert not any(jax.tree.leaves(changed(model.params["reducers"], params["reducers"])))
    config.reduce.layers = ()
    with pytest.raises(UserError, match="gives dynamicvit other parameters than it was trained with"):
        tasks.make(config, workdir, "").model()


def test_a_restart_repeats_the_numbers(learned, start, tmp_path):
    """From the checkpoint of step 2: parameters, moments, the teacher's copy, the key and the place in the data."""
    workdir, rows, params = learned
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "checkpoints" / str(step), ignore_errors=True)
    again, same = trained(learning_config(start), tmp_path)
    assert [row for row in again if row["step"] > 2] == [row for row in rows if row["step"] > 2]
    assert not any(jax.tree.leaves(changed(params, same)))


def test_learning_rates_by_part(tmp_path):
    config = config_of("dynamicvit", keep_rate=0.5, layers=(0,))
    config.learn.network_lr_scale = 0.01
    task = tasks.make(config, tmp_path, "")
    model = task.fresh()
    factors = optimisers.scales({"scales": task.scales(model)}, model.params)
    assert {*jax.tree.leaves(factors["model"])} == {0.01} and {*jax.tree.leaves(factors["reducers"])} == {1.0}


def test_the_same_on_several_devices_as_on_one(learned, start, tmp_path, unscored):
    """Two rows a device; what a row draws does not depend on where it is."""
    config = learning_config(start)
    config.devices = 8
    split, params = trained(config, tmp_path / "devices")
    np.testing.assert_allclose(losses(split), losses(learned[1]), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, learned[2])


def test_accumulated_parts_are_one_batch(start, tmp_path, unscored):
    config = config_of("tome", r=3)
    config.init, config.train.total_steps = str(start), 2
    whole, _ = trained(config, tmp_path / "whole")
    config.train.optimiser.accumulate = 2
    parts, _ = trained(config, tmp_path / "parts")
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)


def test_a_model_in_bf16_has_float32_masters(start, tmp_path, unscored):
    config = config_of("tome", r=3)
    config.init, config.init_dtype, config.train.total_steps = str(start), "bfloat16", 2
    rows, params = trained(config, tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert np.isfinite(losses(rows)).all()
    before = tasks.make(config, tmp_path, "").fresh().params
    small = [
        np.abs(np.asarray(a) - np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (before, params)), strict=True)
    ]
    assert max(x.max() for x in small) > 0


# Ramps


def test_the_stages_of_a_ramp(tmp_path):
    def stages(**fields):
        config = config_of()
        config.train.total_steps = 100
        config.ramp.update(fields)
        return tasks.make(config, tmp_path, "").ramp()

    assert stages() == [(0, None)]
    assert stages(knob=(1, 3)) == [(0, 3)]
    assert stages(start=10, steps=30, knob=(0, 1, 2, 3)) == [(0, 0), (10, 1), (20, 2), (30, 3)]
    assert stages(start=10, steps=2, knob=(0, 1, 2, 3)) == [(0, 0), (10, 2), (11, 3)]
    with pytest.raises(UserError, match="start=10, steps=91: must be at least 0 and end in 100 steps"):
        stages(start=10, steps=91, knob=(0, 1))


def test_a_ramp_lowers_the_knob_and_goes_on_inside(start, tmp_path, unscored):
    config = config_of("evit", layers=(0,))
    config.init = str(start)
    config.ramp.update(start=1, steps=1, knob=(1.0, 0.5))
    task = tasks.make(config, tmp_path / "whole", "")
    model = task.fresh()
    assert [(first, task.stage(model, rate).token_counts()) for first, rate in task.ramp()] == [(0, (17,)), (1, (10,))]
    rows, params = trained(config, tmp_path / "whole")
    assert task.model().methods[0].settings["keep_rate"] == 0.5
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    again, same = trained(config, tmp_path / "again")
    assert [row for row in again if row["step"] > 2] == [row for row in rows if row["step"] > 2]
    assert not any(jax.tree.leaves(changed(params, same)))


# Knobs, and what is refused


def test_the_knob_is_turned_to_a_share_of_the_macs(tmp_path):
    config = config_of("tome")
    config.learn.macs = 0.9
    model = tasks.make(config, tmp_path, "").fresh()
    assert abs(model.cost().total / model.unreduced.cost().total - 0.9) < 0.05
    config.learn.macs = 0.1
    with pytest.raises(UserError, match=r"config.learn.macs=0.1: tome reaches 0"):
        tasks.make(config, tmp_path, "").fresh()


@dataclasses.dataclass(frozen=True)
class Forgetful:
    """Says that it adds terms to the loss, and leaves one out."""

    broken: bool = False

    def hooks(self, info):
        return [Hook("after_attention", 0, self)]

    def plan(self, tokens, signals):
        rows = jnp.mean(tokens.x.astype(jnp.float32) ** 2, (1, 2))
        aux = {"loss/rows": rows} if self.broken else {"loss/rows": rows, "loss/rate": jnp.float32(0.25)}
        return Plan(aux=aux)


@pytest.fixture
def forgetful(monkeypatch):
    entry = dataclasses.replace(reducers.entry("tome"), make=Forgetful, losses=("rows", "rate"), neutral={}, example={})
    monkeypatch.setitem(reducers.REGISTRY, "forgetful", entry)


def test_a_promised_term_that_does_not_arrive(forgetful, start, tmp_path):
    config = config_of("forgetful", broken=True)
    config.init = str(start)
    with pytest.raises(UserError, match=r"forgetful has no loss term 'rate'.*there are rows"):
        tasks.make(config, tmp_path, "").run("train")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bad_steps_end_a_run_with_the_last_good_checkpoint(forgetful, start, tmp_path, monkeypatch, unscored):
    """From step 3 on the reducer's term is not finite; its terms, one a row and one a batch, are in the metrics."""
    config = config_of("forgetful")
    config.init, config.train.total_steps, config.train.max_bad_steps = str(start), 8, 2
    task = tasks.make(config, tmp_path, "")
    good, stages = task.loss, []

    def loss(model):
        stages.append(model)
        own = good(model)
        return own if len(stages) == 1 else lambda *args: (own(*args)[0] * jnp.nan, {})

    monkeypatch.setattr(task, "loss", loss)
    monkeypatch.setattr(task, "ramp", lambda: [(0, None), (2, None)])
    with pytest.raises(UserError, match=r"step 4: .* 2 times in a row \(max_bad_steps\).*checkpoints/2 is from before"):
        task.run("train")
    first = curve(tmp_path)[0]
    assert first["train/loss/rate"] == 0.25 and first["train/loss/rows"] > 0
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]


def test_what_is_refused(start, tmp_path):
    def refused(message, **fields):
        config = config_of("tome", r=2)
        config.init = str(start)
        for name, value in fields.items():
            config.update_from_flattened_dict({name.replace("__", "."): value})
        with pytest.raises(UserError, match=message):
            tasks.make(config, tmp_path, "").run("train")

    refused("reduce.name is empty", reduce__name="", reduce__r=None)
    refused("leaves nothing to train", learn__network=False, learn__head=False)
    refused("config.init is empty: learn.logits", init="", learn__logits__weight=1.0)
    refused("learn.logits.temperature is 0.0; it must be above 0", learn__logits__temperature=0.0)
    refused("sets r, which nothing else may set", ramp__knob=(0, 1))
    refused("sets r, which nothing else may set", ramp__knob=(0, 2), learn__macs=0.5)
    refused("with keep_rate=1.0 dynamicvit has other parameters", reduce__name="dynamicvit", reduce__r=None,
            ramp__start=1, ramp__knob=(1.0, 0.5))  # fmt: skip
    refused("devices=99", devices=99)


# The parts


def test_tokens_that_are_kept(start):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model = api.load(start)

    def traced(model):
        return jax.jit(functools.partial(model.forward, trace=True))(model.params, images)

    whole = traced(model)
    features, kept = kept_tokens(whole, 1)
    assert kept.all()
    np.testing.assert_array_equal(features, whole.features[:, 1:])
    pruned = api.reduce(model, "topk", keep_rate=0.5, layers=(0,))
    features, kept = kept_tokens(out := traced(pruned), 1)
    assert (kept.sum(1) == 8).all()
    np.testing.assert_array_equal(np.sort(features[kept].sum(-1)), np.sort(out.features[:, 1:].reshape(16, -1).sum(-1)))
    masked = api.reduce(model, "dynamicvit", keep_rate=0.5, layers=(0,), masked=True)
    out = traced(masked)
    _, kept = kept_tokens(out, 1)
    (aux,) = out.tokens.aux.values()
    np.testing.assert_array_equal(kept, aux["decision"] > 0.5)


def test_learned_rates_are_written_and_evaluated(start, tmp_path):
    config = config_of("diffrate_search", protected=())
    config.init, config.learn.macs = str(start), 0.9  # the target of its training, which nothing solves for before
    task = tasks.make(config, tmp_path, "")
    assert task.fresh().methods[0].settings == {"protected": (), "target": 0.9}
    task.write_tables(task.fresh())
    kept = json.loads((tmp_path / "rates.json").read_text())["merge_kept"]
    model = task.model()  # with fixed counts, at their real cost
    assert model.methods[0].name == "diffrate" and model.token_counts() == tuple(kept) != (17,)
    read = api.reduce(model.unreduced, "diffrate", rates=str(tmp_path / "rates.json"))
    assert read.cost() == model.cost()
    assert read.settled() is read


def test_what_reducers_note_of_themselves():
    aux = {
        "00.a": {"loss/x": jnp.float32(1), "macs": 3, "kept": jnp.array([5, 4])},
        "01.b": {"decision": jnp.ones((2, 3))},
    }
    told = told_numbers(aux)
    assert told == {"macs": 3, "kept/00": 5, "kept/01": 4} and told["macs"].dtype == jnp.float32


def test_terms_of_rows_count_valid_rows():
    valid = jnp.array([True, False, True])
    assert mean(jnp.array([1.0, jnp.nan, 2.0]), valid) == 1.5
    assert mean(jnp.float32(3), valid) == 3


def test_moving_statistics_are_written_on_several_devices(start, tmp_path):
    config = config_of("clca", layers=(0,), cache=False)
    config.init, config.devices, config.train.total_steps = str(start), 2, 2
    _, params = trained(config, tmp_path)
    head = params["reducers"][0]["head"]
    for norm in ("norm1", "norm2"):
        assert np.isfinite(head[norm]["var"]).all()
        assert (np.asarray(head[norm]["mean"]) != 0).all() and (np.asarray(head[norm]["var"]) != 1).all()


@pytest.mark.parametrize("name", ["clca", "dynamicvit"])
def test_configs_of_learned_methods(name, tmp_path):
    get_config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]
    for arg in (None, "cifar10", "digits"):
        config = get_config(arg)
        assert config.reduce.name == name and (config.learn.tokens.weight > 0) == (name == "dynamicvit")
    config = get_config("digits" if name == "clca" else "digits-scratch")
    model = tasks.make(config, tmp_path, "").fresh()
    assert model.methods[0].name == name and config.learn.tokens.weight == 0
    assert model.config.num_classes == (4 if name == "clca" else 10)
