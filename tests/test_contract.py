"""Laws that every registered reducer obeys, whatever its method.

Reducers of caches, which plan nothing for tokens, have laws of their own at the end.

A law that cannot hold for a method is exempted in the registry with the reason; the tests then demand that it is
really broken, so that an exemption goes when its reason does.
"""

from collections.abc import Callable
import functools
import re
from typing import get_args

import contract_setup
from contract_setup import (
    ALONE,
    BATCH,
    CHANNELS,
    COMBINED,
    DEPTH,
    GRID,
    HEADS,
    LAWFUL,
    QUICK,
    SAFE,
    SHAPES,
    Draw,
    Step,
    Walk,
    applied,
    batch_of,
    cached,
    cacher,
    cases,
    context_of,
    draws,
    features,
    hooks_of,
    info,
    made,
    matrix,
    membership,
    moved,
    program,
    signals,
    sizes_of,
    take,
    unit_fields,
    valid_of,
    walk,
    walker,
)
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from tokjax import cache as kv
from tokjax import token_map
from tokjax.models import vit
from tokjax.reducers import REGISTRY, Law, create
from tokjax.signals import Context
from tokjax.tokens import Tokens

SHAPE = SHAPES[0]
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)")
FOLLOWING = ("size", "position", "key_bias", "kind")
SEEDS = st.integers(0, 2**31 - 1)


def law(of: Law) -> Callable:
    """Makes `check(name)` a test of every reducer with plans, turned round for those that are exempt."""

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("name", LAWFUL)
        @functools.wraps(check)
        def test(name: str, **kwargs) -> None:
            if of not in REGISTRY[name].exempt:
                check(name, **kwargs)
                return
            try:
                check(name, **kwargs)
            except AssertionError:
                return
            pytest.fail(f"{name} obeys the law {of!r}: take the exemption out of the registry")

        return test

    return wrap


def examples(number: int) -> Callable:
    """Hypothesis settings: the same examples every time, and no shrinking, since seeds do not shrink."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def close(actual, expected, tolerance: float = 1e-5, message: str = "") -> None:
    """Equal up to rounding, relative to the largest entry."""
    a, b = (np.asarray(v, np.float64) for v in (actual, expected))
    assert a.shape == b.shape, f"{message}: {a.shape} is not {b.shape}"
    bound = tolerance * max(np.abs(b).max(initial=0), 1e-30)
    if not (np.abs(a - b) <= bound).all():  # the slow comparison is only for its message
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=message)


def equal(actual, expected, message: str = "") -> None:
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected), err_msg=message)


def same(actual: Tokens, expected: Tokens, tolerance: float = 1e-5) -> None:
    """All that travels with the tokens is the same: whole numbers exactly, the rest up to rounding."""
    for field in ("x", "valid", "origin", *FOLLOWING):
        a, b = getattr(actual, field), getattr(expected, field)
        assert (a is None) == (b is None), f"{field}: one is None"
        if a is not None and jnp.issubdtype(a.dtype, jnp.floating):
            close(a, b, tolerance, field)
        elif a is not None:
            equal(a, b, field)


def mapped(steps: tuple[Step, ...]) -> list[Step]:
    return [step for step in steps if step.plan.map is not None]


def run(name: str, draw: Draw) -> Walk:
    return program(name)(*draw.args)


# Rows


@law("batch")
def test_a_row_does_not_depend_on_the_rows_beside_it(name):
    @examples(15)
    @given(draw=draws(cases(name)), other=SEEDS, row=st.integers(0, BATCH - 1))
    def holds(draw, other, row):
        foreign = Draw(draw.shape, draw.fields, other, "large", (0, 1, 5, 9))
        here = np.arange(BATCH) == row
        mixed = jax.tree.map(
            lambda a, b: np.where(here.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), draw.args, foreign.args
        )
        same(take(program(name)(*mixed).tokens, row), take(run(name, draw).tokens, row))

    holds()


@law("jit")
def test_jit_changes_nothing(name):
    draw = Draw()
    eager = walker(name)(*draw.args, plans=1).steps
    assert mapped(eager), "nothing is reduced"
    for a, b in zip(eager, run(name, draw).steps, strict=False):
        same(a.after, b.after)


@law("jit")
def test_vmap_over_one_more_axis_is_a_larger_batch(name):
    draw = Draw(seed=1)
    split = jax.tree.map(lambda leaf: leaf.reshape(2, BATCH // 2, *leaf.shape[1:]), draw.args)
    tokens = jax.jit(jax.vmap(walker(name)), compiler_options=QUICK)(*split).tokens
    same(jax.tree.map(lambda leaf: np.asarray(leaf).reshape(BATCH, *leaf.shape[2:]), tokens), run(name, draw).tokens)


# Padding


def padded(name: str) -> bool:
    """Whether the reducer takes padded rows; if not, it must say so."""
    if REGISTRY[name].padding:
        return True
    with pytest.raises(ValueError, match=r"valid|padd"):
        jax.eval_shape(walker(name), *Draw(fields="padded").args)
    return False


def _same_where_valid(alone: Tokens, beside: Tokens, inputs_alone: np.ndarray, inputs_beside: np.ndarray) -> None:
    """The valid slots, in their order, hold the same; so do the slots of the valid inputs."""
    here, there = valid_of(alone), valid_of(beside)
    equal(here.sum(1), there.sum(1), "valid tokens")
    for row in range(BATCH):
        for field in ("x", *FOLLOWING):
            a, b = getattr(alone, field), getattr(beside, field)
            assert (a is None) == (b is None), f"{field}: one is None"
            if a is not None:
                close(b[row][there[row]], a[row][here[row]], 1e-5, field)
        # Slots are compared by their rank among valid ones; a dropped input has none.
        ranks = [np.append(np.where(v[row], np.cumsum(v[row]) - 1, -1), -1) for v in (here, there)]
        origin = [t.origin[row][v[row]] for t, v in ((alone, inputs_alone), (beside, inputs_beside))]
        equal(ranks[0][origin[0]], ranks[1][origin[1]], "origin")


@law("padding")
def test_a_row_without_padding_is_planned_as_if_there_were_no_mask(name):
    if not padded(name):
        return

    @examples(15)
    @given(draw=draws([(shape, "sized") for shape in SHAPES[1:]], SAFE))
    def holds(draw):
        every = np.ones(draw.tokens.x.shape[:2], bool)
        beside = program(name)(draw.tokens.replace(valid=every), draw.args[1])
        for a, b in zip(run(name, draw).steps, beside.steps, strict=True):
            _same_where_valid(a.after, b.after, every, every)

    holds()


@law("padding")
def test_a_padded_row_gives_what_the_row_alone_gives(name):
    if padded(name):
        _check_padded_rows(name)


@pytest.mark.parametrize("name", COMBINED)
def test_a_padded_row_gives_what_the_row_alone_gives_to_several(name):
    """Counts are shares of the patches at the input, whatever else has changed the tokens."""
    _check_padded_rows(name)


def _check_padded_rows(name: str) -> None:
    n, (length, prefix) = SHAPE[0], ALONE
    least = min(2, len(hooks_of(name, SHAPE)))  # some reduce at one place only

    @examples(25)
    @given(seed=SEEDS, style=st.sampled_from(SAFE))
    def holds(seed, style):
        rng = np.random.default_rng(seed)
        x, context = features(rng, style, (BATCH, n, CHANNELS)), context_of(rng, SHAPE)
        place = np.stack([np.sort(rng.permutation(n - prefix)[: length - prefix]) + prefix for _ in range(BATCH)])
        place = np.concatenate([np.tile(np.arange(prefix), (BATCH, 1)), place], 1)
        valid, row = np.zeros((BATCH, n), bool), np.arange(BATCH)[:, None]
        np.put_along_axis(valid, place, True, 1)
        x[~valid] = rng.normal(size=x[~valid].shape) * 100
        beside = program(name)(batch_of(x, SHAPE, valid=valid, **unit_fields((BATCH, n))), context)
        short = batch_of(x[row, place], ALONE, **unit_fields((BATCH, length)))
        alone = program(name)(
            short.replace(position=place.astype(np.int32)), context.replace(frames=context.frames[row, place])
        )
        assert len(mapped(alone.steps)) >= least, "too few plans"
        for a, b in zip(alone.steps, beside.steps, strict=True):
            _same_where_valid(a.after, b.after, np.ones((BATCH, length), bool), valid)

    holds()


@law("padding")
def test_what_stands_in_the_padding_never_shows(name):
    if not padded(name):
        return

    @examples(25)
    @given(draw=draws([(shape, "padded") for shape in SHAPES]), seed=SEEDS)
    def holds(draw, seed):
        rng, tokens, valid = np.random.default_rng(seed), draw.tokens, valid_of(draw.tokens)

        def refill(field, values):
            keep = valid.reshape(valid.shape + (1,) * (field.ndim - 2))
            return np.where(keep, field, values.astype(field.dtype))

        other = tokens.replace(
            x=refill(tokens.x, rng.normal(size=tokens.x.shape) * rng.choice([0, 1, 1e12])),
            size=refill(tokens.size, rng.integers(1, 1000, valid.shape)),
            key_bias=refill(tokens.key_bias, rng.normal(size=valid.shape) * 100),
            kind=refill(tokens.kind, rng.integers(0, 3, valid.shape)),
            position=refill(tokens.position, rng.integers(0, 1000, valid.shape)),
        )
        a, b = run(name, draw).tokens, program(name)(other, draw.args[1]).tokens
        equal(valid_of(a), valid_of(b), "valid")
        for field in ("x", *FOLLOWING):
            if getattr(a, field) is not None:
                equal(getattr(a, field)[valid_of(a)], getattr(b, field)[valid_of(b)], field)
        equal(a.origin[valid], b.origin[valid], "origin")

    holds()


# What travels with the tokens


@law("size")
def test_sizes_are_positive_and_add_up(name):
    conserves = REGISTRY[name].conserves

    @examples(25)
    @given(draw=draws(cases(name)))
    def holds(draw):
        out = run(name, draw)
        assert not conserves or out.tokens.size is not None, "sizes are not tracked"
        for step in out.steps:
            if step.after.size is not None:
                before, after = sizes_of(step.before), sizes_of(step.after)
                assert (after[valid_of(step.after)] > 0).all(), "a valid slot without size"
                if conserves:
                    np.testing.assert_allclose(after.sum(1), before.sum(1), rtol=1e-5, err_msg="sum of sizes")
        if conserves:
            total, left = sizes_of(draw.tokens).sum(1), sizes_of(out.tokens).sum(1)
            np.testing.assert_allclose(left, total, rtol=1e-5, err_msg="sum of sizes after all steps")

    holds()


def slots(map: token_map.TokenMap) -> np.ndarray:
    """Slot of every token [B,N] by the definition: its largest share, the lower one on ties, M where it has none."""
    share = np.abs(membership(map))
    return np.where(share.sum(1) > 0, share.argmax(1), map.num_out)


@law("prefix")
def test_prefix_tokens_stay_as_they_are(name):
    @examples(20)
    @given(draw=draws(cases(name)))
    def holds(draw):
        for step in run(name, draw).steps:
            p = step.before.prefix
            assert step.after.prefix == p
            equal(step.after.x[:, :p], step.before.x[:, :p], "x")
            equal(step.after.position[:, :p], step.before.position[:, :p], "position")
            assert valid_of(step.after)[:, :p].all(), "valid"
            if step.before.size is not None:
                equal(step.after.size[:, :p], step.before.size[:, :p], "size")
            if step.plan.map is not None:
                first = np.tile(np.arange(p), (BATCH, 1))
                equal(step.plan.map.anchor[:, :p], first, "anchor")
                equal(slots(step.plan.map)[:, :p], first, "slot")

    holds()


@law("origin")
def test_position_kind_and_origin_follow(name):
    @examples(20)
    @given(draw=draws(cases(name)))
    def holds(draw):
        for step in mapped(run(name, draw).steps):
            map, before, after, m = step.plan.map, step.before, step.after, step.plan.map.num_out
            for field, fill in (("position", -1), ("kind", 0)):
                values = getattr(before, field)
                if values is not None:
                    values = np.append(values, np.full((BATCH, 1), fill), 1)
                    expected = np.take_along_axis(values, np.asarray(map.anchor), 1)
                    equal(getattr(after, field)[:, :m], expected, field)
            now = np.take_along_axis(np.append(slots(map), np.full((BATCH, 1), m), 1), before.origin, 1)
            gone = now == m
            equal(after.origin[~gone], now[~gone], "origin")
            assert (after.origin[gone] >= m).all(), "a dropped token has a slot"  # or lives on in an appended one

    holds()


@functools.partial(jax.jit, compiler_options=QUICK)
def _answers(map: token_map.TokenMap, y: jax.Array) -> tuple[jax.Array, ...]:
    return map.dest(), map.membership(), map.unmerge(y), map.matrix()


@law("unmerge")
def test_a_map_its_matrix_and_its_unmerge_agree(name):
    at = [case for case in cases(name) if case[0] == SHAPE]

    @examples(10)
    @given(draw=draws(at, ("normal", "copies")))
    def holds(draw):
        steps = mapped(run(name, draw).steps)
        assert steps, "nothing is reduced"
        for step in steps:
            map, m, x = step.plan.map, step.plan.map.num_out, np.asarray(moved(step.plan, step.before), np.float64)
            y = np.random.default_rng(0).normal(size=(BATCH, m, 3)).astype(np.float32)
            mem, sizes = membership(map), np.asarray(step.before.sizes(), np.float64)
            dest, told, spread, linear = _answers(map, y)
            if isinstance(map, token_map.HardMap):
                assert (mem.sum(1) <= 1).all(), "a token is listed twice"
            equal(dest, slots(map), "dest")
            close(told, mem, 1e-6, "membership")
            close(linear, matrix(map), 1e-6, "matrix")
            close(spread, np.einsum("bmn,bmc->bnc", mem, y), 1e-5, "unmerge is membership transposed")
            close(step.after.x[:, :m], applied(step.plan, x, sizes)[0], 1e-5, "apply is the matrix")
            if isinstance(map, token_map.HardMap):
                back, filled = applied(step.plan, np.asarray(spread, np.float64), sizes)
                close(back[filled], y[filled], 1e-5, "reducing what was un-merged gives it back")

    holds()


# Numbers


def extreme(name: str) -> list[tuple[Tokens, Context]]:
    """All-equal, zero, large and ordinary tokens; without padding, with some, and with no valid patch at all."""
    out = []
    for counts in (None, (0, 0, 0, 0), (1, 16, 3, 0)) if REGISTRY[name].padding else (None,):
        tokens, context = Draw(SHAPE, "padded" if REGISTRY[name].padding else "sized", 3, "normal", counts).args
        x = tokens.x.copy()
        x[0], x[1], x[2] = x[0, :1], 0, x[2] * 1e4
        out.append((tokens.replace(x=x), context))
    return out


def _finite(tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert np.isfinite(np.asarray(leaf, np.float64)).all(), jax.tree_util.keystr(path)


@law("finite")
def test_valid_input_never_gives_nan(name):
    for args in extreme(name):
        out = program(name)(*args)
        _finite((out.tokens, [step.plan.aux for step in out.steps], out.pooled))

    @examples(20)
    @given(draw=draws(cases(name)))
    def holds(draw):
        _finite(run(name, draw).tokens)

    holds()


@law("gradient")
def test_gradients_are_finite(name):
    """Features are queries, keys and values too, so that this is their gradient as well."""

    def total(x, tokens, context):
        out = walker(name)(tokens.replace(x=x), context)
        leaves = [leaf for leaf in jax.tree.leaves((out.tokens, out.pooled)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return sum((leaf * np.cos(np.arange(leaf.size)).reshape(leaf.shape)).sum() for leaf in leaves)

    gradient = jax.jit(jax.grad(total), compiler_options=QUICK)
    for tokens, context in extreme(name):
        g = np.asarray(gradient(tokens.x, tokens, context))
        assert np.isfinite(g).all()
        assert np.abs(g[3]).max() > 0, "nothing reaches the features of an ordinary row"


@law("bf16")
def test_bf16_is_planned_in_float32(name):
    """Every plan of the bf16 walk is the plan of the same values in float32, and features differ by their rounding."""

    @examples(10)
    @given(draw=draws([(SHAPE, "bare")], ("normal", "ties", "copies", "large")))
    def holds(draw):
        steps = program(name)(draw.tokens.replace(x=draw.tokens.x.astype(jnp.bfloat16)), draw.args[1]).steps
        assert steps, "nothing is planned"
        for step in steps:
            assert step.after.x.dtype == jnp.bfloat16, "features change their dtype"
            assert step.after.size is None or step.after.size.dtype == jnp.float32, "sizes are not float32"
            _same_plan(step.plan, step.twin)
            if step.plan.map is not None:
                sizes = np.asarray(step.before.sizes(), np.float64)
                x, _ = applied(step.twin, moved(step.twin, step.before).astype(np.float64), sizes)
                close(step.after.x[:, : x.shape[1]].astype(np.float64), x, 2**-8, "x")

    holds()


def _same_plan(actual: token_map.Plan, expected: token_map.Plan) -> None:
    assert actual.how == expected.how
    parts = [
        [getattr(plan, field) for field in ("map", "size", "valid", "key_bias", "x")] for plan in (actual, expected)
    ]
    assert jax.tree.structure(parts[0]) == jax.tree.structure(parts[1])
    for a, b in zip(*map(jax.tree.leaves, parts), strict=True):
        assert a.dtype == b.dtype, "a plan is not made in float32"
        if jnp.issubdtype(a.dtype, jnp.floating):
            close(a, b, 1e-5, "plan")
        else:
            equal(a, b, "plan")


# Shapes, settings, models


@law("shapes")
def test_lengths_are_static_as_declared(name):
    for shape, fields in cases(name):
        draw = Draw(shape, fields, counts=(0, 7, 16, 3))
        out = jax.eval_shape(walker(name), *draw.args)
        steps = mapped(out.steps)
        assert steps, f"nothing is reduced at {shape}"
        for step in steps:
            if REGISTRY[name].length == "dynamic":
                assert step.after.valid is not None, "a length that depends on the data needs a valid mask"
            else:
                assert (step.after.valid is None) == (step.before.valid is None), "a static length needs no valid mask"
            assert step.after.x.shape == (BATCH, step.after.length, CHANNELS)
            assert step.after.origin.shape == (BATCH, shape[0])
            for field in ("valid", *FOLLOWING):
                value = getattr(step.after, field)
                assert value is None or value.shape == (BATCH, step.after.length), field
        for declared, actual in zip(jax.tree.leaves(out), jax.tree.leaves(run(name, draw)), strict=True):
            assert (declared.shape, declared.dtype) == (actual.shape, actual.dtype)


@law("identity")
def test_neutral_settings_do_nothing(name):
    for shape, fields in cases(name):
        hooks, draw = hooks_of(name, shape, **REGISTRY[name].neutral), Draw(shape, fields, counts=(3, 9, 16, 0))

        @functools.partial(jax.jit, compiler_options=QUICK)
        def after(tokens, context, hooks=hooks):
            return walk(hooks, tokens, context.replace(key=jax.random.wrap_key_data(context.key)), plans=None).tokens

        if hooks:
            same(after(*draw.args), draw.tokens, 0)


@law("knob")
def test_the_knob_goes_from_cheapest_to_dearest(name):
    knob, at, totals = REGISTRY[name].knob, info(SHAPE), []
    values = knob.values(at)
    for value in dict.fromkeys(values[i] for i in np.linspace(0, len(values) - 1, 6).round().astype(int)):
        hooks, entered = made(name, at, **{knob.field: value}).hooks(at), []

        def count(tokens, context, hooks=hooks, entered=entered):
            key = jax.random.wrap_key_data(context.key)
            return walk(hooks, tokens, context.replace(key=key), plans=None, entered=entered)

        jax.eval_shape(count, *Draw().args)
        totals.append(sum(entered))
    assert totals == sorted(totals), f"{knob.field}: tokens entering the MLPs {totals}"
    assert totals[0] < totals[-1] <= DEPTH * SHAPE[0], f"{knob.field} turns nothing: {totals}"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_an_unknown_setting_is_named(name):
    with pytest.raises(ValueError, match="no_such_setting"):
        create(name, no_such_setting=1)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_exemptions_name_a_law_and_say_why(name):
    for of, reason in REGISTRY[name].exempt.items():
        assert of in get_args(Law)
        assert len(reason) > 20, "say why"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_hooks_can_be_static_arguments(name):
    reducer = made(name, info(SHAPE))
    hooks, again = reducer.hooks(info(SHAPE)), reducer.hooks(info(SHAPE))
    assert hooks
    assert hooks == again
    assert {*hooks, *again} == set(hooks)


@functools.cache
def _tiny():
    """The info, graph and drawn parameters of a small vision transformer."""
    config = vit.ViTConfig(image_size=(8, 8), patch_size=2, width=16, depth=DEPTH, heads=HEADS, num_classes=5)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: vit.ViT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), nnx.to_pure_dict(shapes))
    assert (config.grid, config.info.length, config.info.prefix) == (GRID, *SHAPE)
    return config.info, graphdef, params


@law("model")
def test_it_runs_inside_a_vision_transformer(name):
    at, graphdef, params = _tiny()
    hooks = made(name, at).hooks(at)
    assert {hook.where for hook in hooks} <= vit.SITES, "give the contract tests a model with these sites"

    @functools.partial(jax.jit, compiler_options=QUICK)
    def forward(params, images, key):
        out = nnx.merge(graphdef, params)(images, hooks, key=jax.random.wrap_key_data(key), trace=True)
        return out.logits, out.tokens, [layer.tokens for layer in out.trace]

    images = np.random.default_rng(1).normal(size=(BATCH, 8, 8, 3)).astype(np.float32)
    logits, tokens, entered = forward(params, images, np.array([0, 1], np.uint32))
    _finite((logits, tokens))
    assert logits.shape == (BATCH, 5)
    assert np.ptp(logits, 0).min() > 0, "images of different content look the same"
    counts = np.stack(entered)  # [L,B]
    assert (counts[0] <= at.length).all()
    assert (np.diff(counts, axis=0) <= 0).all(), f"tokens grow: {counts.tolist()}"
    assert (counts[-1] < at.length).all(), f"nothing is reduced: {counts.tolist()}"


# Machines


@functools.cache
def _mesh() -> jax.sharding.Mesh:
    devices = jax.devices("cpu")
    assert len(devices) >= 8, "these tests need XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:8])


@law("collective")
def test_under_shard_map_every_device_is_on_its_own(name):
    """Every device holds a single row, so that this is the law of a batch of one as well."""
    over = PartitionSpec("data")
    _check_sharded(name, jax.jit(jax.shard_map(walker(name), mesh=_mesh(), in_specs=over, out_specs=over)))


@law("automatic")
def test_a_sharded_batch_needs_no_collective(name):
    """The compiler splits the work itself."""
    over = NamedSharding(_mesh(), PartitionSpec("data"))
    _check_sharded(name, jax.jit(walker(name), in_shardings=over))


def _check_sharded(name: str, reduce) -> None:
    pair = [Draw(seed=11), Draw(seed=12)]
    args = jax.tree.map(lambda a, b: np.concatenate([a, b]), *[draw.args for draw in pair])
    args = jax.device_put(args, NamedSharding(_mesh(), PartitionSpec("data")))
    compiled = reduce.lower(*args).compile(QUICK)
    assert not COLLECTIVE.findall(compiled.as_text())
    expected = jax.tree.map(lambda a, b: np.concatenate([a, b]), *[run(name, draw).tokens for draw in pair])
    same(compiled(*args).tokens, expected)


@pytest.mark.parametrize("name", LAWFUL)
def test_split_heads_meet_where_the_registry_says(name, monkeypatch):
    """Heads over two devices: what is sent are sums over heads, and by nobody who reads none."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    heads = NamedSharding(mesh, PartitionSpec(None, None, "model"))

    def split(tokens: Tokens, context: Context):
        seen = signals(tokens, context)
        parts = (jax.lax.with_sharding_constraint(x, heads) for x in (seen.query, seen.key, seen.value))
        return seen.replace(**dict(zip(("query", "key", "value"), parts, strict=True)))

    monkeypatch.setattr(contract_setup, "signals", split)
    args = jax.device_put(Draw().args, NamedSharding(mesh, PartitionSpec()))
    # Not the walker itself, of which other laws have made a program.
    reduce = jax.jit(lambda tokens, context: walker(name)(tokens, context))
    found = set(COLLECTIVE.findall(reduce.lower(*args).compile(QUICK).as_text()))
    assert found <= {"all-reduce", "collective-permute"}  # the second where heads are added one by one
    assert bool(found) == REGISTRY[name].over_heads


@law("lowering")
@pytest.mark.parametrize("form", get_args(token_map.Form)[1:])
def test_it_lowers_for_tpu_and_cuda(name, form):
    """One artefact for any batch size."""
    (b,) = jax.export.symbolic_shape("b")
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((b, *leaf.shape[1:]), leaf.dtype), Draw().args)

    def reduce(tokens: Tokens, context: Context) -> list[jax.Array]:
        with token_map.apply_form(form):
            return jax.tree.leaves(walker(name)(tokens, context).tokens)

    try:
        exported = jax.export.export(jax.jit(reduce), platforms=["tpu", "cuda"])(*specs)
    except NotImplementedError as error:  # a primitive without a lowering breaks the law like a wrong answer
        raise AssertionError(str(error)) from error
    assert exported.platforms == ("tpu", "cuda")


# Caches


def _same_cache(actual: kv.Cache, expected: kv.Cache, rows=slice(None), tolerance: float = 0.0) -> None:
    """In every layer the same valid tokens, in their order, with the same keys and values."""
    assert [at is None for at in actual.layers] == [at is None for at in expected.layers]
    for here, there in zip(actual.layers, expected.layers, strict=True):
        one, other = (kv.per_head(take(cache.groups[at[0]], rows)) for cache, at in ((actual, here), (expected, there)))
        assert one.keys[0].dtype == other.keys[0].dtype
        equal(one.count(), other.count(), "tokens")
        for row, head in np.ndindex(*one.valid.shape[:2]):
            a, b = (np.asarray(group.valid[row, head]) for group in (one, other))
            for name in ("position", "kind"):
                equal(getattr(one, name)[row, head][a], getattr(other, name)[row, head][b], name)
            for i, j in ((one.keys[here[1]], other.keys[there[1]]), (one.values[here[1]], other.values[there[1]])):
                close(i[row, head][a].astype(np.float32), j[row, head][b].astype(np.float32), tolerance, "buffers")


def _evicts(name: str) -> bool:
    return any(hook.where == "after_prefill" for hook in made(name, info(SHAPE)).hooks(info(SHAPE)))


CACHED = [name for name in sorted(REGISTRY.keys() - set(LAWFUL)) if _evicts(name)]


@pytest.mark.parametrize("name", CACHED)
def test_a_padded_row_has_the_cache_of_the_row_alone(name):
    """Wherever the padding is, whatever stands in it and in the rows beside; without padding a mask says nothing."""
    n, (length, prefix) = SHAPE[0], ALONE

    @examples(10)
    @given(seed=SEEDS, style=st.sampled_from(SAFE))
    def holds(seed, style):
        rng = np.random.default_rng(seed)
        x, context = features(rng, style, (BATCH, n, CHANNELS)), context_of(rng, SHAPE)
        short = features(rng, style, (BATCH, length, CHANNELS))
        place = np.sort(rng.permutation(n)[:length])
        valid = np.ones((BATCH, n), bool)
        valid[1:3] = np.isin(np.arange(n), place)
        x[1:3] = 1e4 * rng.normal(size=(2, n, CHANNELS))
        x[1:3, place] = short[1:3]
        position = np.where(valid, np.cumsum(valid, 1) - 1, -1).astype(np.int32)
        beside = cached(name)(batch_of(x, SHAPE, valid=valid).replace(position=position), context)
        alone = cached(name)(batch_of(short, (length, prefix)), context)
        _same_cache(beside, alone, slice(1, 3))
        _same_cache(beside, cached(name)(batch_of(x, SHAPE), context), slice(3, 4))
        assert (beside.groups[0].count() < valid.sum(1).reshape(-1, *(1,) * (beside.groups[0].valid.ndim - 2))).all()

    holds()


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_is_evicted_alike_eagerly_and_in_bf16(name):
    """Under vmap too; scores are made in float32, so that only the keys are rounded."""
    tokens, context = Draw(fields="sized", seed=1).args
    tokens = tokens.replace(x=np.asarray(tokens.x.astype(jnp.bfloat16), np.float32))
    want = cached(name)(tokens, context)
    _same_cache(cacher(name)(tokens, context), want)
    half = cached(name)(tokens.replace(x=tokens.x.astype(jnp.bfloat16)), context)
    assert half.groups[0].keys[0].dtype == jnp.bfloat16
    _same_cache(jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf, half), want)
    split = jax.tree.map(lambda leaf: leaf.reshape(2, BATCH // 2, *leaf.shape[1:]), (tokens, context))
    mapped = jax.jit(jax.vmap(cacher(name)), compiler_options=QUICK)(*split)
    _same_cache(
        jax.tree.map(lambda leaf: np.asarray(leaf[1]), mapped), jax.tree.map(lambda x: x[2:] if x.ndim else x, want)
    )


@pytest.mark.parametrize("name", CACHED)
def test_a_cache_has_no_nan_and_the_slots_that_its_budget_says(name):
    for args in extreme(name):
        _finite(cached(name)(*args))

    def total(x, tokens, context):
        return sum(leaf.sum() for group in cacher(name)(tokens.replace(x=x), context).groups for leaf in group.keys)

    tokens, context = extreme(name)[-1]
    gradient = jax.jit(jax.grad(total), compiler_options=QUICK)(tokens.x, tokens, context)
    assert np.isfinite(gradient).all() and np.abs(gradient[3]).max() > 0
    knob, slots, args = REGISTRY[name].knob, [], Draw(fields="sized").args
    values = knob.values(info(SHAPE))
    for value in dict.fromkeys(values[i] for i in np.linspace(0, len(values) - 1, 5).round().astype(int)):
        slots.append(sum(jax.eval_shape(cacher(name, **{knob.field: value}), *args).lengths()))
    assert slots == sorted(slots) and slots[0] < slots[-1] == DEPTH * SHAPE[0]
    assert not made(name, info(SHAPE), **REGISTRY[name].neutral).hooks(info(SHAPE))


@pytest.mark.parametrize("name", CACHED)
def test_a_sharded_cache_needs_no_collective(name):
    """Under shard_map, every device with a row of its own, and where the compiler splits the work itself."""
    pair = [Draw(fields="padded", seed=seed, counts=(9, 16, 3, 0)) for seed in (11, 12)]
    args = jax.tree.map(lambda a, b: np.concatenate([a, b]), *[draw.args for draw in pair])
    args = jax.device_put(args, NamedSharding(_mesh(), PartitionSpec("data")))

    def buffers(tokens, context):
        return [(group.keys, group.valid) for group in cacher(name)(tokens, context).groups]

    want = jax.tree.map(
        lambda a, b: np.concatenate([a, b]),
        *[[(group.keys, group.valid) for group in cached(name)(*draw.args).groups] for draw in pair],
    )
    over = PartitionSpec("data")
    shares = jax.jit(jax.shard_map(buffers, mesh=_mesh(), in_specs=over, out_specs=over))
    for reduce in (shares, jax.jit(buffers, in_shardings=NamedSharding(_mesh(), over))):
        compiled = reduce.lower(*args).compile(QUICK)
        assert not COLLECTIVE.findall(compiled.as_text())
        jax.tree.map(equal, compiled(*args), want)


@pytest.mark.parametrize("name", CACHED)
def test_eviction_lowers_for_tpu_and_cuda(name):
    (b,) = jax.export.symbolic_shape("b")
    specs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((b, *leaf.shape[1:]), leaf.dtype), Draw().args)
    function = jax.jit(lambda *args: jax.tree.leaves(cacher(name)(*args)))
    assert jax.export.export(function, platforms=["tpu", "cuda"])(*specs).platforms == ("tpu", "cuda")


# The tests themselves


def test_the_signals_of_the_walk_are_the_features():
    tokens, context = Draw().args
    seen = signals(tokens, context)
    parts = [np.reshape(part, (BATCH, tokens.length, -1)) for part in (seen.query, seen.key, seen.value)]
    equal(np.concatenate(parts, -1), tokens.x)
