"""Chains: order and blocks of the parts, how they are written down, the level that turns them all, saving."""

import jax
import numpy as np
import pytest

import tokjax
from tokjax import budget
from tokjax.models.vit import ViTConfig
from tokjax.reducers import create
from tokjax.reducers.chain import Chain
from tokjax.reducers.vit.tome import ToMe
from tokjax.reducers.vit.topk import TopK

CONFIG = ViTConfig((16, 16), 4, width=16, depth=4, heads=2, num_classes=3)


@pytest.fixture(scope="module")
def model() -> tokjax.Model:
    made = tokjax.build(CONFIG)
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), made.params))


def test_parts_run_in_their_order_also_in_one_block(model):
    parts = (("topk", {"keep_rate": 0.75, "layers": (1,)}), ("tome", {"r": 4, "layers": (1,)}))
    hooks = create("chain", parts=parts).hooks(CONFIG.info)
    assert [type(hook.reducer) for hook in hooks] == [TopK, ToMe]
    chain = tokjax.reduce(model, "chain", parts=parts)
    assert chain.token_counts() == (17, 9, 9, 9)
    one_by_one = tokjax.reduce(tokjax.reduce(model, "topk", **parts[0][1]), "tome", **parts[1][1])
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    np.testing.assert_array_equal(chain(images), one_by_one(images))
    turned = tokjax.reduce(model, "chain", parts=parts[::-1])  # 4 of 16 merge, 9 of the 12 stay
    assert turned.token_counts() == (17, 10, 10, 10)
    assert np.abs(turned(images) - chain(images)).max() > 0


def test_different_reducers_in_different_blocks(model):
    parts = (("tome", {"r": (2, 3)}), ("scored", {"score": "random", "keep_rate": 0.5, "layers": (3,)}))
    assert tokjax.reduce(model, "chain", parts=parts).token_counts() == (15, 12, 12, 7)


def test_ways_to_write_a_part():
    same = [
        ("topk", ("tome", {"r": 3, "layers": [0, 1]})),
        [["topk", {}], ["tome", {"layers": [0, 1], "r": 3}]],
        [{"name": "topk"}, {"name": "tome", "r": 3, "layers": (0, 1)}],
    ]
    chains = [create("chain", parts=parts) for parts in same]
    assert chains[0] == chains[1] == chains[2]
    assert len({hash(chain) for chain in chains}) == 1
    assert Chain(chains[0].parts) == chains[0]


def test_a_level_turns_every_part_but_those_that_are_set():
    info = CONFIG.info
    topk, tome = Chain(level=0.0).hooks(info)[0].reducer, Chain(level=0.0).hooks(info)[-1].reducer
    assert topk.keep_rate == 1 / 16 and tome.r == 8
    assert Chain(level=1.0).hooks(info)[0].reducer.keep_rate == 1
    half = Chain((("topk", {"keep_rate": 0.9}), "tome"), level=0.5).hooks(info)
    assert half[0].reducer.keep_rate == 0.9 and half[-1].reducer.r == 4


def test_a_budget_turns_the_level(model):
    found = budget.solve("chain", model, macs=0.5, parts=("evit", "tome"))
    assert found.reached and abs(found.relative - 0.5) < 0.08
    assert set(found.settings) == {"parts", "level"}


def test_chains_are_saved_and_loaded(model, tmp_path):
    parts = ({"name": "diffrate", "merge_kept": (17, 14, 12, 12)}, ("tomesd", {"layers": [0]}))
    chain = tokjax.reduce(model, "chain", parts=parts)
    tokjax.save(chain, tmp_path)
    again, images = tokjax.load(tmp_path), jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    assert again.methods[0].reducer == chain.methods[0].reducer
    np.testing.assert_array_equal(again(images), chain(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ()}, r"parts=\(\): must be at least one"),
        ({"parts": ("topk", "tomme")}, r"reducer='tomme': must be one of .* did you mean 'tome'"),
        ({"parts": (("tome", {"rate": 3}),)}, r"rate=3: tome has the settings"),
        ({"parts": (("tome", {"r": -1}),)}, r"r=-1: must be at least 0"),
        ({"parts": ("clca",)}, r"parts: 'clca' has parameters of its own"),
        ({"parts": (3,)}, r"parts: 3 must be a name"),
        ({"parts": (("tome", 3),)}, r"parts: \('tome', 3\) must be a name"),
        ({"parts": ({"r": 3},)}, r"must be a name, \(name, settings\) or a mapping with a name"),
        ({"level": 1.5}, r"level=1.5: must be in \[0, 1\]"),
    ],
)
def test_chains_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        create("chain", **settings)
