"""Hooks: which are refused, in which order they run, what they leave behind, and reducing around a branch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import hooks as hk
from tokjax.hooks import Hook, ModelInfo
from tokjax.signals import Signals
from tokjax.token_map import HardMap, Plan
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
        return hk.reduce([hook], "input", 0, TOKENS.replace(x=x), Signals()).x

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
    out = hk.reduce(hooks, "input", 0, TOKENS, Signals())
    np.testing.assert_allclose(out.x, TOKENS.x[:, :4].reshape(1, 2, 2, 2).mean(2))
    assert out.carry == {"halved": 4}


def test_every_plan_keeps_its_aux():
    hooks = [
        Hook("input", 0, Drop(1)),
        Hook("input", 0, Nothing()),
        Hook("input", 0, Drop(2)),
        Hook("input", 0, Note()),
    ]
    out = hk.reduce(hooks, "input", 0, TOKENS, Signals())
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
        return hk.reduce([Hook("input", 0, Halve())], "input", 0, TOKENS.replace(x=x), Signals()).x

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
