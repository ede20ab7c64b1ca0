"""Knobs turned to a target: reached within one step of the knob, or the reachable range is told."""

import re

import numpy as np
import pytest

import tokjax
from tokjax import budget
from tokjax.bench.flops import vit_macs
from tokjax.models.decoder import DecoderConfig
from tokjax.models.t5 import Seq2Seq, T5Config
from tokjax.models.vit import ViTConfig
from tokjax.reducers import REGISTRY, create


@pytest.fixture(scope="module")
def model() -> tokjax.Model:
    return tokjax.build(ViTConfig((24, 24), 4, width=16, depth=4, heads=2, num_classes=5))


def neighbours(found: budget.Solution, name: str, model: tokjax.Model, cost) -> list[float]:
    """Relative costs one step of the knob below and above the solution, which may stand between two of its values."""
    knob = REGISTRY[name].knob
    values, value = knob.values(model.info), np.mean(found.settings[knob.field])
    below = [v for v in values if v < value][-1:] if values[0] < values[-1] else [v for v in values if v > value][-1:]
    above = [v for v in values if v > value][:1] if values[0] < values[-1] else [v for v in values if v < value][:1]
    beside = [{**found.settings, knob.field: v} for v in below + above]
    return [cost(tokjax.reduce(model, name, **settings)) / cost(model) for settings in beside]


def macs(model: tokjax.Model) -> float:
    return model.cost().total


LEARNED = sorted(name for name, entry in REGISTRY.items() if entry.knob.learned)


@pytest.mark.parametrize("name", LEARNED)
def test_a_cost_that_comes_by_training_is_not_solved_for(model, name):
    with pytest.raises(ValueError, match=f"name='{name}': reaches a cost by training alone; give it target=0.7"):
        budget.solve(name, model, macs=0.7)


SOLVED = sorted(n for n, entry in REGISTRY.items() if not (entry.guided or entry.knob.learned or entry.decoder))


@pytest.mark.parametrize("name", SOLVED)
def test_target_is_reached_within_a_step_of_the_knob(model, name):
    target = 0.85 if name == "prompt_merging" else 0.7  # it merges half of the tokens at most, and once
    found = budget.solve(name, model, macs=target)
    assert found.reached and found.target == target
    assert found.macs == macs(found.model) and found.relative == found.macs / macs(model)
    method = found.model.methods[-1]
    assert method.name == name and found.settings == method.settings
    if not REGISTRY[name].learned:
        assert method.reducer == create(name, **found.settings)
    steps = neighbours(found, name, model, macs)
    assert all(abs(found.relative - target) <= abs(step - target) for step in steps)
    assert min(steps) <= target <= max(steps)


def test_a_reducer_that_is_guided_in_training_only_reaches_nothing(model):
    found = budget.solve("a_clip", model, macs=0.7)
    assert not found.reached and found.relative == 1


def test_settings_between_the_knobs_values_come_nearer(model):
    whole = [macs(tokjax.reduce(model, "tome", r=r)) / macs(model) for r in range(5)]
    target = (whole[1] * 3 + whole[2]) / 4  # between one and two tokens a block
    found = budget.solve("tome", model, macs=target)
    assert found.settings["r"] == (2, 1, 1, 1)
    assert abs(found.relative - target) < min(abs(share - target) for share in whole)
    rated = budget.solve("evit", model, macs=0.62, layers=(0, 1, 2, 3))
    assert abs(rated.relative - 0.62) < 0.02


def test_several_targets_are_solved_as_one(model):
    found = budget.solve("topk", model, macs=[0.8, 0.6])
    for solution, target in zip(found, (0.8, 0.6), strict=True):
        alone = budget.solve("topk", model, macs=target)
        assert (solution.settings, solution.relative, solution.target) == (alone.settings, alone.relative, target)
    with pytest.raises(ValueError, match=r"macs=0: must be in"):
        budget.solve("topk", model, macs=[0.8, 0])


def test_target_of_tokens(model):
    found = budget.solve("tome", model, tokens=0.6)
    assert budget.mean_tokens(model) == 37
    assert found.relative == budget.mean_tokens(found.model) / 37
    steps = neighbours(found, "tome", model, budget.mean_tokens)
    assert all(abs(found.relative - 0.6) <= abs(step - 0.6) for step in steps)


def test_target_of_a_decoders_cache_and_reading():
    sizes = {"width": 16, "hidden": 24, "depth": 3, "heads": 2, "kv_heads": 1, "head_width": 8, "vocab_size": 20}
    decoder = tokjax.build(DecoderConfig(length=40, **sizes))
    whole = decoder.cache_bytes()
    assert whole == 3 * 40 * 2 * 8 * 4 + 40 * 10  # keys and values of every layer, and what slots hold
    found = budget.solve("snapkv", decoder, cached=0.5)
    assert found.relative == found.model.cache_bytes() / whole == pytest.approx(0.5, abs=0.03)
    few = budget.solve("fastv", decoder, cached=0.2, layer=1)
    assert few.unreachable == f"reaches {few.reachable[0]:.2f} to 1.00 of the cache" and few.settings["keep_rate"] == 0
    read = budget.solve("fastv", decoder, macs=0.7, phase="prefill", layer=1)
    assert read.macs == read.model.cost(phase="prefill").total
    assert read.relative == read.macs / decoder.cost(phase="prefill").total == pytest.approx(0.7, abs=0.03)
    none = budget.solve("snapkv", decoder, macs=0.7, phase="prefill")
    assert not none.reached and none.relative >= 1  # it reads all of the prompt


def test_a_cache_of_a_model_without_one(model):
    with pytest.raises(ValueError, match="needs a Decoder"):
        budget.solve("topk", model, cached=0.5)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """From all alike to all different patches."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(6, 24, 24, 3)) * np.linspace(0, 3, 6)[:, None, None, None]).astype(np.float32)


def test_cost_of_a_batch_counts_valid_tokens_alone(model, images):
    fast = tokjax.reduce(model, "ats", keep_rate=0.9)
    trace = fast(images, trace=True)[1]
    assert len({*trace.tokens[-1]}) > 1 and trace.tokens[-1].max() < trace.layers[-1].length
    sizes = {"width": 16, "patch": 4, "num_patches": 36, "classes": 5}
    alone = [vit_macs((37, *row[:-1]), row, **sizes) for row in trace.tokens.T.tolist()]
    assert budget.counted_macs(fast, images) == round(np.mean(alone)) + fast.cost().reducer
    assert budget.mean_tokens(fast, images) == trace.tokens.mean() < budget.mean_tokens(fast)


@pytest.mark.parametrize(("name", "settings"), [("topk", {}), ("dpcknn", {"layers": (0, 2)}), ("evovit", {})])
def test_cost_of_a_batch_is_the_cost_where_lengths_are_static(model, images, name, settings):
    fast = tokjax.reduce(model, name, **settings)
    assert budget.counted_macs(fast, images) == macs(fast)


@pytest.mark.parametrize("target", [{"macs": 0.7}, {"tokens": 0.8}])
def test_target_on_a_batch(images, target):
    model = tokjax.build(ViTConfig((24, 24), 4, width=16, depth=2, heads=2, num_classes=5))
    found = budget.solve("ats", model, inputs=images, **target)
    assert found.reached and found.macs == budget.counted_macs(found.model, images) < macs(found.model)

    reached = budget.counted_macs if "macs" in target else budget.mean_tokens
    assert found.relative == reached(found.model, images) / reached(model, images)
    assert abs(found.relative - next(iter(target.values()))) < 0.03


def test_the_whole_model_is_a_target(model):
    found = budget.solve("topk", model, macs=1.0)
    assert found.settings == {"keep_rate": 1.0} and found.relative == 1.0 and found.reached


def test_target_below_reach_gives_the_cheapest(model):
    found = budget.solve("topk", model, macs=0.01, layers=(0,))
    low, high = found.reachable
    assert not found.reached and 0.01 < low < high == 1.0
    assert found.relative == low and found.settings == {"layers": (0,), "keep_rate": 1 / 36}


def test_target_above_reach_gives_the_dearest(model):
    found = budget.solve("tome", model, macs=0.95, matching="kth")  # which halves the tokens whatever r is
    assert not found.reached and found.relative == found.reachable[1] < 0.95


def test_settings_and_reducers_that_stay(model):
    pruned = tokjax.reduce(model, "topk", keep_rate=0.5, layers=(2,))
    found = budget.solve("tome", pruned, macs=0.8, layers=(0,))
    assert [m.name for m in found.model.methods] == ["topk", "tome"]
    assert found.relative == macs(found.model) / macs(pruned)
    assert found.settings["layers"] == (0,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "macs=None, tokens=None, cached=None: give one of them"),
        ({"macs": 0.5, "tokens": 0.5}, "macs=0.5, tokens=0.5, cached=None: give one of them"),
        ({"macs": 0}, "macs=0: must be in (0, 1]"),
        ({"tokens": 1.5}, "tokens=1.5: must be in (0, 1]"),
        ({"macs": 0.5, "r": 3}, "r=3: is what solve turns"),
        ({"macs": 0.5, "rate": 3}, "rate=3: tome has the settings"),
    ],
)
def test_what_solve_refuses(model, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        budget.solve("tome", model, **settings)
    with pytest.raises(ValueError, match="did you mean 'tome'"):
        budget.solve("tomee", model, macs=0.5)


def test_a_gate_in_a_text_encoder_is_counted_by_what_it_leaves():
    """Nothing deleted costs all of it; a lower threshold costs what the formula says of the tokens that are left."""
    sizes = {"length": 12, "decoder_length": 4, "width": 16, "hidden": 24, "heads": 2, "head_width": 4, "depth": 4}
    texts = tokjax.build(T5Config(vocab_size=32, decoder_depth=1, **sizes))
    ids = np.random.default_rng(0).integers(3, 32, (3, 12)).astype(np.int32)
    inputs = Seq2Seq(ids, ids[:, :4])
    open_, shut = (tokjax.reduce(texts, "mrt5", layer=1, threshold=t) for t in (-31.0, -9.0))
    assert budget.counted_macs(open_, inputs) == open_.cost().total
    left = np.asarray(shut(inputs, trace=True)[1].tokens[1])
    assert left.min() > 0 and left.max() < 12

    def block(n):
        return n * (4 * 16 * 8 + 3 * 16 * 24) + 2 * n**2 * 8

    saved = 3 * np.mean(block(12) - block(left))  # the three blocks behind the gate
    assert budget.counted_macs(shut, inputs) == round(shut.cost().total - saved)
