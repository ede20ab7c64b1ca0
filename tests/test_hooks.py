"""Hooks: which are refused, in which order they run, what they leave behind, and reducing around a branch."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import hooks as hk
from tokjax.hooks import Hook, ModelInfo
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit.topk import TopK
from tokjax.signals import Signals
from tokjax.token_map import HardMap, Plan, rows
from tokjax.tokens import Tokens

INFO = ModelInfo(depth=4, width=8, heads=2, length=5, prefix=1, sites=frozenset({"input", "after_block"}))
TOKENS = Tokens(jnp.arange(12.0).reshape(1, 6, 2))


@dataclasses.dataclass(frozen=True)
class Drop:
    """Drops the last `n` tokens, and says so."""

    n: int = 1

    def plan(self, tokens, signals):
        keep = jnp.broadcast_to(jnp.arange(tokens.length - self.n), (tokens.batch, tokens.length - self.n))
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(HardMap(keep, nobody, nobody, tokens.length), how="keep", aux={"dropped": self.n})


@dataclasses.dataclass(frozen=True)
class Halve:
    """Merges neighbours."""

    def plan(self, tokens, signals):
        pairs = jnp.broadcast_to(jnp.arange(0, tokens.length, 2), (tokens.batch, tokens.length // 2))
        into = jnp.broadcast_to(jnp.arange(tokens.length // 2), pairs.shape)
        return Plan(HardMap(pairs, pairs + 1, into, tokens.length), carry={"halved": tokens.length})


@dataclasses.dataclass(frozen=True)
class Nothing:
    def plan(self, tokens, signals):
        return None


@dataclasses.dataclass(frozen=True)
class Note:
    """Changes no token, but leaves a carry and a count."""

    def plan(self, tokens, signals):
        return Plan(carry={"seen": tokens.length}, aux={"length": tokens.length})


def test_equal_hooks_are_equal_static_arguments():
    assert Hook("input", 0, Drop(2)) == Hook("input", 0, Drop(2))
    assert hash(Hook("input", 0, Drop(2))) == hash(Hook("input", 0, Drop(2)))
    assert Hook("input", 0, Drop(2)) != Hook("input", 0, Drop(3))
    traces = []

    def reduced(x, hook):
        traces.append(hook)
        return hk.reduce([hook], "input", 0, TOKENS.replace(x=x), Signals())[0].x

    jitted = jax.jit(reduced, static_argnames="hook")
    jitted(TOKENS.x, hook=Hook("input", 0, Drop(2)))
    jitted(TOKENS.x, hook=Hook("input", 0, Drop(2)))
    assert len(traces) == 1


def test_check_refuses_unknown_sites_and_layers():
    hk.check([Hook("input", 0, Drop()), Hook("after_block", 3, Drop())], INFO)
    with pytest.raises(ValueError, match=r"Drop hooks in at 'around_mlp'; this model has after_block, input"):
        hk.check([Hook("around_mlp", 0, Drop())], INFO)
    for layer in (4, -1):
        with pytest.raises(ValueError, match=rf"Drop hooks in at layer {layer}; this model has layers 0 to 3"):
            hk.check([Hook("after_block", layer, Drop())], INFO)


def test_hooks_of_one_site_run_in_list_order_and_others_not():
    hooks = [
        Hook("input", 0, Drop(2)),
        Hook("input", 1, Drop(3)),
        Hook("after_block", 0, Drop(3)),
        Hook("input", 0, Halve()),
    ]
    out, _ = hk.reduce(hooks, "input", 0, TOKENS, Signals())
    np.testing.assert_allclose(out.x, TOKENS.x[:, :4].reshape(1, 2, 2, 2).mean(2))
    assert out.carry == {"halved": 4}


def test_every_plan_keeps_its_aux():
    hooks = [
        Hook("input", 0, Drop(1)),
        Hook("input", 0, Nothing()),
        Hook("input", 0, Drop(2)),
        Hook("input", 0, Note()),
    ]
    out, _ = hk.reduce(hooks, "input", 0, TOKENS, Signals())
    assert out.aux == {
        "00.input.Drop": {"dropped": 1},
        "00.input.Drop.2": {"dropped": 2},
        "00.input.Note": {"length": 3},
    }
    assert out.length == 3


def test_the_call_can_be_another_method_than_plan():
    @dataclasses.dataclass(frozen=True)
    class Cap:
        def soften(self, tokens, signals):
            return signals.replace(bias=jnp.zeros((1, 1, 1, tokens.length)))

    signals = hk.attend([Hook("attend", 2, Cap(), "soften")], 2, TOKENS, Signals())
    assert signals.bias.shape == (1, 1, 1, 6)
    assert hk.attend([Hook("attend", 2, Cap(), "soften")], 1, TOKENS, Signals()).bias is None


def test_hooks_run_under_a_named_scope():
    def reduced(x):
        return hk.reduce([Hook("input", 0, Halve())], "input", 0, TOKENS.replace(x=x), Signals())[0].x

    names = {str(eqn.source_info.name_stack) for eqn in jax.make_jaxpr(reduced)(TOKENS.x).eqns}
    assert names
    assert all(name.startswith("reducer.Halve") for name in names)


def test_around_without_hooks_just_runs():
    y, tokens = hk.around([], "around_mlp", 0, TOKENS, Signals(), lambda part: part.x + 1)
    np.testing.assert_array_equal(y, TOKENS.x + 1)
    assert tokens is TOKENS


def test_around_reduces_runs_and_unmerges():
    lengths = []

    def run(part):
        lengths.append(part.length)
        return 10 * part.x

    hooks = [Hook("around_mlp", 1, Halve()), Hook("around_mlp", 1, Drop(1)), Hook("around_mlp", 0, Drop(5))]
    y, tokens = hk.around(hooks, "around_mlp", 1, TOKENS, Signals(), run)
    means = 10 * np.asarray(TOKENS.x).reshape(1, 3, 2, 2).mean(2)
    means[:, 2] = 0  # the inner hook dropped this one: nothing comes back
    np.testing.assert_allclose(y, np.repeat(means, 2, 1))
    assert lengths == [2]
    np.testing.assert_array_equal(tokens.x, TOKENS.x)
    assert tokens.carry == {"halved": 6}
    assert tokens.aux == {"01.around_mlp.Drop": {"dropped": 1}}


def test_around_keeps_what_a_plan_without_a_map_leaves():
    hooks = [Hook("around_mlp", 0, Nothing()), Hook("around_mlp", 0, Note())]
    y, tokens = hk.around(hooks, "around_mlp", 0, TOKENS, Signals(), lambda part: part.x)
    np.testing.assert_array_equal(y, TOKENS.x)
    assert tokens.carry == {"seen": 6}
    assert tokens.aux == {"00.around_mlp.Note": {"length": 6}}


def test_signals_follow_the_tokens_from_one_hook_to_the_next():
    key = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    query, value = key + 1, key + 2
    tokens = TOKENS.replace(size=jnp.array([[1.0, 3, 1, 1, 2, 2]]))
    hooks = [Hook("after_attention", 1, Halve()), Hook("after_block", 1, Drop())]
    signals = Signals(query, key, value, tokens.attention_bias()[:, None, None])
    halved, after = hk.reduce(hooks, "after_attention", 1, tokens, signals, then="after_block")
    for ours, whole in ((after.query, query), (after.key, key), (after.value, value)):
        pairs, weight = (
            np.asarray(whole).reshape(1, 3, 2, 2, 4),
            np.array([[1, 3], [1, 1], [2, 2]])[None, :, :, None, None],
        )
        np.testing.assert_allclose(ours, (pairs * weight).sum(2) / weight.sum(2), rtol=1e-6)
    np.testing.assert_array_equal(after.bias[:, 0, 0], halved.attention_bias())
    dropped, _ = hk.reduce(hooks, "after_block", 1, halved, after)
    assert dropped.length == 2
    # Nobody comes later: nothing to move.
    assert hk.reduce(hooks[:1], "after_attention", 1, tokens, signals)[1] is signals


def test_two_methods_reduce_in_one_block():
    """Pruning and then merging in the same block: the merge sees the keys of the tokens that stayed."""
    model = tokjax.build(ViTConfig(image_size=(16, 16), patch_size=4, width=16, depth=3, heads=2, num_classes=3))
    chain = tokjax.reduce(tokjax.reduce(model, "topk", keep_rate=0.75, layers=(1,)), "tome", r=4, layers=(1,))
    assert chain.token_counts() == (17, 9, 9)  # 16 patches, 12 stay, 4 of them merge
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    module = ViT(model.config, rngs=nnx.Rngs(0))
    tokens = module.embed(images)
    tokens, _ = module.blocks[0](tokens)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look:
        def plan(self, tokens, signals):
            seen.append((tokens, signals))

    topk = Hook("after_attention", 1, TopK(keep_rate=0.75))
    module.blocks[1](tokens, [Hook("after_attention", 1, Look()), topk, Hook("after_attention", 1, Look())], 1)
    (whole, before), (kept, after) = seen
    plan = topk(whole, before)
    np.testing.assert_array_equal(after.key, rows(before.key, plan.map.keep))
    np.testing.assert_array_equal(kept.x, rows(whole.x, plan.map.keep))


def test_losses_are_summed_by_name_over_the_sites():
    aux = {
        "00.a": {"loss/ratio": jnp.float32(0.5), "kept": 3},
        "01.a": {"loss/ratio": jnp.bfloat16(0.25), "loss/flops": jnp.arange(2.0)},
        "02.b": {},
    }
    terms = hk.losses(aux)
    assert terms.keys() == {"ratio", "flops"} and all(term.dtype == jnp.float32 for term in terms.values())
    assert terms["ratio"] == 0.75
    np.testing.assert_array_equal(terms["flops"], [0.0, 1.0])
    assert hk.losses({}) == {}
