"""PiToMe against its definition in loops; variants, lengths, padding, and the text encoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rows_alone

import tokjax
from tokjax.hooks import ModelInfo
from tokjax.models.text import TextConfig
from tokjax.reducers.vit import pitome
from tokjax.reducers.vit.pitome import PiToMe
from tokjax.signals import Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=12, width=8, heads=2, length=17, prefix=1, grid=(4, 4))


def drawn(n=13, width=6, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, n, width)).astype(np.float32)


def keyed(x):
    """Signals whose keys, averaged over heads, are the features."""
    return Signals(key=jnp.stack([jnp.asarray(x) + 1, jnp.asarray(x) - 1], 2))


@functools.partial(jax.jit, static_argnums=0, compiler_options=rows_alone.QUICK)
def planned(reducer, tokens, signals):
    return reducer.plan(tokens, signals)


def similarity(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def energy_by_hand(x, margin, kernel):
    n, s = len(x), similarity(x.astype(np.float64))
    out = np.zeros(n)
    for i in range(n):
        for j in range(n):
            if kernel == "elu":
                z = s[i, j] - margin
                out[i] += (z if z > 0 else math.exp(z) - 1) / n
            else:
                sigma = 1 - margin
                density = math.exp(-(((1 - s[i, j]) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))
                out[i] += density / n
    return out


def groups_by_hand(x, r, matching, margin=0.75, kernel="elu"):
    """The tokens in every output slot of one row, its own token first."""
    s, order = similarity(x.astype(np.float64)), np.argsort(-energy_by_hand(x, margin, kernel)).tolist()
    n = len(x)
    if matching == "ordered":
        a, b, before = order[: 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
    elif matching == "halves":
        a, b, before = order[:r], order[r : 2 * r], order[2 * r :]
    else:
        a, b = order[::2], order[1::2]
        best = [max(s[i, j] for j in b) for i in a]
        strongest = sorted(range(len(a)), key=lambda k: -best[k])
        a, before = [a[k] for k in strongest[:r]], [a[k] for k in strongest[r:]]
    groups = [[i] for i in before] + [[j] for j in b]
    for i in a:
        groups[len(before) + int(np.argmax([s[i, j] for j in b]))].append(i)
    assert sum(map(len, groups)) == n
    return groups


@pytest.mark.parametrize("kernel", ["elu", "gaussian"])
def test_energy_by_hand(kernel):
    x = drawn()
    for margin in (0.9, 0.2):
        ours = pitome.energy(jnp.asarray(x), margin, kernel=kernel)
        np.testing.assert_allclose(ours, [energy_by_hand(row, margin, kernel) for row in x], atol=1e-6)


def test_energy_is_high_in_crowds_and_ties_are_exact():
    rng = np.random.default_rng(0)
    axes = np.eye(8)[rng.permutation([0] * 7 + [1] * 4 + [2] * 4 + [3] * 2)]
    ours = np.asarray(jax.jit(lambda x: pitome.energy(x, 0.37))(jnp.asarray(axes[None], jnp.float32)))[0]
    crowd = axes.argmax(1)
    energies = [np.unique(ours[crowd == k]) for k in range(4)]
    assert [len(e) for e in energies] == [1] * 4
    assert energies[0] > energies[1] == energies[2] > energies[3]


@pytest.mark.parametrize("matching", ["ordered", "halves", "bipartite"])
@pytest.mark.parametrize(("n", "prefix", "rate"), [(13, 1, 0.75), (12, 0, 0.5)])
def test_matchings_by_hand(matching, n, prefix, rate):
    x = drawn(n)
    tokens = Tokens(jnp.asarray(x), prefix=prefix)
    plan = planned(PiToMe(rate, matching=matching), tokens, keyed(x))
    r = pitome.removed(rate, n - prefix)
    assert plan.map.num_out == n - r
    np.testing.assert_array_equal(plan.map.keep[:, :prefix], [range(prefix)] * 2)
    for b in range(2):
        groups = groups_by_hand(x[b, prefix:], r, matching)
        expected = np.zeros((n - prefix - r, n - prefix))
        for slot, group in enumerate(groups):
            expected[slot, group] = 1
        np.testing.assert_array_equal(plan.map.membership()[b, prefix:, prefix:], expected)
        np.testing.assert_array_equal(plan.map.keep[b, prefix:], [group[0] + prefix for group in groups])


@pytest.mark.parametrize(
    ("rate", "tokens", "expected"),
    [(0.9125, 196, 17), (0.9, 196, 19), (0.5, 17, 8), (0.95, 10, 0), (1.0, 196, 0), (0.7, 1, 0), (0.7, 0, 0)],
)
def test_lengths(rate, tokens, expected):
    assert pitome.removed(rate, tokens) == expected


def test_what_is_averaged_and_what_is_dropped():
    x, size = drawn(), np.random.default_rng(1).integers(1, 5, (2, 13)).astype(np.float32)
    tokens = Tokens(jnp.asarray(x), size=jnp.asarray(size), prefix=1)
    by_size, equally, pruned = (
        apply(planned(PiToMe(0.75, matching="ordered", how=how), tokens, keyed(x)), tokens)
        for how in ("size", "mean", "prune")
    )
    for b in range(2):
        for slot, group in enumerate(groups_by_hand(x[b, 1:], 3, "ordered"), 1):
            group = [i + 1 for i in group]
            mean = np.average(x[b, group], axis=0, weights=size[b, group])
            np.testing.assert_allclose(by_size.x[b, slot], mean, atol=1e-5)
            np.testing.assert_allclose(equally.x[b, slot], x[b, group].mean(0), atol=1e-5)
            np.testing.assert_array_equal(pruned.x[b, slot], x[b, group[0]])
            assert by_size.size[b, slot] == equally.size[b, slot] == size[b, group].sum()
            assert pruned.size[b, slot] == size[b, group[0]]
    assert not by_size.proportional
    assert apply(planned(PiToMe(0.75, "blip2"), tokens, keyed(x)), tokens).proportional


@pytest.mark.parametrize(("matching", "prefix"), [("ordered", 0), ("halves", 1), ("bipartite", 2), ("tome", 1)])
def test_padded_rows_give_what_rows_alone_give(matching, prefix):
    rows_alone.check(PiToMe(0.7, matching=matching), prefix, patches=(16, 5, 2), steps=2, holes=True)


@pytest.mark.parametrize("variant", sorted(pitome.VARIANTS))
def test_extreme_tokens_give_no_nan(variant):
    x = np.concatenate([0 * drawn(), np.ones_like(drawn()), drawn() * 1e15])
    tokens = Tokens(jnp.asarray(x), prefix=1)
    out = apply(planned(PiToMe(0.75, variant), tokens, keyed(x)), tokens)
    assert np.isfinite(out.x).all()
    assert out.length == 10


def test_the_plan_has_no_gradient_and_the_merge_has():
    x = jnp.asarray(drawn())

    def loss(x, metric):
        tokens = Tokens(x, prefix=1)
        return (apply(PiToMe(0.75).plan(tokens, keyed(metric)), tokens).x ** 2).sum()

    of_x, of_metric = jax.jit(jax.grad(loss, (0, 1)), compiler_options=rows_alone.QUICK)(x, x)
    assert (np.abs(of_x).max(-1) > 0).all()
    np.testing.assert_array_equal(of_metric, 0)


def laid_out(variant, depth=12, **settings):
    hooks = PiToMe(variant=variant, **settings).hooks(dataclasses.replace(INFO, depth=depth))
    return [(hook.layer, hook.reducer.matching, round(hook.reducer.margin, 4)) for hook in hooks]


def test_variants_lay_out_their_blocks():
    margin = [round(0.75 - 0.0625 * layer, 4) for layer in range(12)]
    late = [(i, "ordered" if i >= 6 else "bipartite", margin[i]) for i in range(12)]
    assert laid_out("deit") == late
    assert laid_out("mae") == [(i, "bipartite" if i >= 6 else "ordered", margin[i]) for i in range(12)]
    assert laid_out("blip")[0] == (1, "ordered", 0.825)
    assert len(laid_out("blip")) == 11
    assert laid_out("blip", layers=tuple(range(11)))[0] == (0, "ordered", 0.9)
    assert laid_out("clip")[-1] == (11, "ordered", 0.0792)
    llava = laid_out("llava", depth=24)
    assert [m for _, m, _ in llava] == ["tome"] * 13 + ["ordered"] * 11
    assert laid_out("text") == [(0, "halves", 0.9), (1, "halves", 0.8792), (2, "halves", 0.8583)]
    assert laid_out("deit", matching="ordered", margin=0.5, slope=0.0) == [(i, "ordered", 0.5) for i in range(12)]
    assert laid_out("deit", depth=5)[2:4] == [(2, "bipartite", 0.45), (3, "ordered", 0.3)]
    assert {hook.where for hook in PiToMe(variant="llava").hooks(INFO)} == {"after_block"}
    assert {hook.reducer.metric for hook in PiToMe(variant="clip").hooks(INFO)} == {"hidden"}


def test_rates_of_single_blocks():
    hooks = PiToMe((0.7, 1.0, 0.9)).hooks(INFO)
    assert [(hook.layer, hook.reducer.keep_rate) for hook in hooks] == [(0, 0.7), (2, 0.9)]
    assert PiToMe(1.0).hooks(INFO) == []


def test_hidden_states_match_in_place_of_keys():
    x, other = drawn(), drawn(seed=5)
    tokens = Tokens(jnp.asarray(x), prefix=1)
    by_state = planned(PiToMe(0.75, "clip"), tokens, Signals())
    by_key = planned(PiToMe(0.75, "clip", metric="keys"), tokens, keyed(x))
    np.testing.assert_array_equal(by_state.map.keep, by_key.map.keep)
    assert not np.array_equal(
        by_key.map.keep, planned(PiToMe(0.75, "clip", metric="keys"), tokens, keyed(other)).map.keep
    )


TEXT = TextConfig(vocab_size=40, length=17, width=16, depth=3, heads=2, embed_dim=6, eos_id=39)
ENDS = (16, 8, 11)


@functools.cache
def text_model():
    made = tokjax.build(TEXT)
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), made.params))


def texts():
    ids = np.random.default_rng(0).integers(0, 38, (3, TEXT.length)).astype(np.int32)
    ids[np.arange(3), ENDS] = 39
    return ids


def test_texts_merge_by_their_own_lengths():
    fast = tokjax.reduce(text_model(), "pitome", variant="text", keep_rate=0.7)
    out, trace = fast(texts(), trace=True)
    counts = np.array(ENDS)  # tokens in front of the pooled one
    for tokens in np.asarray(trace.tokens):
        counts = np.array([count - pitome.removed(0.7, count) for count in counts])
        np.testing.assert_array_equal(tokens, counts + 1)
    assert (np.asarray(trace.layers[-1].origin)[:, 0] == 0).all()
    alone = fast(texts()[1:2, : ENDS[1] + 1])
    np.testing.assert_allclose(alone[0], out[1], atol=1e-4)


def test_a_text_that_keeps_all_is_the_whole_text():
    fast = tokjax.reduce(text_model(), "pitome", variant="text", keep_rate=1.0)
    np.testing.assert_allclose(fast(texts()), text_model()(texts()), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rate": 0.4}, r"keep_rate=0.4: must be in \[0.5, 1\]"),
        ({"keep_rate": (0.9, 1.1)}, r"keep_rate=\(0.9, 1.1\): must be in \[0.5, 1\]"),
        ({"keep_rate": float("nan")}, r"keep_rate=nan"),
        ({"variant": "aug"}, r"variant='aug': must be one of deit, mae, blip, blip2, clip, llava, text"),
        ({"matching": "best"}, r"matching='best': must be one of ordered, halves, bipartite, tome"),
        ({"metric": "values"}, r"metric='values': must be one of keys, hidden"),
        ({"kernel": "relu"}, r"kernel='relu': must be one of elu, gaussian"),
        ({"how": "max"}, r"how='max': must be one of size, mean, prune"),
        ({"alpha": -1.0}, r"alpha=-1.0: must be at least 0"),
        ({"margin": 1.0, "variant": "text"}, r"margin=1.0: must be in \[-1, 1\], below 1 for the gaussian kernel"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PiToMe(**settings)


def test_plans_that_cannot_be_made():
    tokens = Tokens(jnp.asarray(drawn()), prefix=1)
    with pytest.raises(ValueError, match=r"keep_rate=\(0.9, 0.8\): a plan takes one number"):
        PiToMe((0.9, 0.8)).plan(tokens, keyed(tokens.x))
    with pytest.raises(ValueError, match=r"signals.key=None"):
        PiToMe(0.75).plan(tokens, Signals())
    with pytest.raises(ValueError, match=r"layers=\(12,\): must lie in 0 to 11"):
        PiToMe(layers=(12,)).hooks(INFO)
