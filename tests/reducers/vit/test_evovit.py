"""Evo-ViT: who goes through, who waits, what comes back, and how attention is gathered."""

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import ModelInfo, at
from tokjax.reducers.vit import evovit
from tokjax.reducers.vit.evovit import EvoViT
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))


def layout(reducer, info=INFO):
    return [(hook.layer, hook.call) for hook in reducer.hooks(info)]


def attended(scores):
    scores = jnp.asarray(scores, jnp.float32)[None]
    n = scores.shape[1]
    return Signals(weights=jnp.full((1, 2, n, n), 1 / n).at[:, :, 0].set(scores[:, None]))


def tokens_of(n):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, n, 3)), jnp.float32)
    return Tokens(x, prefix=1, position=jnp.arange(n)[None]).traced()


def test_tokens_that_wait_come_back_unchanged_behind_the_others():
    tokens, one = tokens_of(6), EvoViT(layers=(1,), layer=0)
    tokens = apply(one.gather(tokens, attended([9, 0.1, 0.5, 0.3, 0.2, 0.4])), tokens)
    before = tokens.x
    tokens = apply(one.plan(tokens, Signals()), tokens)
    np.testing.assert_array_equal(tokens.position, [[0, 2, 5]])
    np.testing.assert_array_equal(tokens.origin, [[0, 3, 1, 3, 3, 2]])
    tokens = tokens.replace(x=tokens.x + 1)  # what the blocks between would do
    tokens = apply(one.restore(tokens, Signals()), tokens)
    order = np.array([0, 2, 5, 3, 4, 1])
    np.testing.assert_array_equal(tokens.position[0], order)
    np.testing.assert_array_equal(tokens.x[0], before[0, order] + np.array([1, 1, 1, 0, 0, 0])[:, None])
    np.testing.assert_array_equal(tokens.origin[0, order], np.arange(6))
    np.testing.assert_allclose(tokens.carry[evovit.GLOBAL], [[0.5, 0.4, 0.3, 0.2, 0.1]])


def test_attention_is_gathered_over_the_blocks_from_the_one_before_the_first_selection_on():
    tokens = tokens_of(4).replace(carry={evovit.GLOBAL: jnp.array([[1.0, 2.0, 3.0]])})
    later = EvoViT(layers=(4,), layer=4, tradeoff=0.25).gather(tokens, attended([9, 0.1, 0.5, 0.3]))
    np.testing.assert_allclose(later.carry[evovit.GLOBAL], [[0.775, 1.625, 2.325]], rtol=1e-6)
    first = EvoViT(layers=(4,), layer=3).gather(tokens, attended([9, 0.1, 0.5, 0.3]))
    np.testing.assert_allclose(first.carry[evovit.GLOBAL], [[0.1, 0.5, 0.3]], rtol=1e-6)
    assert first.map is None


def test_stages_select_once_and_give_back_once():
    expected = [
        (3, "gather"),
        (4, "plan"),
        (4, "gather"),
        (5, "gather"),
        (6, "gather"),
        (7, "gather"),
        (7, "restore"),
    ]
    assert layout(EvoViT()) == [*expected, (8, "plan")]
    mean = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, pooling="mean")
    assert layout(EvoViT(), mean) == [*expected, (8, "plan"), (11, "restore")]
    assert layout(EvoViT(restore_last=False), mean) == layout(EvoViT())


def test_layer_wise_every_block_selects_and_gives_back():
    hooks = EvoViT(stage_wise=False).hooks(INFO)
    assert [h.layer for h in hooks if h.call == "plan"] == list(range(4, 12))
    assert [h.layer for h in hooks if h.call == "restore"] == list(range(4, 11))
    assert [h.call for h in at(hooks, "before_block", 5)] == ["plan"]


def test_keeping_all_does_nothing():
    assert EvoViT(1.0).hooks(INFO) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0}, r"keep_rate=0: must be in \(0, 1\]"),
        ({"tradeoff": 1.5}, r"tradeoff=1.5: must be in \[0, 1\]"),
        ({"layers": (0, 4)}, r"layers=\(0, 4\): must be ascending and lie in 1 to 11"),
        ({"layers": (6, 4)}, r"layers=\(6, 4\): must be ascending"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        EvoViT(**settings).hooks(INFO)


def test_another_reducer_in_between_is_refused():
    tokens = tokens_of(6).replace(carry={evovit.GLOBAL: jnp.ones((1, 9))})
    with pytest.raises(ValueError, match=r"is of 9 patches, here are 5: no other reducer"):
        EvoViT(layers=(1,), layer=1).plan(tokens, Signals())
    with pytest.raises(ValueError, match="the block before must gather it"):
        EvoViT().plan(tokens_of(6), Signals())
