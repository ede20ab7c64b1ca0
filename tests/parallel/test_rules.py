"""Rules of sharding: what they cover, what they refuse, and models that give the same numbers on any mesh."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np
import optax
import pytest
import tiny_decoder

import tokjax
from tokjax import api, parallel
from tokjax.errors import UserError
from tokjax.models.bert import BertConfig
from tokjax.models.dual import DualConfig
from tokjax.models.t5 import Seq2Seq, T5Config
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.parallel import Rule
from tokjax.tasks import byte_lm, classify, train_reducer
from tokjax.tasks.byte_lm import ByteLM
from tokjax.tasks.classify import Classify
from tokjax.tasks.train_reducer import TrainReducer
from tokjax.train.state import TrainState

MESHES = ({"data": 8}, {"data": 4, "model": 2}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2})
VIT = ViTConfig(image_size=(16, 16), patch_size=4, width=16, depth=2, heads=2, num_classes=3, mlp_ratio=2)
TEXT = TextConfig(vocab_size=32, length=8, width=16, depth=1, heads=2, embed_dim=16)
T5 = T5Config(
    vocab_size=264, length=12, decoder_length=4, width=16, hidden=24, heads=2, head_width=4, depth=2, decoder_depth=1
)
DECODER = dataclasses.replace(tiny_decoder.TINY, width=16, hidden=32, heads=4, kv_heads=2, head_width=8, depth=2)


@functools.cache
def mesh(number=3):
    return parallel.make_mesh(MESHES[number])


def shapes(config):
    """Parameters of a model, as shapes."""
    module = api.MODULES[type(config)]
    return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(module(config, rngs=nnx.Rngs(0)))))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ('{"data": -1, "fsdp": 2, "model": 2}', (2, 2, 2)),
        ({"fsdp": 4, "data": -1}, (2, 4, 1)),
        ("fsdp", (1, 8, 1)),
        ('{"data": 3}', (3, 1, 1)),
        ({"data": 1}, None),
    ],
)
def test_shapes_of_meshes(shape, sizes):
    found = parallel.make_mesh(shape)
    assert (None if found is None else found.devices.shape) == sizes


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("rows", r"mesh='rows': must be one of data, fsdp, model, or sizes such as \{"),
        ('{"data": 2, "pipe": 4}', "has pipe=4; must be"),
        ({"data": 0}, "has data=0"),
        ({"data": -1, "fsdp": -1}, "only one size may be -1"),
        ({"data": -1, "model": 3}, "does not divide the 8 devices"),
        ({"data": 16}, "does not divide the 8 devices"),
    ],
)
def test_shapes_that_are_no_mesh(shape, told):
    with pytest.raises(UserError, match=told):
        parallel.make_mesh(shape)


@pytest.mark.parametrize(
    "config",
    [
        VIT,
        dataclasses.replace(VIT, distilled=True, registers=4, layer_scale=0.1, qk_norm=True, mlp="swiglu", scan=True),
        dataclasses.replace(VIT, pooling="map", class_token=False, position="naflex"),
        dataclasses.replace(VIT, position="rope", key_bias=False, pre_norm=True, fc_norm=True, pooling="mean"),
        TEXT,
        BertConfig(vocab_size=32, length=8, max_length=8, width=16, depth=1, heads=2, num_classes=3),
        dataclasses.replace(T5, tied=True),
        T5,
        DECODER,
        dataclasses.replace(tiny_decoder.GEMMA2, width=16, hidden=32, head_width=8, scan=True),
        dataclasses.replace(
            DECODER, position="learned", embed_width=8, qkv_bias=True, proj_bias=True, mlp_bias=True, kv_layers=1
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_defaults_cover_every_family(config):
    """Every kernel is split over fsdp, everything else but heads and hidden channels is whole."""
    found = parallel.specs(mesh(), shapes(config))
    for path, spec in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kernel = name.endswith("kernel") or name in ("embedding", "token_embed", "positions")
        assert ("fsdp" in spec) == kernel, name
        model = any(end in name for end in ("/proj/kernel", "fc1", "fc2/kernel")) or "/q/" in name
        assert ("model" in spec) == model, name


def test_rules_go_before_the_defaults():
    rules = (Rule("blocks/0/mlp/fc1/kernel", (None, ("fsdp", "model"))), Rule("head/.*"))
    found = parallel.specs(mesh(), shapes(VIT), rules)
    assert found["blocks"][0]["mlp"]["fc1"]["kernel"] == P(None, ("fsdp", "model"))
    assert found["blocks"][1]["mlp"]["fc1"]["kernel"] == P("fsdp", "model")
    assert found["head"]["kernel"] == P(None, None)
    stacked = parallel.specs(mesh(), shapes(dataclasses.replace(VIT, scan=True)))
    assert stacked["blocks"]["mlp"]["fc2"]["kernel"] == P(None, "model", "fsdp")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ((Rule("blocks/9/.*"),), "'blocks/9/.*': it is the path of no parameter; the paths are blocks/0/attn"),
        ((Rule(".*bias"), Rule("head/bias")), "'head/bias': earlier rules cover all that it matches"),
        ((Rule("head/("),), "not a regular expression"),
        ((Rule("head/bias", ("rows",)),), "must name each of data, fsdp, model once"),
        ((Rule("head/kernel", ("fsdp", "fsdp")),), "must name each of"),
        ((Rule("head/bias", ("fsdp",)),), r"head/bias of shape \(3,\): 3 does not divide over the 2 devices of 'fsdp'"),
        ((Rule("head/bias", ("fsdp", "model")),), r"head/bias of shape \(3,\): has fewer axes than its rule"),
    ],
)
def test_rules_that_do_not_fit(rules, told):
    with pytest.raises(UserError, match=told):
        parallel.specs(mesh(), shapes(VIT), rules)


def test_other_refusals():
    with pytest.raises(UserError, match=r"parameter new/table of shape \(4,\): no rule of sharding covers it"):
        parallel.specs(mesh(), {"new": {"table": jnp.zeros(4)}})
    odd = SimpleNamespace(config=DualConfig(dataclasses.replace(VIT, heads=1, num_classes=16), TEXT), params={})
    with pytest.raises(UserError, match="mesh has model=2: must divide the model's heads=1"):
        parallel.of_model(mesh(), odd)
    with pytest.raises(UserError, match="must be a pair of an expression and a tuple of axes"):
        parallel.parse(("head/bias",))
    assert parallel.parse([["head/bias", [["fsdp", "model"], None]]]) == (Rule("head/bias", (("fsdp", "model"), None)),)


def test_moments_lie_as_their_parameters():
    state = jax.eval_shape(lambda p: TrainState.create(p, optax.adamw(0.1), jax.random.key(0), ema=True), shapes(VIT))
    found = parallel.state_shardings(mesh(), state)
    kernel = found.params["blocks"][0]["mlp"]["fc1"]["kernel"]
    assert kernel.spec == P("fsdp", "model")
    for tree in (found.ema, found.opt_state[0].mu, found.opt_state[0].nu):
        assert tree["blocks"][0]["mlp"]["fc1"]["kernel"] == kernel
    assert found.step.is_fully_replicated and found.opt_state[0].count.is_fully_replicated


# The same numbers everywhere


def drawn(model):
    """Parameters that are not the small initial ones."""
    rng = np.random.default_rng(0)
    return model.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), model.params))


def task(make, number, **reduce):
    """A task's loss on a mesh is what trains."""
    config = make.default_config()
    config.update({"mesh": "" if number is None else json.dumps(MESHES[number])})
    with config.unlocked():
        config.reduce = ml_collections.ConfigDict(reduce)
    return config


def vit(number):
    """The forward pass of training, with keys that are not used."""
    model = drawn(tokjax.reduce(api.build(VIT), "tome", r=4))
    run = Classify(task(classify, number), Path(), "").by_rows(lambda p, x: model.forward(p, x).logits)
    return model, lambda params, images: (jax.nn.log_softmax(run(params, images))[:, 1].mean(), run(params, images))


def diffrate(number):
    """Training of its counts."""
    model = drawn(tokjax.reduce(api.build(VIT), "diffrate_search", target=0.9).learning())
    loss = TrainReducer(task(train_reducer, number, name="diffrate_search", target=0.9), Path(), "").loss(model)

    def run(params, images):
        labels = jnp.arange(len(images)) % 3
        return loss(params, {"image": images, "label": labels, "valid": labels < 2}, jax.random.key(0))

    return model, run


def mrt5(number, learning=True):
    """Soft in training, hard in evaluation, with texts of different lengths."""
    model = drawn(tokjax.reduce(api.build(T5), "mrt5", layer=0))
    made = ByteLM(task(byte_lm, number, name="mrt5", layer=0), Path(), "")
    if learning:
        loss = made.loss(model.learning())

        def run(params, inputs):
            batch = {"ids": inputs.ids, "decoder_ids": inputs.decoder_ids, "labels": inputs.decoder_ids}
            return loss(params, {**batch, "valid": jnp.ones(24, bool)}, jax.random.key(0), 2.0)

        return model.learning(), run
    forward = made.by_rows(lambda params, inputs: model.forward(params, inputs).logits)
    return model, lambda p, x: (jax.nn.log_softmax(forward(p, x))[..., 1].mean(), forward(p, x))


MODELS = {"tome": vit, "diffrate": diffrate, "mrt5 soft": mrt5, "mrt5 hard": functools.partial(mrt5, learning=False)}


@functools.cache
def on(name, number):
    """Loss, outputs and gradients of a batch of 24 rows."""
    where = None if number is None else mesh(number)
    model, loss = MODELS[name](number)
    rng = np.random.default_rng(1)
    if "mrt5" in name:
        ids = np.where(np.arange(12) < rng.integers(6, 13, (24, 1)), rng.integers(3, 259, (24, 12)), 0)
        inputs = Seq2Seq(ids.astype(np.int32), ids[:, :4].astype(np.int32))
    else:
        inputs = rng.normal(size=(24, 16, 16, 3)).astype(np.float32)
    program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    model = model if where is None else parallel.shard(model, where)
    return jax.device_get(program(model.params, parallel.place(where, inputs)))


@pytest.mark.parametrize(("name", "number"), [("tome", 0), ("tome", 1), ("tome", 2), *[(name, 3) for name in MODELS]])
def test_outputs_and_gradients_are_those_of_one_device(name, number):
    close(on(name, number), on(name, None))


@pytest.mark.long
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", list(MODELS)[1:])
def test_and_on_every_other_mesh(name, number):
    close(on(name, number), on(name, None))


def close(found, expected):
    """Within 1e-5 of what an array holds at most."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize("number", [3, *[pytest.param(number, marks=pytest.mark.long) for number in (0, 1, 2)]])
def test_a_decoder_that_prunes_goes_on_from_its_cache(number):
    model = drawn(tokjax.reduce(api.build(DECODER), "fastv", layer=1, keep_rate=0.5))
    ids = np.random.default_rng(1).integers(2, 30, (8, 12)).astype(np.int32)
    found = []
    for each, texts in ((model, ids), (parallel.shard(model, mesh(number)), ids)):
        made = each.generate(texts, max_tokens=4)
        found.append((np.asarray(made.ids), np.asarray(made.score)))
    np.testing.assert_array_equal(found[1][0], found[0][0])
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_divide():
    rows = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    placed = parallel.place(mesh(), {"x": rows, "valid": np.ones(5, bool)}, pad=True)
    assert placed["x"].shape == (8, 2)
    found = parallel.fetch(placed)
    np.testing.assert_array_equal(found["x"][found["valid"]], rows)
    with pytest.raises(UserError, match="batch_size=5: must be a multiple of 4, the devices that split it"):
        parallel.place(mesh(), {"x": rows})
