"""The registry: reducers by name, errors that help, knobs and settings that exist."""

import inspect
import math

from flax import nnx
import pytest

from tokjax import api, budget, reducers
from tokjax.hooks import ModelInfo
from tokjax.reducers import REGISTRY, create, entry, name_of, settings_of
from tokjax.reducers.vit.tome import ToMe

INFO = ModelInfo(depth=12, width=384, heads=6, length=197, prefix=1, grid=(14, 14))


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"reducer='tomme': must be one of a_clip, ats, avgpool, .*; did you mean 'tome'\?"
    ):
        entry("tomme")
    with pytest.raises(ValueError, match=r"reducer='zzz': must be one of [a-z0-9_, ]*$"):
        create("zzz")


def test_create_makes_lists_tuples_and_names_what_it_does_not_know():
    reducer = create("tome", r=[3, 2], layers=[0, 1])
    assert reducer == ToMe(r=(3, 2), layers=(0, 1))
    assert hash(reducer) == hash(ToMe(r=(3, 2), layers=(0, 1)))
    with pytest.raises(ValueError, match=r"rate=0.5: tome has the settings r, inflect, layers"):
        create("tome", rate=0.5)
    with pytest.raises(ValueError, match=r"r=-3: must be at least 0"):
        create("tome", r=-3)


def test_reducers_that_learn_are_made_for_a_model():
    assert settings_of("sit") == ["keep_rate", "layers", "kept", "seed"]
    assert create("sit", INFO, kept=[9, 5, 3]).hooks(INFO)[1].reducer.count == 5
    with pytest.raises(ValueError, match=r"info=None: sit has parameters of its own"):
        create("sit")
    with pytest.raises(ValueError, match=r"info=3: sit has the settings keep_rate, layers, kept, seed"):
        create("sit", info=3)


def test_reducers_are_attributes_and_know_their_names():
    assert reducers.tome(r=4) == ToMe(r=4)
    assert name_of(ToMe()) == "tome"
    assert name_of(object()) == "object"
    with pytest.raises(AttributeError, match="has no attribute 'tomato'"):
        _ = reducers.tomato


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_what_an_entry_says_fits_its_reducer(name):
    registered = entry(name)
    fields = set(settings_of(name))
    assert registered.knob.field in fields
    assert {*registered.neutral, *registered.example} <= fields
    assert name_of(create(name, INFO, **registered.example)) == name
    assert registered.kind
    assert registered.paper


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_settings_are_no_arguments_of_what_takes_them(name):
    """`tokjax.reduce(model, name, **settings)` would take such a setting for its own argument."""
    taken = {parameter for function in (api.reduce, budget.solve) for parameter in explicit(function)}
    assert taken == {"model", "method", "form", "tower", "name", "macs", "tokens", "inputs", "cached", "phase"}
    assert not taken & set(settings_of(name))


def explicit(function) -> list[str]:
    kinds = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in kinds if parameter.kind is not parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_value_of_a_knob_is_a_setting(name):
    knob = entry(name).knob
    values = knob.values(INFO)
    assert len(set(values)) == len(values) > 10

    def make(value):
        return create(name, INFO, **{knob.field: value})

    learns = isinstance(make(values[0]), nnx.Module)
    for value in values:
        reducer = nnx.eval_shape(lambda value=value: make(value)) if learns else make(value)  # no weights are drawn
        reducer.hooks(INFO)


def test_keep_rates_of_a_knob_reach_every_count():
    patches = INFO.length - INFO.prefix
    rates = reducers.KEEP_RATE.values(INFO)
    assert [math.ceil(rate * patches) for rate in rates] == list(range(1, patches + 1))
    assert rates[-1] == 1.0


def test_numbers_of_merged_tokens_go_from_half_to_none():
    assert reducers.REMOVED.values(INFO) == list(range(98, -1, -1))
