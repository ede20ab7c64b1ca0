"""CLCA: what is cached and when it comes back, carriers, the head, what it wraps, saving."""

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import budget
from tokjax.hooks import ModelInfo, losses
from tokjax.models.vit import ViTConfig
from tokjax.reducers.vit.clca import CLCA, BatchNorm, Cache, removed
from tokjax.reducers.vit.evit import EViT
from tokjax.reducers.vit.gtp import GTP
from tokjax.reducers.vit.tome import ToMe
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens
from tokjax.train import state

CONFIG = ViTConfig((16, 16), 4, width=16, depth=6, heads=2, num_classes=3)


@pytest.fixture(scope="module")
def model() -> tokjax.Model:
    return tokjax.build(CONFIG)


def run(model: tokjax.Model, images, params=None):
    """The whole output, with the states."""
    forward = jax.jit(lambda params, x: model.forward(params, x, states=True), compiler_options=QUICK)
    return forward(model.params if params is None else params, images)


def lengths(model) -> list[int]:
    """Tokens behind every block, what came back included."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    out = jax.eval_shape(lambda params, x: model.forward(params, x, states=True), model.params, images)
    return [state.length for state in out.states]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 18 go in; EViT leaves CLS, ceil(17 / 2) and a fused token; then two cached pairs of mean and carrier return.
        ({"num_clr": 1}, [18, 11 + 2, 13, 8 + 4, 12 + 2, 14]),
        ({"num_clr": 1, "recover_at_last": False}, [18, 11 + 2, 13, 8 + 4, 12, 12]),
        ({}, [17, 10 + 1, 11, 7 + 2, 9 + 1, 10]),
        ({"gap": False, "num_clr": 2}, [19, 11 + 2, 13, 8 + 4, 12 + 2, 14]),
        ({"cache": False}, [17, 10, 10, 7, 7, 7]),
        ({"reducer": "topk", "num_clr": 1}, [18, 10 + 2, 12, 7 + 4, 11 + 2, 13]),
        ({"reducer": "tome"}, [17, 9 + 1, 10, 6 + 2, 8 + 1, 9]),
        ({"reducer": None}, [17, 18, 18, 20, 21, 21]),
    ],
)
def test_sequences_grow_again(model, settings, expected):
    reduced = tokjax.reduce(model, "clca", keep_rate=0.5, layers=(1, 3), **settings)
    assert lengths(reduced) == expected


def test_what_is_cached_and_what_comes_back():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    tokens, store = Tokens(x, prefix=1).traced(), Cache(False, True, 1, True, 1)
    one = apply(store.plan(tokens, Signals()), tokens)
    np.testing.assert_array_equal(one.carry["clca"], [[x[0, 1:5].mean(0), x[0, 5]]])
    assert one.length == 6
    two = apply(store.plan(one, Signals()), one)
    assert two.carry["clca"].shape == (1, 4, 2)
    # The mean leaves out what came back; the last token that came back is a carrier from now on.
    back = apply(Cache(True, True, 1, True, 1).plan(two, Signals()), two)
    np.testing.assert_array_equal(back.x, jnp.concatenate([x, two.carry["clca"]], 1))
    np.testing.assert_array_equal(back.carry["clca"], [[x[0, 1:].mean(0), x[0, 5]]])
    np.testing.assert_array_equal(back.origin, [np.arange(6)])
    end = apply(Cache(True, False, 0, True, 1).plan(back, Signals()), back)
    assert end.length == 12 and end.carry["clca"] is None


def test_an_empty_cache_brings_nothing_back():
    tokens = Tokens(jnp.ones((1, 4, 2)), prefix=1)
    out = apply(Cache(True, True, 0, True, 0).plan(tokens, Signals()), tokens)
    assert out.length == 4 and out.carry["clca"].shape == (1, 1, 2)


def test_sizes_and_positions_of_what_comes_back():
    carry = {"clca": jnp.ones((1, 2, 2))}
    tokens = Tokens(jnp.ones((1, 3, 2)), size=jnp.array([[1.0, 2, 3]]), position=jnp.array([[0, 5, 7]]), carry=carry)
    out = apply(Cache(True, False, 0, True, 0).plan(tokens, Signals()), tokens)
    np.testing.assert_array_equal(out.size, [[1, 2, 3, 1, 1]])
    np.testing.assert_array_equal(out.position, [[0, 5, 7, -1, -1]])


def test_padding_is_not_cached():
    rng = np.random.default_rng(0)
    valid = np.array([[True, True, False, True, False, True]])
    x = jnp.asarray(rng.normal(size=(1, 6, 2)), jnp.float32)
    plan = Cache(False, True, 1, True, 1).plan(Tokens(x, valid=jnp.asarray(valid), prefix=1), Signals())
    alone = Cache(False, True, 1, True, 1).plan(Tokens(x[:, valid[0]], prefix=1), Signals())
    np.testing.assert_allclose(plan.carry["clca"], alone.carry["clca"], rtol=1e-6)


def test_the_reducer_inside():
    info = CONFIG.info
    assert CLCA(info, keep_rate=0.4, layers=(2,)).inner == EViT(keep_rate=0.4, layers=(2,))
    assert CLCA(info, reducer="tome", keep_rate=0.7, layers=(1, 3)).inner == ToMe(r=(0, 5, 0, 4, 0, 0))
    every = CLCA(info, reducer="tome", settings={"r": 2})
    assert every.inner == ToMe(r=2) and every.layers == tuple(range(6))
    assert CLCA(info, settings={"kept": 3}).inner == EViT(keep_rate=0.7, kept=3, layers=(1, 3, 4))
    assert CLCA(info, reducer="gtp", keep_rate=0.7, layers=(1, 3)).inner == GTP((0, 5, 0, 4, 0, 0))
    assert CLCA(info, reducer="pitome").inner.layers == (1, 3, 4)
    assert CLCA(info).layers == (1, 3, 4) and CLCA(info).depths == (1, 3, 4, 5)
    assert removed(ModelInfo(12, 8, 2, 197, 1), 0.5, (3, 6, 9)) == (0, 0, 0, 98, 0, 0, 49, 0, 0, 25, 0, 0)


def test_only_blocks_that_reduce_bring_the_cache_back():
    """GTP's attention maps and graph, Evo-ViT's gathering and returns and the note at the input leave out nothing."""
    gtp = {"reducer": "gtp", "settings": {"propagated": (0, 0, 3, 2), "sparsity": 0.5}}
    assert CLCA(CONFIG.info, **gtp).layers == (2, 3)
    assert CLCA(CONFIG.info, reducer="evovit", settings={"keep_rate": 0.5}, cache=False).layers == (2, 4)
    assert CLCA(CONFIG.info, reducer="diffrate", settings={"merge_kept": (17, 17, 9, 9, 5, 5)}).layers == (2, 4)
    assert CLCA(CONFIG.info, reducer="dpcknn", settings={"keep_rate": 0.5}).layers == (1, 3, 4)


def test_a_reduction_without_a_recovery_leaves_only_patches_behind():
    settings = {"settings": {"propagated": (0, 4, 3)}, "layers": (1, 3), "num_clr": 1}
    caches = [h.reducer for h in CLCA(CONFIG.info, reducer="gtp", **settings).hooks(CONFIG.info) if h.layer < 5]
    caches = [cache for cache in caches if isinstance(cache, Cache)]
    assert [cache.behind for cache in caches] == [1, 0, 0, 0, 4]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reducer": "gtp"}, [18, 18 - 8 + 2, 12, 12 - 4 + 4, 12 + 2, 14]),
        ({"reducer": "heuristic"}, [18, 2 + 4 + 2, 8, 8 + 4, 12 + 2, 14]),  # the inner four patches, already at block 1
        ({"reducer": "dynamicvit", "settings": {"masked": True}}, [18, 18 + 2, 20, 20 + 4, 24 + 2, 26]),
    ],
)
def test_reducers_that_go_by_places_and_decisions(model, settings, expected):
    """Carriers and what came back have no edges, no place and no decision against them."""
    rng = np.random.default_rng(0)
    reduced = tokjax.reduce(model, "clca", keep_rate=0.5, layers=(1, 3), num_clr=1, **settings)
    noisy = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), reduced.params)
    out = run(reduced, rng.normal(size=(2, 16, 16, 3)).astype(np.float32), noisy)
    assert [state.length for state in out.states] == expected
    assert np.isfinite(out.logits).all() and np.ptp(out.logits, 0).min() > 0


def test_the_mean_may_be_one_over_prefix_and_carriers():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    cached = Cache(False, True, 1, True, 0, pool_cls=True).plan(Tokens(x, prefix=2), Signals()).carry["clca"]
    np.testing.assert_array_equal(cached, x[:, :5].mean(1, keepdims=True))

    def behind(**settings):
        hooks = CLCA(CONFIG.info, num_clr=2, layers=(2,), **settings).hooks(CONFIG.info)
        return [hook.reducer.behind for hook in hooks if isinstance(hook.reducer, Cache)]

    assert behind() == [2, 2, 0, 6, 6] and behind(pool_clr=True) == [0, 0, 0, 6, 6]
    hooks = CLCA(CONFIG.info, pool_cls=True).hooks(CONFIG.info)
    assert all(hook.reducer.pool_cls for hook in hooks if isinstance(hook.reducer, Cache))


def test_the_older_head_by_hand(model):
    head = CLCA(CONFIG.info, expand=0).head
    rng = np.random.default_rng(0)
    cls, mix = rng.normal(size=(5, 16, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    scale, kernel = rng.normal(size=16).astype(np.float32), rng.normal(size=(16, 3)).astype(np.float32)
    nnx.update(head, {"over_depth": {"kernel": mix[:, None], "bias": np.full(1, 0.5, np.float32)}})
    nnx.update(head, {"norm": {"scale": scale}, "out": {"kernel": kernel}})
    mixed = np.maximum(cls @ mix + 0.5, 0)
    normed = (mixed - mixed.mean(1, keepdims=True)) / np.sqrt(mixed.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(head(jnp.asarray(cls)), (normed * scale) @ kernel, rtol=1e-3, atol=1e-4)
    logits = tokjax.reduce(model, "clca", expand=0)(jnp.asarray(rng.normal(size=(4, 16, 16, 3)), jnp.float32))
    assert logits.shape == (4, 3) and np.isfinite(logits).all() and np.ptp(logits, 0).min() > 0


def test_carriers_are_no_patches_to_any_reducer(model):
    """Neither to the one inside nor to one that is added."""
    reduced = tokjax.reduce(tokjax.reduce(model, "clca", num_clr=3), "ats", layers=(0,))
    out = run(reduced, np.zeros((2, 16, 16, 3), np.float32))
    np.testing.assert_array_equal(out.tokens.carry["patches"], [16, 16])


def test_the_head_replaces_the_models_logits(model):
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    reduced = tokjax.reduce(model, "clca")
    out = run(reduced, images)
    assert out.logits.shape == (4, 3) and np.ptp(out.logits, 0).min() > 0  # the model's own head starts at zero
    assert len(out.head_logits) == 1 and out.pooled.shape == (4, 16)
    headless = tokjax.reduce(model, "clca", head=False)
    np.testing.assert_array_equal(headless(images), 0)


def test_gradients_reach_carriers_and_head_but_not_the_statistics(model):
    reduced = tokjax.reduce(model, "clca", num_clr=1)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    loss = jax.grad(lambda params: (reduced.forward(params, images).logits ** 2).sum())
    gradient = jax.jit(loss, compiler_options=QUICK)(reduced.params)
    learned = gradient["reducers"][0]
    assert np.abs(learned["clr"]).max() > 0 and np.abs(learned["head"]["over_depth"]).max() > 0
    for norm in ("norm1", "norm2"):
        np.testing.assert_array_equal(learned["head"][norm]["mean"], 0)
        np.testing.assert_array_equal(learned["head"][norm]["var"], 0)


def test_batch_norm_by_hand():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5)) * 3 + 1
    norm = BatchNorm(4)
    np.testing.assert_allclose(norm(x), x / np.sqrt(1 + 1e-5), rtol=1e-5)
    norm.mean[...], norm.var[...] = jnp.full(4, 2.0), jnp.full(4, 3.0)
    of_batch, new = norm.learn(x)
    np.testing.assert_allclose(of_batch.mean((0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(of_batch.std((0, 2)), 1, atol=1e-4)
    np.testing.assert_allclose(new["mean"], 0.9 * 2 + 0.1 * x.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * 3 + 0.1 * np.var(x, (0, 2), ddof=1), rtol=1e-5)
    one = norm.learn(x[:1, :, 0])[1]  # a single value has no unbiased variance
    np.testing.assert_allclose(one["var"], 0.9 * 3, rtol=1e-5)


def test_the_head_learns_its_moving_statistics(model):
    """The training form goes by the batch and gives them; repeated, evaluation comes to what training gave."""
    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    reduced = tokjax.reduce(model, "clca", num_clr=1)
    learning = reduced.learning()
    assert jax.tree.structure(learning.params) == jax.tree.structure(reduced.params)

    @jax.jit
    def step(params):
        out = learning.forward(params, images)
        new = learning.statistics(out.tokens.aux)
        return out.logits, state.written(params, new)

    params = reduced.params
    for _ in range(80):
        logits, params = step(params)
    assert np.abs(logits - reduced(images)).max() > 0.1 * np.abs(logits).max()
    head = params["reducers"][0]["head"]
    for norm, values in (("norm1", 8 * 4), ("norm2", 8)):  # that moving variances are unbiased is all that differs
        head = head | {norm: head[norm] | {"var": head[norm]["var"] * (values - 1) / values}}
    arrived = {**params, "reducers": {0: {**params["reducers"][0], "head": head}}}
    np.testing.assert_allclose(reduced.with_params(arrived)(images), logits, atol=0.005 * np.abs(logits).max())
    assert reduced.statistics(run(reduced, images, params).tokens.aux) == {}

    def loss(params):
        return (learning.forward(params, images).logits ** 2).sum()

    of_head = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)["reducers"][0]["head"]
    for norm in ("norm1", "norm2"):
        np.testing.assert_array_equal(of_head[norm]["mean"], 0)
    assert np.abs(of_head["norm1"]["scale"]).max() > 0 and np.isfinite(of_head["over_depth"]).all()


def test_what_is_inside_learns_too(model):
    """DynamicViT masks, where the cache comes back stays; the statistics are of the second method."""
    settings = {"reducer": "dynamicvit", "keep_rate": 0.5, "num_clr": 1}
    reduced = tokjax.reduce(tokjax.reduce(model, "topk", keep_rate=0.9, layers=(0,)), "clca", **settings)
    learning = reduced.learning()
    assert learning.methods[1].reducer.layers == reduced.methods[1].reducer.layers == (1, 3, 4)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    out = run(learning, images, reduced.params)
    assert losses(out.tokens.aux)["ratio"].shape == (2,)
    assert set(learning.statistics(out.tokens.aux)["reducers"]) == {1}
    assert learning.token_counts()[3] > reduced.token_counts()[3]


def test_it_is_saved_with_its_parameters(model, tmp_path):
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    settings = {"reducer": "tome", "keep_rate": 0.6, "num_clr": 2, "settings": {"proportional": False}, "seed": 5}
    reduced = tokjax.reduce(model, "clca", **settings)
    tokjax.save(reduced, tmp_path)
    again = tokjax.load(tmp_path)
    assert again.methods[0].name == "clca" and dict(again.methods[0].settings) == settings
    np.testing.assert_array_equal(again(images), reduced(images))


def test_budgets_are_reached(model):
    found = budget.solve("clca", model, macs=0.75, num_clr=1)
    assert found.reached and abs(found.relative - 0.75) < 0.05 and found.reachable[1] > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_clr": -1}, r"num_clr=-1: must be at least 0"),
        ({"num_clr": 1, "cache": False}, r"num_clr=1: must be at least 0, and 0 with cache=False"),
        ({"gap": False}, r"gap=False, num_clr=0: leave nothing to cache"),
        ({"expand": -1}, r"expand=-1: must be at least 0"),
        ({"reducer": "evovit"}, r"reducer='evovit': brings back itself what it sets aside, .* only cache=False goes"),
        ({"reducer": "tomesd", "settings": {"seed": 1}}, r"reducer='tomesd': merges on a whole grid"),
        ({"reducer": "clca"}, r"reducer='clca': has a cache of its own"),
        ({"reducer": "evits"}, r"reducer='evits': must be one of "),
        ({"reducer": "diffrate"}, r"reducer='diffrate': has no keep_rate; give its settings"),
        ({"reducer": "tome", "keep_rate": 0.0}, r"keep_rate=0.0: must be in \(0, 1\]"),
        ({"layers": (6,)}, r"layers=\(6,\): must lie in 0 to 5"),
        ({"settings": {"rate": 1}}, r"rate=1: evit has the settings"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        CLCA(CONFIG.info, **settings).hooks(CONFIG.info)


def test_a_head_needs_classes():
    with pytest.raises(ValueError, match=r"head=True: needs a model with classes"):
        CLCA(ModelInfo(4, 8, 2, 17, 1), head=True)
    assert CLCA(ModelInfo(4, 8, 2, 17, 1)).head is None
