"""ToMe for Stable Diffusion: cells, draws, the gate, merging around the modules of a block, and what is refused."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import budget
from tokjax.hooks import Hook, ModelInfo
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.diffusion import tomesd
from tokjax.reducers.diffusion.tomesd import ToMeSD
from tokjax.signals import Context, Signals
from tokjax.tokens import Tokens

CONFIG = ViTConfig((16, 16), 4, width=16, depth=3, heads=2, num_classes=3)


def grid_tokens(grid=(4, 4), batch=3, prefix=0):
    n = grid[0] * grid[1] + prefix
    return Tokens(jax.random.normal(jax.random.key(0), (batch, n, 6)), prefix=prefix)


def kept(found) -> np.ndarray:
    """Destinations of every row: what stands behind the sources that stay."""
    return np.asarray(found.keep)


def test_cells_and_their_tokens():
    choice = jnp.array([[3, 0], [1, 2]])
    # 5 x 5: rows 0 to 3 and columns 0 to 3 make four cells, the edge is of sources only.
    np.testing.assert_array_equal(tomesd.destinations(choice, (5, 5), (2, 2)), [2, 6, 11, 17])
    sources = tomesd.partition(jnp.array([[2, 6, 11, 17]]), 25)
    assert sorted({*range(25)} - {2, 6, 11, 17}) == np.asarray(sources)[0].tolist()
    # Wide cells: three across, two down.
    np.testing.assert_array_equal(tomesd.destinations(jnp.array([[5, 0]]), (2, 6), (2, 3)), [3, 8])


def test_strongest_proposals_merge_and_come_back():
    x = jnp.array([[[1.0, 0], [0, 1], [1, 0.1], [1, 0.5]]])  # one cell, token 0 receives
    found = tomesd.match(x, jnp.array([[0]]), 2)
    np.testing.assert_array_equal(found.moved, [[2, 3]])
    np.testing.assert_array_equal(found.keep, [[1, 0]])
    np.testing.assert_array_equal(found.dest(), [[1, 0, 1, 1]])
    assert tomesd.match(x, jnp.array([[0]]), 99).num_out == 1
    assert tomesd.match(x, jnp.array([[0]]), 0) is None


def test_one_grid_for_the_batch_and_one_a_key():
    tokens = grid_tokens((8, 8))

    def chosen(context, layer=0):
        reducer = ToMeSD(merge_rate=0.75, layer=layer)
        return np.sort(kept(reducer.map(tokens, context.replace(grid=(8, 8)))), -1)

    one = chosen(Context(key=jax.random.key(1)))
    assert (one == one[:1]).all()
    for cell in one[0]:  # one token of every cell
        assert ((one[0] // 16 == cell // 16) & (one[0] % 8 // 2 == cell % 8 // 2)).sum() == 1
    assert (chosen(Context(key=jax.random.key(1))) == one).all()
    assert (chosen(Context(key=jax.random.key(2))) != one).any()
    assert (chosen(Context(key=jax.random.key(1)), layer=1) != one).any()
    rows = chosen(Context(key=jax.random.split(jax.random.key(1), 3)))
    assert (rows[0] != rows[1]).any()
    seeded = chosen(Context())
    assert (seeded == seeded[:1]).all() and (chosen(Context()) == seeded).all()
    top_left = ToMeSD(merge_rate=0.75, use_rand=False).map(tokens, Context(grid=(8, 8)))
    expected = [8 * i + j for i in range(0, 8, 2) for j in range(0, 8, 2)]
    assert (np.sort(kept(top_left), -1) == expected).all()


def test_the_gate():
    assert tomesd.gate((64, 64), 4096, 1) == (64, 64)
    assert tomesd.gate((64, 64), 1024, 1) is None
    assert tomesd.gate((64, 64), 1024, 2) == (32, 32)
    assert tomesd.gate((65, 33), 33 * 17, 2) == (33, 17)


@pytest.mark.parametrize("grid", [(1, 8), (8, 1)])
def test_a_grid_without_a_whole_cell_does_nothing(grid):
    assert ToMeSD().map(grid_tokens(grid), Context(grid=grid)) is None


def test_blocks_below_the_gate_do_nothing():
    reducer, tokens = ToMeSD(), grid_tokens((4, 4))
    plan = reducer.match(tokens, Signals(context=Context(grid=(8, 8))))
    assert plan.carry == {"tomesd": None}
    assert reducer.plan(tokens.replace(carry=plan.carry), Signals()) is None


def test_the_prefix_never_merges():
    tokens = grid_tokens(prefix=2)
    tokens = tokens.replace(x=jnp.ones_like(tokens.x))
    found = ToMeSD(merge_rate=0.75).map(tokens, Context(grid=(4, 4)))
    np.testing.assert_array_equal(found.keep[:, :2], [[0, 1]] * 3)
    assert found.num_in == 18 and found.num_out == 2 + 4
    assert (np.asarray(found.into) >= 2).all()


def test_modules_run_on_fewer_tokens_and_the_stream_keeps_its_length():
    seen = []

    class Look:
        def plan(self, tokens, signals):
            seen.append(tokens.length)

    look = [Hook(where, 1, Look()) for where in ("around_attention", "around_mlp", "after_block")]
    model, info = ViT(CONFIG, rngs=nnx.Rngs(0)), CONFIG.info
    for settings, expected in (
        ({"merge_mlp": True}, [9, 9, 17]),
        ({}, [9, 17, 17]),
        ({"merge_attn": False, "merge_mlp": True, "merge_rate": 0.9}, [17, 5, 17]),
        ({"layers": (0,)}, [17, 17, 17]),
    ):
        seen.clear()
        model(jnp.zeros((1, 16, 16, 3)), [*ToMeSD(**settings).hooks(info), *look])
        assert seen == expected


def test_the_plan_is_made_from_what_enters_the_block():
    """All modules of a block share it, though the features have changed at the second."""
    info, tokens = CONFIG.info, grid_tokens(prefix=1)
    hooks = ToMeSD(merge_mlp=True, layers=(0,)).hooks(info)
    assert [hook.where for hook in hooks] == ["before_block", "around_attention", "around_mlp"]
    planned = hooks[0](tokens, Signals(context=Context(grid=(4, 4))))
    later = tokens.replace(x=-tokens.x[:, ::-1], carry=planned.carry)
    for hook in hooks[1:]:
        np.testing.assert_array_equal(hook(later, Signals()).map.into, planned.carry["tomesd"].into)


def test_cheaper_attention_or_cheaper_blocks():
    model = tokjax.build(CONFIG)
    half = budget.solve("tomesd", model, macs=0.5, merge_mlp=True)
    assert half.reached and abs(half.relative - 0.5) < 0.05
    assert min(half.model.token_counts()) < 17
    alone = budget.solve("tomesd", model, macs=0.3)
    assert not alone.reached and alone.model.token_counts() == (17, 17, 17)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_rate": 1.0}, r"merge_rate=1.0: must be in \[0, 1\)"),
        ({"merge_rate": float("nan")}, r"merge_rate=nan"),
        ({"sx": 0}, r"sx=0: must be at least 1"),
        ({"max_downsample": 0}, r"max_downsample=0: must be at least 1"),
        ({"merge_attn": False}, r"merge_attn=False: one of"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ToMeSD(**settings)


def test_models_and_tokens_that_are_refused():
    with pytest.raises(ValueError, match="grid=None: tomesd needs"):
        ToMeSD().hooks(ModelInfo(2, 8, 2, 17, 1))
    with pytest.raises(ValueError, match="hooks in at 'around_cross_attention'; this model has"):
        tokjax.reduce(tokjax.build(CONFIG), "tomesd", merge_crossattn=True)
    with pytest.raises(ValueError, match="15 tokens: are no grid of 4 x 4"):
        ToMeSD().map(grid_tokens((3, 5)), Context(grid=(4, 4)))
    with pytest.raises(ValueError, match="18 tokens: are no grid of 4 x 4"):
        ToMeSD().map(grid_tokens((3, 6)), Context(grid=(4, 4)))
    pruned = tokjax.reduce(tokjax.build(CONFIG), "topk", layers=(1,))
    with pytest.raises(ValueError, match="tokens: tomesd planned for 17"):
        tokjax.reduce(pruned, "tomesd", merge_attn=False, merge_mlp=True, layers=(1,)).token_counts()
