"""What a user holds: calling, tracing, reducing, saving and loading a model."""

import dataclasses
import json
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import reducers
from tokjax.errors import UserError
from tokjax.hooks import Hook
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.preprocess import Preprocess
from tokjax.reducers import REGISTRY, Entry
from tokjax.token_map import Plan, SoftMap

CONFIG = ViTConfig((16, 16), 4, width=16, depth=3, heads=2, num_classes=5)
TOKENS = 17


@pytest.fixture(scope="module")
def model() -> tokjax.Model:
    """Weights large enough for logits that differ, with heads that are not zero."""
    built = tokjax.build(CONFIG, seed=1)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    return built.with_params(jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), built.params))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(7), (2, 16, 16, 3))


@dataclasses.dataclass(frozen=True)
class Watching:
    """Does nothing, and notes when it is asked: once a compilation."""

    asked: list = dataclasses.field(default_factory=list, compare=False)
    where: str = "after_block"
    layer: int = 0

    def hooks(self, info):
        return [Hook(self.where, self.layer, self)]

    def plan(self, tokens, signals):
        self.asked.append(tokens.x.shape)


class Pool(nnx.Module):
    """Learned queries pool all patches behind the first block."""

    def __init__(self, width: int = 16, slots: int = 4, seed: int = 0):
        self.queries = nnx.Param(jax.random.normal(jax.random.key(seed), (slots, width)))

    def hooks(self, info):
        return [Hook("after_block", 0, self)]

    def plan(self, tokens, signals):
        p, slots = tokens.prefix, self.queries.shape[0]
        share = jax.nn.softmax(jnp.einsum("mc,bnc->bmn", self.queries[...], tokens.x[:, p:]), -1)
        kept = jnp.broadcast_to(jnp.eye(p, tokens.length), (tokens.batch, p, tokens.length))
        weights = jnp.concatenate([kept, jnp.pad(share, ((0, 0), (0, 0), (p, 0)))], 1)
        anchor = jnp.broadcast_to(jnp.arange(p + slots), (tokens.batch, p + slots))
        return Plan(SoftMap(weights, anchor), how="sum")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def far(a, b) -> bool:
    return float(jnp.abs(a - b).max()) > 1e-3


# Calls


def test_call_is_the_pure_function_of_the_parameters(model, images):
    logits = model(images)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model.forward(model.params, images).logits, atol=1e-5)
    assert far(logits[0], logits[1])


def test_images_of_another_shape_are_refused_before_anything_is_compiled(model, images):
    watching = Watching()
    watched = tokjax.reduce(model, watching)
    for wrong in (images[:, :12], images[..., :1], images[0]):
        for trace in (False, True):
            with pytest.raises(ValueError, match=re.escape(f"{wrong.shape}: must be (batch, 16, 16, 3)")):
                watched(wrong, trace=trace)
    assert not watching.asked


def test_one_program_serves_all_calls_and_all_parameters(model, images):
    watching = Watching()
    watched = tokjax.reduce(model, watching)
    first = watched(images)
    other = watched.with_params(jax.tree.map(lambda x: 1.1 * x, watched.params))
    assert far(other(images), first)
    same(watched(images), first)
    assert watching.asked == [(2, TOKENS, 16)]
    watched(images, trace=True), other(images, trace=True)
    watched(images[:1])
    assert watching.asked == [(2, TOKENS, 16)] * 2 + [(1, TOKENS, 16)]


def test_key_decides_what_a_drawing_reducer_draws(model, images):
    drawing = tokjax.reduce(model, "random", keep_rate=0.3)
    a, b = (drawing(images, key=jax.random.key(seed)) for seed in (1, 2))
    assert far(a, b)
    same(drawing(images, key=jax.random.key(1)), a)
    same(drawing(images), drawing(images))


def test_compiled_program_can_be_asked(model, images):
    assert model.compiled(images).memory_analysis().temp_size_in_bytes > 0


# Reducing


def test_reduce_leaves_the_model_as_it_is(model, images):
    before = model(images)
    fast = tokjax.reduce(model, "tome", r=4)
    assert model.methods == () and fast.methods[0].name == "tome" and fast.methods[0].settings == {"r": 4}
    assert model.token_counts() == (17, 17, 17) and fast.token_counts() == (13, 9, 5)
    assert far(fast(images), before)
    same(model(images), before)
    same(fast.params["model"], model.params["model"])


def test_neutral_settings_change_nothing(model, images):
    same(tokjax.reduce(model, "tome", r=0)(images), model(images))


def test_unreduced_is_the_model_before(model, images):
    assert model.unreduced is model
    fast = tokjax.reduce(tokjax.reduce(model, "topk", keep_rate=0.5), "tome", r=1)
    assert [m.name for m in fast.methods] == ["topk", "tome"]
    assert fast.unreduced.methods == ()
    same(fast.unreduced(images), model(images))


def test_reducers_run_in_the_order_in_which_they_came(model):
    for after in (True, False):
        watching = Watching(where="after_attention", layer=1)
        reduced = model if after else tokjax.reduce(model, watching)
        reduced = tokjax.reduce(reduced, "topk", keep_rate=0.5, layers=(1,))
        reduced = tokjax.reduce(reduced, watching) if after else reduced
        assert reduced.token_counts() == (17, 9, 9)
        assert watching.asked == [(1, 9 if after else 17, 16)]


def test_a_reducer_can_be_given_as_an_object(model, images):
    given = tokjax.reduce(model, reducers.tome(r=3))
    same(given(images), tokjax.reduce(model, "tome", r=3)(images))
    assert given.methods[0].name == "tome" and given.methods[0].settings["r"] == 3


def test_both_forms_of_applying_a_map_agree(model, images):
    scatter, matmul = (tokjax.reduce(model, "tome", r=4, form=form) for form in ("scatter", "matmul"))
    np.testing.assert_allclose(scatter(images), matmul(images), atol=1e-5)
    assert tokjax.reduce(matmul, "topk").form == "matmul" and matmul.unreduced.form == "matmul"


def test_what_reduce_refuses(model):
    refused = [
        (("tomee",), {}, "did you mean 'tome'"),
        (("tome",), {"rate": 3}, "rate=3"),
        (("tome",), {"r": -1}, "r=-1"),
        (("tome",), {"r": 17}, "at most 16"),
        ((reducers.tome(r=2),), {"r": 3}, "r"),
        ((Watching(layer=3),), {}, "layer 3; this model has layers 0 to 2"),
        ((Watching(where="after_prefill"),), {}, "after_prefill"),
        (("tome",), {"form": "gather"}, "form='gather'"),
    ]
    for args, settings, words in refused:
        with pytest.raises(ValueError, match=re.escape(words)):
            tokjax.reduce(model, *args, **settings)


def test_cost_counts_what_runs(model):
    whole, fast = model.cost(), tokjax.reduce(model, "tome", r=4).cost()
    # Embedding; per block qkv and proj, attention over all pairs, and the MLP; the head, which reads one token.
    c, n = 16, TOKENS
    blocks = 3 * (4 * n * c * c + 2 * n * n * c + 2 * n * c * 4 * c)
    assert (whole.model, whole.reducer) == ((n - 1) * 48 * c + blocks + 5 * c, 0)
    assert fast.reducer > 0 and fast.model < whole.model and fast.total == fast.model + fast.reducer
    assert model.cost(batch=3).total == 3 * whole.total


def test_repr_names_sizes_and_reducers(model):
    text = repr(tokjax.reduce(model, "tome", r=2))
    assert "16x3" in text and "1+16 tokens" in text and "tome(r=2)" in text
    assert "no reducer" in repr(model)


# Tracing


def test_trace_follows_every_token(model, images):
    fast = tokjax.reduce(model, "tome", r=4)
    logits, trace = fast(images, trace=True)
    np.testing.assert_allclose(logits, fast(images), atol=1e-5)
    assert trace.tokens.tolist() == [[13, 13], [9, 9], [5, 5]]
    for layer, left in zip(trace.layers, (13, 9, 5), strict=True):
        origin = np.asarray(layer.origin)
        assert origin.shape == (2, TOKENS) and layer.slots == left
        assert (origin[:, 0] == 0).all()  # CLS stays first
        for row, sizes in zip(origin, layer.size, strict=True):
            np.testing.assert_array_equal(np.bincount(row, minlength=left), sizes)  # nothing is lost


def test_trace_of_a_pruned_model_marks_what_is_gone(model, images):
    _, trace = tokjax.reduce(model, "topk", keep_rate=0.5, layers=(1,))(images, trace=True)
    first, last = (np.asarray(trace.layers[i].origin) for i in (0, 2))
    assert (first == np.arange(TOKENS)).all()
    assert ((last == 9).sum(1) == 8).all() and trace.layers[2].slots == 9


def test_trace_draws_pictures(model, images):
    _, trace = tokjax.reduce(model, "tome", r=4)(images, trace=True)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    pictures = trace.pictures(pixels, row=1, layers=(0, 2))
    assert len(pictures) == 3  # the image and two blocks
    drawn = trace.draw(pixels, row=1)
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.std() > 10
    assert not np.array_equal(drawn, trace.draw(pixels, row=0))


# Reducers that learn


def test_parameters_of_a_learned_reducer_are_the_models(model, images):
    learned = tokjax.reduce(model, Pool())
    assert learned.params["reducers"].keys() == {0} and learned.token_counts() == (17, 5, 5)
    assert "reducers" not in model.params

    def loss(params):
        return jnp.square(learned.forward(params, images).logits).sum()

    gradient = jax.jit(jax.grad(loss))(learned.params)["reducers"][0]["queries"]
    assert gradient.shape == (4, 16) and float(jnp.abs(gradient).max()) > 0
    queries = learned.params["reducers"][0]["queries"]
    step = queries - 1e-4 * gradient / jnp.linalg.norm(gradient)
    moved = {**learned.params, "reducers": {0: {"queries": step}}}
    change = -1e-4 * float(jnp.linalg.norm(gradient))
    np.testing.assert_allclose(float(loss(moved) - loss(learned.params)), change, rtol=0.1)


def test_what_a_reducer_has_learned_stays_when_another_comes(model, images):
    learned = tokjax.reduce(tokjax.reduce(model, "tome", r=1), Pool())
    trained = learned.with_params(jax.tree.map(lambda x: x + 1, learned.params))
    both = tokjax.reduce(trained, "tome", r=0)
    same(both.params["reducers"], trained.params["reducers"])
    same(both(images), trained(images))
    assert far(trained(images), learned(images))


LEARNING = sorted(name for name, entry in tokjax.reducers.REGISTRY.items() if entry.training)


@pytest.mark.parametrize("name", LEARNING)
def test_a_learning_model_has_the_parameters_of_the_model(model, name):
    entry = tokjax.reducers.entry(name)
    reduced = tokjax.reduce(tokjax.reduce(model, "tome", r=1), name, **entry.example)
    reduced = reduced.with_params(jax.tree.map(lambda x: x + 1, reduced.params))
    learning = reduced.learning()
    same(learning.params, reduced.params)
    fresh = learning.unreduced
    fresh = tokjax.reduce(tokjax.reduce(fresh, "tome", r=1), name, **{**entry.example, **entry.training})
    assert jax.tree.structure(fresh.params) == jax.tree.structure(learning.params)
    assert learning.methods[0] == reduced.methods[0]
    assert learning.methods[1].settings == {**entry.example, **entry.training}


def test_a_learning_model_masks_instead_of_pruning(model, images):
    reduced = tokjax.reduce(model, "dynamicvit", keep_rate=0.5)
    learning = reduced.learning()
    assert reduced.token_counts()[-1] < learning.token_counts()[-1] == model.info.length
    assert np.isfinite(learning(images)).all()
    assert model.learning() is model


# Files


def test_saved_model_comes_back(model, images, tmp_path):
    prepared = tokjax.Model(
        _module(model), preprocess=Preprocess((16, 16), resize="square", resize_to=(16, 16), crop=False)
    )
    tokjax.save(prepared, tmp_path / "run" / "model")
    for place in (tmp_path / "run", tmp_path / "run" / "model", str(tmp_path / "run")):
        loaded = tokjax.load(place)
        assert loaded.config == CONFIG and loaded.preprocess == prepared.preprocess
        same(loaded.params, model.params)
    same(loaded(images), model(images))
    np.testing.assert_allclose(tokjax.load(tmp_path / "run", scan=True)(images), model(images), atol=1e-5)
    half = tokjax.load(tmp_path / "run", dtype="bfloat16", image_size=(24, 16))
    assert half.config.dtype == "bfloat16" and half.config.num_patches == 24
    assert np.isfinite(half(jnp.zeros((1, 24, 16, 3)))).all()


def test_saved_in_half_precision(model, images, tmp_path):
    tokjax.save(model, tmp_path / "whole")
    tokjax.save(model, tmp_path / "half", dtype="bfloat16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 1.8 < sizes[0] / sizes[1] < 2.2
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    same(tokjax.load(tmp_path / "half").params, rounded)
    with pytest.raises(ValueError, match="dtype = 'int8'; allowed are float32, bfloat16, float16"):
        tokjax.save(model, tmp_path / "half", dtype="int8")
    same(tokjax.load(tmp_path / "half").params, rounded)


def _module(model: tokjax.Model):
    return nnx.merge(model._graph, model.params)["model"]


def test_reduced_model_comes_back_with_its_settings(model, images, tmp_path):
    fast = tokjax.reduce(model, "topk", keep_rate=0.6, layers=(1, 2))
    fast = tokjax.reduce(fast, reducers.tome(r=(3, 0, 0), how="mean"))
    tokjax.save(fast, tmp_path)
    loaded = tokjax.load(tmp_path)
    assert [m.name for m in loaded.methods] == ["topk", "tome"]
    assert [m.reducer for m in loaded.methods] == [m.reducer for m in fast.methods]
    same(loaded(images), fast(images))
    tokjax.save(model, tmp_path)
    assert tokjax.load(tmp_path).methods == ()
    assert not list(tmp_path.glob(".*"))


def test_learned_reducer_comes_back_with_what_it_learned(model, images, tmp_path, monkeypatch):
    entry = Entry(Pool, "pool", "", needs=(), knob=REGISTRY["tome"].knob, neutral={})
    monkeypatch.setitem(REGISTRY, "pool", entry)
    learned = tokjax.reduce(model, "pool", slots=3, seed=5)
    learned = learned.with_params(jax.tree.map(lambda x: x + 0.5, learned.params))
    tokjax.save(learned, tmp_path)
    loaded = tokjax.load(tmp_path)
    same(loaded.params, learned.params)
    same(loaded(images), learned(images))

    weights = tmp_path / "reducers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        tokjax.load(tmp_path)
    saved = json.loads((tmp_path / "reducers.json").read_text())
    saved[0]["settings"]["slots"] = 2
    tokjax.save(learned, tmp_path)
    (tmp_path / "reducers.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=re.escape("shape (2, 16)")):
        tokjax.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '[{"name": "tome"}]', '[{"name": "gone", "settings": {}}]', '[{"name": "tome", "settings": 1}]'],
)
def test_damaged_list_of_reducers(model, tmp_path, text):
    tokjax.save(model, tmp_path)
    (tmp_path / "reducers.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "reducers.json"))):
        tokjax.load(tmp_path)


def test_loaded_weights_are_those_that_were_saved_every_time(model, tmp_path):
    """Whether an array may share memory with a buffer depends on where the buffer lies, which differs by chance."""
    tokjax.save(model, tmp_path)
    for _ in range(8):
        jax.tree.map(np.testing.assert_array_equal, tokjax.load(tmp_path).params, model.params)


def test_reducers_that_could_not_be_loaded_are_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match="Pool is not registered"):
        tokjax.save(tokjax.reduce(model, Pool()), tmp_path / "run")
    with pytest.raises(ValueError, match="int64 is not JSON serializable"):
        tokjax.save(tokjax.reduce(model, "tome", r=np.int64(2)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
