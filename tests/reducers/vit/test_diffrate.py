"""DiffRate: the released tables, how they become counts, what is pruned and merged, sizes and padded rows."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

import tokjax
from tokjax import budget
from tokjax.bench.flops import vit_macs
from tokjax.hooks import ModelInfo
from tokjax.models.vit import ViTConfig, preset
from tokjax.reducers.vit import diffrate
from tokjax.reducers.vit.diffrate import DiffRate
from tokjax.reducers.vit.staged import NOTING
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

SHAPES = {  # width, patch side, patches
    "ViT-T-DeiT": (192, 16, 196),
    "ViT-S-DeiT": (384, 16, 196),
    "ViT-B-DeiT": (768, 16, 196),
    "ViT-B-MAE": (768, 16, 196),
    "ViT-L-MAE": (1024, 16, 196),
    "ViT-H-MAE": (1280, 14, 256),
}
NAMES = sorted(diffrate.released())
VITS = [name for name in NAMES if name.startswith("ViT")]


def info_of(model: str, depth: int) -> ModelInfo:
    width, _, patches = SHAPES[model]
    return ModelInfo(
        depth, width, width // 64, patches + 1, 1, pooling="cls" if model.endswith("DeiT") else "size_mean"
    )


@pytest.mark.parametrize("name", VITS)
def test_released_rates_cost_what_is_printed_beside_them(name):
    entry, model = diffrate.released()[name], name.split("/")[0]
    width, side, patches = SHAPES[model]
    hooks = DiffRate(rates=name).hooks(info_of(model, len(entry["prune"])))
    given = DiffRate(prune_kept=tuple(entry["prune"]), merge_kept=tuple(entry["merge"])).hooks(
        info_of(model, len(entry["prune"]))
    )
    for layout in (hooks, given):  # shares give the published counts back
        counts = {hook.layer: 1 + min(hook.reducer.counts(patches, 1)) for hook in layout if hook != NOTING}
        before, after, now = [], [], patches + 1
        for layer in range(len(entry["prune"])):
            before.append(now)
            now = min(now, counts.get(layer, now))
            after.append(now)
        macs = vit_macs(before, after, width=width, patch=side, num_patches=patches, convention="diffrate")
        assert abs(macs / 1e9 - entry["gmacs"]) < 6e-5


def test_rates_of_the_model_that_is_most_like():
    for size, patch, pooling, name in (
        ("ti", 16, "cls", "ViT-T-DeiT/0.8"),
        ("s", 16, "cls", "ViT-S-DeiT/2.7"),
        ("b", 32, "cls", "ViT-B-DeiT/10.4"),
        ("b", 16, "size_mean", "ViT-B-MAE/10.4"),
        ("l", 16, "cls", "ViT-L-MAE/38.5"),
        ("h", 14, "mean", "ViT-H-MAE/103.4"),
    ):
        assert diffrate.fitting(preset(f"{size}/{patch}", pooling=pooling).info) == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 4, 12, 27])
def test_shares_fall_at_any_depth_and_strength(name, depth):
    for strength in (0.0, 0.5, 1.0, 3.0):
        pairs = diffrate.shares(name, depth, strength)
        assert len(pairs) == depth
        until, left = np.transpose(pairs)
        assert (np.diff(left) <= 1e-12).all() and left[-1] > 0
        assert (until >= left).all() and (until <= 1).all()
    assert set(diffrate.shares(name, depth, 0.0)) == {(1.0, 1.0)}


def test_only_the_stage_of_caformer_that_is_compressed_counts():
    pairs = diffrate.shares("CAFormer-S36/5.6", 18)
    assert pairs[1] == (1.0, 162 / 196) and pairs[16][1] == 45 / 196 == pairs[17][1]


def attended(scores):
    scores = jnp.asarray(scores, jnp.float32)
    b, n = scores.shape
    return Signals(weights=jnp.full((b, 1, n, n), 1 / n).at[:, 0, 0].set(scores))


def test_the_tail_is_dropped_and_the_part_before_it_merges():
    x = jnp.array([[[9.0, 9], [1, 0], [0, 2], [3, 0.3], [5, 5], [0, 4]]])
    size = jnp.array([[1.0, 2, 3, 4, 5, 6]])
    tokens = Tokens(x, size=size, prefix=1).traced()
    # Order of attention: 2, 1, 3, 5, 4; two stay, two merge, the last is dropped.
    plan = DiffRate(prune_kept=5, merge_kept=3).plan(tokens, attended([[0.5, 0.2, 0.3, 0.1, 0.0, 0.05]]))
    out = apply(plan, tokens)
    np.testing.assert_array_equal(plan.map.keep, [[0, 2, 1]])
    np.testing.assert_array_equal(out.origin, [[0, 2, 1, 2, 3, 1]])
    np.testing.assert_allclose(out.x, [[[9, 9], [0, 3], [2, 0.15]]], rtol=1e-6)  # each token counts once
    cosine = 3 / math.hypot(3, 0.3)
    np.testing.assert_allclose(out.size, [[1, 3 + 6, 2 + 4 * cosine]], rtol=1e-6)
    plain = apply(
        DiffRate(prune_kept=5, merge_kept=3, sizes="count").plan(tokens, attended([[0.5, 0.2, 0.3, 0.1, 0.0, 0.05]])),
        tokens,
    )
    np.testing.assert_array_equal(plain.size, [[1, 9, 6]])


def test_nothing_merges_into_the_prefix_even_if_it_is_the_same():
    x = jnp.array([[[1.0, 0], [0, 1], [-1, 0.1], [1, 0]]])
    plan = DiffRate(merge_kept=3).plan(Tokens(x, prefix=2), attended([[0, 0, 0.9, 0.1]]))
    np.testing.assert_array_equal(plan.map.into, [[2]])


@pytest.mark.parametrize(("least", "size"), [(1e-6, 1e-6), (0.5, 0.5), (None, -4.0)])
def test_negative_similarities_do_not_take_a_size_below_its_bound(least, size):
    x = jnp.array([[[1.0, 1], [1, 0], [-1, 0]]])
    tokens = Tokens(x, size=jnp.array([[1.0, 1, 5]]), prefix=1)
    out = apply(DiffRate(merge_kept=2, min_size=least).plan(tokens, attended([[0.5, 0.4, 0.1]])), tokens)
    np.testing.assert_allclose(out.size, [[1, size]], rtol=1e-6)


def test_pruning_alone_tracks_no_sizes():
    tokens = Tokens(jnp.arange(10.0).reshape(1, 5, 2), prefix=1)
    out = apply(DiffRate(prune_kept=3).plan(tokens, attended([[0, 0.1, 0.4, 0.3, 0.2]])), tokens)
    assert out.size is None
    np.testing.assert_array_equal(out.x, tokens.x[:, jnp.array([0, 2, 3])])


@pytest.mark.parametrize(
    ("reducer", "prefix", "holes"),
    [
        (DiffRate(prune_kept=12, merge_kept=9), 1, False),
        (DiffRate(prune_kept=7, merge_kept=5), 2, True),
        (DiffRate(merge_kept=6), 0, True),
    ],
)
def test_padded_rows_give_what_rows_alone_give(reducer, prefix, holes):
    rows_alone.check(reducer, prefix, holes=holes, steps=1)


def test_padded_rows_keep_their_own_shares():
    note, *hooks = DiffRate(rates="ViT-S-DeiT/2.3").hooks(ModelInfo(12, 8, 2, 17, 1))
    valid = jnp.arange(17) < jnp.array([[17], [9], [2], [1]])
    tokens = Tokens(jnp.asarray(np.random.default_rng(0).normal(size=(4, 17, 3)), jnp.float32), valid=valid, prefix=1)
    tokens = apply(note(tokens, Signals()), tokens)
    for hook in hooks:
        n = tokens.length
        signals = attended(np.linspace(1, 0, n)[None].repeat(4, 0))
        tokens = apply(hook.reducer.plan(tokens, signals), tokens)
        left = diffrate.shares("ViT-S-DeiT/2.3", 12)[hook.layer][1]
        expected = [1 + (diffrate.counted(left, patches) if patches else 0) for patches in (16, 8, 1, 0)]
        np.testing.assert_array_equal(tokens.count(), expected)
    assert tokens.length == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": "ViT-S-DeiT/3"}, r"rates='ViT-S-DeiT/3': must be one of ViT-T-DeiT/0.6, "),
        ({"strength": -1.0}, r"strength=-1.0: must be at least 0"),
        ({"strength": float("nan")}, r"strength=nan"),
        ({"rates": "ViT-S-DeiT/2.9", "prune_kept": (3,)}, r"do not go with prune_kept"),
        ({"merge_kept": (5, 0)}, r"merge_kept=\(5, 0\): must be at least 1"),
        ({"sizes": "none"}, r"sizes='none': must be one of similarity, count"),
        ({"min_size": 0.0}, r"min_size=0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffRate(**settings)


def test_layouts_that_cannot_be():
    info = ModelInfo(4, 8, 2, 17, 2)
    with pytest.raises(ValueError, match=r"prune_kept=\(9, 5\): must have one number for each of 4 blocks"):
        DiffRate(prune_kept=(9, 5)).hooks(info)
    with pytest.raises(ValueError, match=r"merge_kept=\(9, 5, 5, 2\): must be above 2"):
        DiffRate(merge_kept=(9, 5, 5, 2)).hooks(info)
    with pytest.raises(ValueError, match=r"prune_kept=None, merge_kept=None: a plan takes one number each"):
        DiffRate().plan(Tokens(jnp.ones((1, 5, 2)), prefix=1), attended([[0.2] * 5]))


def test_strength_reaches_every_budget():
    model = tokjax.build(ViTConfig((32, 32), 4, width=32, depth=12, heads=2, num_classes=5))
    for target in (0.3, 0.6, 0.9):
        found = budget.solve("diffrate", model, macs=target)
        assert found.reached and abs(found.relative - target) < 0.01
