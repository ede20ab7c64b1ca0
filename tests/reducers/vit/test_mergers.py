"""Learned soft mergers: what each weighs, padded rows, and what training would change."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.mergers import own_rngs
from tokjax.reducers.vit.patchmerger import PatchMerger, Queries
from tokjax.reducers.vit.sinkhorn import Centres, Sinkhorn, transport
from tokjax.reducers.vit.sit import SiT, Slimming
from tokjax.reducers.vit.tokenlearner import DenseMaps, Fuser, TokenLearner
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))
KINDS = {"sit": Slimming, "patchmerger": Queries, "sinkhorn": Centres, "tokenlearner": DenseMaps}
METHODS = (SiT, PatchMerger, Sinkhorn, TokenLearner)


def merger(kind, count=3):
    return KINDS[kind](8, count, rngs=nnx.Rngs(0))


def tokens_of(n=17, batch=2, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, n, 8)), jnp.float32)
    return Tokens(x, prefix=1, **fields)


@pytest.mark.parametrize("kind", ["sit", "patchmerger", "tokenlearner"])
def test_outputs_are_averages_behind_an_untouched_prefix(kind):
    plan, tokens = merger(kind).plan(tokens_of(), Signals()), tokens_of()
    np.testing.assert_allclose(plan.map.weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(plan.map.weights[:, 0], np.eye(17)[:1].repeat(2, 0))
    out = apply(plan, tokens)
    assert out.x.shape == (2, 4, 8) and out.size is None
    np.testing.assert_array_equal(out.x[:, 0], tokens.x[:, 0])
    np.testing.assert_array_equal(plan.map.anchor[:, 1:], plan.map.weights[:, 1:].argmax(-1))


def test_patchmerger_mixes_normalised_tokens_and_sit_plain_ones():
    tokens = tokens_of()
    scaled = tokens.replace(x=tokens.x * 7 + 1)
    a, b = (apply(merger("patchmerger").plan(t, Signals()), t).x[:, 1:] for t in (tokens, scaled))
    np.testing.assert_allclose(a, b, atol=1e-4)
    a, b = (apply(merger("sit").plan(t, Signals()), t).x[:, 1:] for t in (tokens, scaled))
    np.testing.assert_allclose(a * 7 + 1, b, atol=1e-4)


def test_sinkhorn_shares_every_token_and_centres_get_about_even_parts():
    weights = transport(jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 12)), jnp.float32), 1.0, 3)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(2), 4, rtol=0.05)


def test_centres_keep_their_length_as_parameters_and_learn_through_the_normalised_ones():
    one = merger("sinkhorn")
    np.testing.assert_allclose(jnp.linalg.norm(one.normalised(), axis=-1), 1, rtol=1e-6)
    graph, params = nnx.split(one)
    gradient = jax.grad(lambda p: (nnx.merge(graph, p).normalised() * jnp.arange(8.0)).sum())(params)
    np.testing.assert_allclose(jax.tree.leaves(gradient)[0], np.tile(np.arange(8.0), (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_shorter_than_the_outputs_stay_as_they_are(kind):
    valid = np.ones((2, 17), bool)
    valid[0, [1, 2, 4, *range(6, 17)]] = False  # patches 3 and 5 are left
    tokens = tokens_of(valid=jnp.asarray(valid))
    out = apply(merger(kind).plan(tokens, Signals()), tokens)
    np.testing.assert_array_equal(out.valid, [[True, True, True, False], [True] * 4])
    np.testing.assert_array_equal(out.x[0, 1:3], tokens.x[0, np.array([3, 5])])
    whole = tokens.replace(valid=None)
    np.testing.assert_allclose(out.x[1], apply(merger(kind).plan(whole, Signals()), whole).x[1], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_locations_have_a_module_each_and_counts_of_the_table(method):
    reducer = method(INFO, 0.5)
    hooks = reducer.hooks(INFO)
    assert [(h.where, h.layer, h.reducer.count) for h in hooks] == [
        ("before_block", layer, k) for layer, k in zip((3, 6, 9), (8, 4, 2), strict=True)
    ]
    assert method(INFO, 1.0).hooks(INFO) == []
    with pytest.raises(ValueError, match=r"keep_rate=2: must be in \(0, 1\]"):
        method(INFO, 2)
    with pytest.raises(ValueError, match="width=4: these parameters were made for width=8"):
        reducer.hooks(dataclasses.replace(INFO, width=4))


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_has_a_gradient(method):
    graph, params = nnx.split(method(INFO, kept=(3,), layers=(3,)))
    tokens = tokens_of()

    def loss(params):
        stage = nnx.merge(graph, params).stages[0]
        return jnp.sin(3 * apply(stage.plan(tokens, Signals()), tokens).x).sum()

    for path, leaf in jax.tree.leaves_with_path(jax.grad(loss)(params)):
        quiet = method is TokenLearner and "out" in str(path) and "bias" in str(path)  # a softmax ignores shifts
        quiet |= method is SiT and "out" in str(path) and "bias" in str(path)
        assert np.isfinite(leaf).all()
        assert quiet or np.abs(leaf).max() > 1e-7, jax.tree_util.keystr(path)


def test_tokenlearner_on_the_grid():
    reducer = TokenLearner(INFO, kept=3, version="v1", how="mean")
    assert [h.layer for h in reducer.hooks(INFO)] == [3]
    plan = reducer.stages[0].plan(tokens_of(), Signals())
    weights = np.asarray(plan.map.weights[:, 1:, 1:]) * 16
    assert weights.min() > 0 and weights.max() < 1
    with pytest.raises(ValueError, match="needs all patches of the grid"):
        reducer.stages[0].plan(tokens_of(13), Signals())


def test_fuser_starts_by_adding_the_same_everywhere():
    fuser = Fuser(8, 3, rngs=nnx.Rngs(0))
    out = fuser(tokens_of(3).x, tokens_of().x)
    assert out.shape == (2, 17, 8)
    np.testing.assert_allclose(out, 0, atol=1e-6)  # the kernel over tokens starts at zero, and so does its bias


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinkhorn(INFO, eps=0.0), "eps=0.0: must be above 0"),
        (lambda: Sinkhorn(INFO, iters=0), "iters=0: must be at least 1"),
        (lambda: TokenLearner(INFO, version="v2"), "version='v2': must be one of v1.1, v1"),
        (lambda: TokenLearner(INFO, version="v1", layers=(3, 6)), r"layers=\(3, 6\): version='v1'"),
        (lambda: TokenLearner(dataclasses.replace(INFO, grid=None), version="v1"), "needs a model with a grid"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_reducer_does_not_start_as_a_copy_of_its_model():
    """With one seed for both, arrays of one shape would be alike."""
    model, ours = nnx.Rngs(0), own_rngs(0)
    drawn = [np.asarray(jax.random.normal(rngs.params(), (256,))) for rngs in (model, ours) for _ in range(8)]
    assert np.abs(np.corrcoef(drawn)[:8, 8:]).max() < 0.3
    again = np.asarray(jax.random.normal(own_rngs(0).params(), (256,)))
    np.testing.assert_array_equal(again, drawn[8])
