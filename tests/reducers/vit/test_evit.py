"""EViT: Top-K, and one token made of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

from tokjax.hooks import ModelInfo
from tokjax.reducers.vit.evit import EViT
from tokjax.reducers.vit.topk import TopK
from tokjax.signals import Signals, cls_attention
from tokjax.token_map import apply
from tokjax.tokens import Tokens

SCORES = jnp.array([[0.3, 0.05, 0.2, 0.1, 0.25, 0.1], [0.1, 0.3, 0.1, 0.2, 0.05, 0.25]])


def attended(scores):
    b, n = scores.shape
    return Signals(weights=jnp.full((b, 2, n, n), 1 / n).at[:, :, 0].set(scores[:, None]))


def tokens_of(n=6, prefix=1, batch=2, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, n, 3)), jnp.float32)
    return Tokens(x, prefix=prefix, **fields)


def test_the_others_are_fused_by_their_attention():
    tokens = tokens_of().traced()
    out = apply(EViT(kept=2).plan(tokens, attended(SCORES)), tokens)
    kept, others = [[0, 4, 2], [0, 1, 5]], [[1, 3, 5], [2, 3, 4]]
    for b in range(2):
        np.testing.assert_array_equal(out.x[b, :3], tokens.x[b, jnp.array(kept[b])])
        fused = sum(SCORES[b, i] * tokens.x[b, i] for i in others[b])  # not divided by the sum of the weights
        np.testing.assert_allclose(out.x[b, 3], fused, atol=1e-6)
        np.testing.assert_array_equal(out.origin[b, jnp.array(others[b])], 3)
    assert out.size is None


def test_it_is_topk_with_one_more_token():
    tokens, signals = tokens_of(17), attended(jax.nn.softmax(tokens_of(17).x[..., 0]))
    fused, pruned = (make(0.7).plan(tokens, signals).map for make in (EViT, TopK))
    np.testing.assert_array_equal(fused.keep[:, :-1], pruned.keep)
    np.testing.assert_array_equal(fused.keep[:, -1], 17)  # a slot without a token of its own
    assert fused.num_out == 1 + 12 + 1


def test_weights_count_features_and_not_members():
    tokens = tokens_of()
    map = EViT(kept=2).plan(tokens, attended(SCORES)).map
    np.testing.assert_array_equal(map.membership().sum(1), 1)
    np.testing.assert_allclose(map.matrix()[0, 3, jnp.array([1, 3, 5])], SCORES[0, jnp.array([1, 3, 5])], rtol=1e-6)


def test_gradients_reach_the_attention_through_the_fused_token_only():
    tokens = tokens_of()

    def loss(scores):
        return apply(EViT(kept=2).plan(tokens, attended(scores)), tokens).x.sum()

    gradient = jax.grad(loss)(SCORES)
    np.testing.assert_allclose(gradient[0, jnp.array([1, 3, 5])], tokens.x[0, jnp.array([1, 3, 5])].sum(-1), atol=1e-5)
    np.testing.assert_array_equal(gradient[0, jnp.array([0, 2, 4])], 0)


def test_without_a_prefix_attention_received_counts():
    weights = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 6, 6)), jnp.float32))
    tokens = tokens_of(prefix=0)
    out = apply(EViT(kept=4).plan(tokens, Signals(weights=weights)), tokens)
    received = np.asarray(weights).mean((1, 2))
    for b in range(2):
        order = np.argsort(-received[b])
        np.testing.assert_array_equal(out.x[b, :4], tokens.x[b, order[:4]])
        np.testing.assert_allclose(out.x[b, 4], received[b, order[4:]] @ tokens.x[b, order[4:]], atol=1e-6)


def test_keeping_all_fuses_nothing():
    for reducer in (EViT(1.0), EViT(kept=5)):
        assert reducer.plan(tokens_of(), attended(SCORES)) is None


@pytest.mark.parametrize(
    ("reducer", "prefix", "holes"),
    [(EViT(0.7), 1, False), (EViT(0.7), 1, True), (EViT(0.5), 0, False), (EViT(kept=3), 2, True)],
)
def test_padded_rows_give_what_rows_alone_give(reducer, prefix, holes):
    rows_alone.check(reducer, prefix, holes=holes)


def test_padded_rows_fuse_behind_their_own_count():
    valid = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    scores = SCORES.at[1, 4:].set(0)
    tokens = tokens_of(valid=valid)
    out = apply(EViT(0.5).plan(tokens, attended(scores)), tokens)
    np.testing.assert_array_equal(out.valid, [[True] * 5, [True, True, True, True, False]])
    np.testing.assert_allclose(out.x[1, 3], scores[1, 2] * tokens.x[1, 2], atol=1e-6)
    np.testing.assert_array_equal(out.x[1, 4], 0)


def test_counts_of_deit_at_224_pixels():
    info = ModelInfo(depth=12, width=384, heads=6, length=197, prefix=1)
    tokens, lengths = Tokens(jnp.zeros((1, 197, 1)), prefix=1), []
    for hook in EViT(0.7).hooks(info):
        signals = Signals(weights=jnp.zeros((1, 1, tokens.length, tokens.length)))
        tokens = apply(hook.reducer.plan(tokens, signals), tokens)
        lengths.append((hook.layer, tokens.length))
    assert lengths == [(3, 140), (6, 100), (9, 72)]


def test_the_score_is_the_attention_of_the_signals():
    """The same plan from queries and keys as from the map that they make."""
    rng = np.random.default_rng(3)
    query, key = (jnp.asarray(rng.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in range(2))
    signals, tokens = Signals(query, key), tokens_of()
    from_rows = EViT(kept=2).plan(tokens, signals).map
    given = EViT(kept=2).plan(tokens, attended(cls_attention(signals))).map
    np.testing.assert_array_equal(from_rows.keep, given.keep)
    np.testing.assert_allclose(from_rows.weight, given.weight, atol=1e-6)
