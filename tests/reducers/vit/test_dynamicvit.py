"""DynamicViT: pruning by score, masking that equals pruning, decisions that stay, gradients for the scores."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import Hook
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit import dynamicvit
from tokjax.reducers.vit.dynamicvit import DynamicViT, keep_decision
from tokjax.reducers.vit.staged import select
from tokjax.signals import Context, Signals
from tokjax.token_map import Plan, apply
from tokjax.tokens import Tokens

CFG = ViTConfig((16, 16), 4, width=16, depth=3, heads=2, num_classes=5)


def tokens_of(batch=2, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 17, 16)), jnp.float32)
    return Tokens(x, prefix=1, **fields)


def test_the_best_scores_stay_from_best_to_worst():
    stage, tokens = DynamicViT(CFG.info, kept=5).stages[0], tokens_of()
    plan = stage.plan(tokens, Signals())
    score = stage.predictor(tokens.x[:, 1:], jnp.ones((2, 16)))
    np.testing.assert_allclose(jnp.exp(score).sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(plan.map.keep[:, 1:], np.argsort(-score[..., 0], -1)[:, :5] + 1)
    assert plan.how == "keep"


def test_dropped_tokens_do_not_speak_for_the_mean():
    predictor = DynamicViT(CFG.info).stages[0].predictor
    z, left = tokens_of().x[:, 1:], jnp.arange(16) < jnp.array([[9], [16]])
    other = jnp.where(left[..., None], z, 5.0)
    a, b = (predictor(x, left.astype(jnp.float32)) for x in (z, other))
    np.testing.assert_allclose(a[0, :9], b[0, :9], atol=1e-6)
    assert np.isfinite(predictor(z, jnp.zeros((2, 16)))).all()


def test_a_decision_is_hard_final_and_has_the_gradient_of_the_soft_one():
    logprob = jnp.log(jnp.array([[[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]]]))
    noise, previous = jnp.zeros((1, 3, 2)), jnp.array([[1.0, 1.0, 0.0]])
    np.testing.assert_allclose(keep_decision(logprob, noise, previous), [[1, 0, 0]], atol=1e-6)
    gradient = jax.grad(lambda l: keep_decision(l, noise, previous).sum())(logprob)
    soft = jax.grad(lambda l: (jax.nn.softmax(l, -1)[..., 0] * previous).sum())(logprob)
    np.testing.assert_allclose(gradient, soft, atol=1e-6)
    assert np.abs(gradient[0, 1]).max() > 0 and not gradient[0, 2].any()


def test_masking_gives_what_pruning_gives():
    """The class token of a masked sequence is that of a sequence from which the same tokens were removed."""
    graphdef, state = nnx.split(ViT(CFG, rngs=nnx.Rngs(0)))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(1).normal(0, 0.3, leaf.shape), jnp.float32),
        nnx.to_pure_dict(state),
    )
    keep = np.sort(np.stack([np.random.default_rng(b).permutation(16)[:7] for b in range(2)]), -1)
    decision = np.zeros((2, 16), np.float32)
    np.put_along_axis(decision, keep, 1, 1)

    @dataclasses.dataclass(frozen=True)
    class Told:
        def plan(self, tokens, seen):
            return Plan(carry={dynamicvit.DECISION: jnp.asarray(decision)})

    stage = DynamicViT(CFG.info, layers=(1,)).stages[0]
    masked = [Hook("before_block", 1, Told())] + [Hook("attend", i, stage, "attend") for i in (1, 2)]

    @dataclasses.dataclass(frozen=True)
    class Pruned:
        def plan(self, tokens, seen):
            return Plan(select(tokens, jnp.asarray(keep + 1)), how="keep")

    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 16, 16, 3)), jnp.float32)
    model = nnx.merge(graphdef, params)
    a, b = (model(images, hooks).logits for hooks in (masked, [Hook("before_block", 1, Pruned())]))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    assert np.abs(a - model(images).logits).max() > 1e-2


def test_masking_keeps_the_length_notes_decisions_and_learns():
    reducer = DynamicViT(CFG.info, 0.5, layers=(0, 1), masked=True)
    hooks = reducer.hooks(CFG.info)
    assert [(h.where, h.layer) for h in hooks] == [
        ("input", 0),
        *(("before_block", i) for i in (0, 1)),
        *(("attend", i) for i in (0, 1, 2)),
    ]
    first, second = reducer.stages
    signals, tokens = Signals(context=Context(key=jax.random.key(0))), tokens_of(valid=jnp.arange(17) < 12)
    tokens = tokens.replace(valid=jnp.broadcast_to(tokens.valid, (2, 17)))
    one = apply(first.decide(tokens, signals), tokens)
    two = second.decide(one, signals)
    assert one.length == 17
    was, now = one.carry[dynamicvit.DECISION], two.aux["decision"]
    assert not was[:, 11:].any() and 0 < now.sum() < was.sum() and (now <= was + 1e-6).all()
    assert two.aux["logprob"].shape == (2, 16, 2)
    graph, params = nnx.split(first)

    def rate(params):
        return nnx.merge(graph, params).decide(tokens, signals).aux["decision"].mean()

    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.grad(rate)(params)))


def test_the_ratio_loss_is_of_each_rows_own_share():
    valid = jnp.arange(17) < jnp.array([[17], [9]])
    tokens, info = tokens_of(valid=valid), CFG.info
    signals = Signals(context=Context(key=jax.random.key(0)))
    for settings, targets in (
        ({"keep_rate": 0.5}, (0.5, 0.25)),
        ({"kept": (6, 4)}, ((6 / 16, 6 / 8), (4 / 16, 4 / 8))),
    ):
        reducer = DynamicViT(info, layers=(0, 1), masked=True, ratio_weight=3.0, **settings)
        now = tokens
        for stage, target in zip(reducer.stages, targets, strict=True):
            plan = stage.decide(now, signals)
            share = np.asarray(plan.aux["decision"]).sum(1) / (16, 8)
            np.testing.assert_allclose(plan.aux["loss/ratio"], 3 / 2 * (share - np.array(target)) ** 2, rtol=1e-5)
            now = apply(plan, now)
    empty = tokens.replace(valid=jnp.arange(17) < jnp.array([[1], [9]]))  # a row without patches
    assert np.isfinite(reducer.stages[0].decide(empty, signals).aux["loss/ratio"]).all()


@pytest.mark.parametrize("padded", [False, True])
def test_masking_without_draws_keeps_what_pruning_keeps(padded):
    """The same parameters in both forms, whole models: as many tokens, the same features."""
    rng = np.random.default_rng(4)
    graphdef, state = nnx.split(ViT(CFG, rngs=nnx.Rngs(0)))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), state))
    pruning = DynamicViT(CFG.info, 0.6, layers=(1, 2))
    learned = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), nnx.state(pruning))
    masking = DynamicViT(CFG.info, 0.6, layers=(1, 2), masked=True, sampled=False)
    images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    valid = jnp.arange(17) < jnp.array([[17], [10]]) if padded else None
    outs = []
    for reducer in (pruning, masking):
        nnx.update(reducer, learned)
        hooks = reducer.hooks(CFG.info)
        run = jax.jit(
            lambda images, hooks=hooks: model.encode(model.embed(images).replace(valid=valid).traced(), hooks)
        )
        outs.append(run(images))
    pruned, masked = outs
    kept = np.asarray(masked.tokens.carry[dynamicvit.DECISION])
    np.testing.assert_array_equal(kept.sum(1).round(), (5, 3) if padded else (5, 5))
    np.testing.assert_array_equal(kept > 0.5, np.asarray(pruned.tokens.origin)[:, 1:] < pruned.tokens.length)
    np.testing.assert_allclose(masked.logits, pruned.logits, atol=1e-4 * np.abs(pruned.logits).max())


def test_a_row_draws_the_same_with_padding_and_without():
    reducer, rng = DynamicViT(CFG.info, 0.5, layers=(1,), masked=True), np.random.default_rng(3)
    signals, tokens = Signals(context=Context(key=jax.random.split(jax.random.key(1), 2))), tokens_of()
    inside = np.ones((2, 17), bool)
    inside[1, 1 + rng.permutation(16)[:7]] = False
    padded = reducer.stages[0].decide(tokens.replace(valid=jnp.asarray(inside)), signals).carry[dynamicvit.DECISION]
    for row in range(2):
        alone = Tokens(tokens.x[row : row + 1, inside[row]], prefix=1)
        own = Signals(context=Context(key=signals.context.key[row : row + 1]))
        decided = reducer.stages[0].decide(alone, own).carry[dynamicvit.DECISION][0]
        np.testing.assert_allclose(padded[row][inside[row, 1:]], decided, atol=1e-6)
        assert 0 < decided.sum() < len(decided)
    np.testing.assert_array_equal(padded[1][~inside[1, 1:]], 0)


def test_keeping_all_does_nothing_and_parameters_fit_one_width():
    assert DynamicViT(CFG.info, 1.0).hooks(CFG.info) == [] == DynamicViT(CFG.info, 1.0, masked=True).hooks(CFG.info)
    with pytest.raises(ValueError, match="ratio_weight=-1: must be at least 0 and finite"):
        DynamicViT(CFG.info, ratio_weight=-1)
    with pytest.raises(ValueError, match="width=8: these parameters were made for width=16"):
        DynamicViT(CFG.info).hooks(dataclasses.replace(CFG.info, width=8))
