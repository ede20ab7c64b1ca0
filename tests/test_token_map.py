"""The algebra of token maps, against plain matrices written out with loops."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import token_map
from tokjax.token_map import (
    HardMap,
    Plan,
    SoftMap,
    SpreadMap,
    apply,
    apply_form,
    behind_prefix,
    compose,
    first_true,
    identity,
    restore,
    rows,
    source,
)
from tokjax.tokens import Tokens

BATCH, N, M, R = 2, 7, 5, 6  # one shape, so that everything compiles once
seeds = st.integers(0, 2**32 - 1)
quick = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def drawn(seed, n=N, m=M, r=R, weighted=False):
    """A hard map with all three sentinels: empty slots, nobody, nowhere; a token is kept, moved or in neither list."""
    rng = np.random.default_rng(seed)
    keep, moved = np.full((BATCH, m), n), np.full((BATCH, r), n)
    for b in range(BATCH):
        order = rng.permutation(n)
        kept = rng.integers(0, min(m, n) + 1)
        keep[b, rng.permutation(m)[:kept]] = order[:kept]
        some = order[kept : kept + rng.integers(0, r + 1)]
        moved[b, rng.permutation(r)[: len(some)]] = some
    into = rng.integers(0, m + 1, (BATCH, r))
    weight = jnp.asarray(rng.normal(size=(BATCH, r)), jnp.float32) if weighted else None
    return HardMap(jnp.asarray(keep), jnp.asarray(moved), jnp.asarray(into), n, weight)


def written_out(map):
    """The matrix of a hard map, and its membership, with loops."""
    m, n = map.num_out, map.num_in
    matrix, member = np.zeros((BATCH, m, n)), np.zeros((BATCH, m, n))
    for b in range(BATCH):
        for slot, token in enumerate(np.asarray(map.keep)[b]):
            if token < n:
                matrix[b, slot, token] = member[b, slot, token] = 1
        for i, (token, slot) in enumerate(zip(np.asarray(map.moved)[b], np.asarray(map.into)[b], strict=True)):
            if token < n and slot < m:
                matrix[b, slot, token] = 1 if map.weight is None else map.weight[b, i]
                member[b, slot, token] = 1
    return matrix, member


def features(seed, length=N, width=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, length, width)), jnp.float32)


@jax.jit
def answers(map, x, y):
    with apply_form("scatter"):
        scattered = map.sum(x)
    with apply_form("matmul"):
        multiplied = map.sum(x)
    return scattered, multiplied, map.matrix(), map.membership(), map.dest(), map.unmerge(y), map.max(x), map.min(x)


@hypothesis.given(seeds, st.booleans())
@quick
def test_a_hard_map_is_its_matrix(seed, weighted):
    map, x, y = drawn(seed, weighted=weighted), features(seed), features(seed + 1, M)
    matrix, member = written_out(map)
    scattered, multiplied, ours, membership, dest, unmerged, most, least = map_answers = answers(map, x, y)
    assert all(np.isfinite(answer).all() for answer in map_answers[:6])
    np.testing.assert_allclose(scattered, matrix @ x, atol=1e-5)
    np.testing.assert_allclose(multiplied, scattered, atol=1e-6)
    np.testing.assert_allclose(ours, matrix, atol=1e-7)
    np.testing.assert_array_equal(membership, member)
    np.testing.assert_allclose(unmerged, member.swapaxes(1, 2) @ y, atol=1e-6)
    np.testing.assert_array_equal(dest, np.where(member.any(1), member.argmax(1), M))
    inside = np.where(member[..., None] > 0, np.asarray(x)[:, None], np.nan)
    filled = member.any(2)
    np.testing.assert_array_equal(np.asarray(most)[filled], np.nanmax(inside[filled], 1))
    np.testing.assert_array_equal(np.asarray(least)[filled], np.nanmin(inside[filled], 1))


@jax.jit
def composed(second, first, x):
    both = compose(second, first)
    soft = compose(second, SoftMap(first.matrix(), first.anchor))
    return both, both.matrix(), both.sum(x), second.sum(first.sum(x)), soft.matrix(), soft.anchor


@hypothesis.given(seeds, st.booleans(), st.booleans())
@quick
def test_composition_is_the_product_of_matrices(seed, first_weighted, second_weighted):
    first = drawn(seed, weighted=first_weighted)
    second = drawn(seed + 1, n=M, m=4, r=3, weighted=second_weighted)
    both, matrix, at_once, in_turn, soft, anchor = composed(second, first, features(seed))
    product = written_out(second)[0] @ written_out(first)[0]
    assert isinstance(both, HardMap)
    assert (both.num_in, both.num_out) == (N, 4)
    np.testing.assert_allclose(matrix, product, atol=1e-5)
    np.testing.assert_allclose(at_once, in_turn, atol=1e-5)
    np.testing.assert_allclose(soft, product, atol=1e-5)
    np.testing.assert_array_equal(anchor, both.anchor)
    member = written_out(second)[1] @ written_out(first)[1]
    np.testing.assert_array_equal(both.membership(), member)


@jax.jit
def both_ways(first, second, tokens):
    in_turn = apply(Plan(second, size=second), apply(Plan(first, size=first), tokens))
    total = compose(second, first)
    return in_turn, apply(Plan(total, size=total), tokens), source(in_turn.origin, 4), total.membership()


@hypothesis.given(seeds)
@quick
def test_size_weighted_averages_compose(seed):
    rng = np.random.default_rng(seed)
    first, second = drawn(seed), drawn(seed + 1, n=M, m=4, r=3)
    tokens = Tokens(features(seed), size=jnp.asarray(rng.integers(1, 9, (BATCH, N)), jnp.float32)).traced()

    in_turn, at_once, origin, membership = both_ways(first, second, tokens)
    np.testing.assert_allclose(in_turn.x, at_once.x, atol=1e-5)
    np.testing.assert_array_equal(in_turn.size, at_once.size)
    np.testing.assert_array_equal(in_turn.origin, at_once.origin)
    np.testing.assert_array_equal(origin, membership)  # tracing is the same as composing


def test_identity_does_nothing():
    map, x = identity(BATCH, N), features(0)
    np.testing.assert_array_equal(map.sum(x), x)
    np.testing.assert_array_equal(map.unmerge(x), x)
    np.testing.assert_array_equal(compose(map, map).matrix(), np.broadcast_to(np.eye(N), (BATCH, N, N)))


def test_a_prefix_stays_in_front():
    map = drawn(3, weighted=True)
    shifted = behind_prefix(map, 2)
    assert (shifted.num_in, shifted.num_out) == (N + 2, M + 2)
    expected = np.zeros((BATCH, M + 2, N + 2))
    expected[:, [0, 1], [0, 1]] = 1
    expected[:, 2:, 2:] = map.matrix()
    np.testing.assert_allclose(shifted.matrix(), expected, atol=1e-7)
    assert behind_prefix(map, 0) is map


def test_soft_maps_answer_by_their_matrix():
    weights = jnp.array([[[0.6, 0.5, 0.0], [0.4, -0.9, 0.0]], [[1.0, 0.0, 0.25], [0.0, 0.0, 0.25]]])
    map, x, y = SoftMap(weights, jnp.array([[0, 1], [0, 2]])), features(0, 3), features(1, 2)
    assert (map.num_in, map.num_out) == (3, 2)
    np.testing.assert_allclose(map.sum(x), weights @ x, atol=1e-6)
    np.testing.assert_allclose(map.unmerge(y), weights.swapaxes(1, 2) @ y, atol=1e-6)
    np.testing.assert_array_equal(map.dest(), [[0, 1, 2], [0, 2, 0]])  # no share at all: dropped; ties: the lower slot
    np.testing.assert_array_equal(map.membership(), weights)


def test_spread_maps_answer_by_their_matrix():
    share = jnp.array([[[0.6, 0.0], [0.0, 0.0], [0.7, 0.0]], [[0.5, -1.0], [0.5, 0.25], [0.0, 0.0]]])
    keep, moved = jnp.array([[3, 0, 5], [4, 1, 5]]), jnp.array([[1, 2], [0, 5]])  # 5: an empty slot, nobody
    map, x, y = SpreadMap(keep, moved, share, 5), features(0, 5), features(1, 3)
    matrix = np.zeros((2, 3, 5))
    matrix[0, 0, 3] = matrix[0, 1, 0] = matrix[1, 0, 4] = matrix[1, 1, 1] = 1
    matrix[0, :, 1], matrix[1, :, 0] = [0.6, 0, 0.7], [0.5, 0.5, 0]
    assert (map.num_in, map.num_out) == (5, 3)
    np.testing.assert_allclose(map.matrix(), matrix, atol=1e-7)
    np.testing.assert_allclose(map.membership(), matrix, atol=1e-7)
    np.testing.assert_allclose(map.sum(x), matrix @ x, atol=1e-6)
    np.testing.assert_allclose(map.unmerge(y), matrix.swapaxes(1, 2) @ y, atol=1e-6)
    np.testing.assert_array_equal(map.dest(), [[1, 2, 3, 0, 3], [0, 1, 3, 3, 0]])
    valid = jnp.array([[True, True, True, False, True]] * 2)
    out = apply(Plan(map, size=map), Tokens(x, valid=valid))
    np.testing.assert_array_equal(out.valid, [[False, True, False], [True, True, False]])  # as the anchors
    np.testing.assert_allclose(out.size, matrix.sum(-1), atol=1e-6)
    np.testing.assert_allclose(compose(map, identity(2, 5)).matrix(), matrix, atol=1e-6)


def test_compose_refuses_maps_that_do_not_meet():
    with pytest.raises(ValueError, match="second takes 7 tokens, first gives 5"):
        compose(drawn(0), drawn(1))


def test_apply_form_refuses_unknown_forms_and_ends_with_its_block():
    with pytest.raises(ValueError, match=r"form='gather'.*auto, scatter, matmul"), apply_form("gather"):
        pass
    with pytest.raises(RuntimeError), apply_form("matmul"):
        assert not token_map._scatters()
        raise RuntimeError
    assert token_map._scatters() == (jax.default_backend() == "cpu")


def test_rows_fills_beyond_the_end():
    x = features(0)
    np.testing.assert_array_equal(rows(x, jnp.array([[N, 2], [0, N]]), fill=-1)[0], [[-1] * 3, x[0, 2]])
    valid = jnp.ones((BATCH, N), bool)
    np.testing.assert_array_equal(rows(valid, jnp.array([[N, 2], [0, N]])), [[False, True], [True, False]])


# Plans.

PAIR = HardMap(  # token 3 alone, 0 + 2, an empty slot; 1 dropped
    keep=jnp.array([[3, 0, 4]] * BATCH), moved=jnp.array([[2, 4]] * BATCH), into=jnp.array([[1, 2]] * BATCH), num_in=4
)
SIZE = jnp.array([[1.0, 5.0, 3.0, 2.0]] * BATCH)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("size", lambda x: (x[:, 0] + 3 * x[:, 2]) / 4),
        ("mean", lambda x: (x[:, 0] + x[:, 2]) / 2),
        ("sum", lambda x: x[:, 0] + x[:, 2]),
        ("keep", lambda x: x[:, 0]),
    ],
)
def test_how_features_move(how, expected):
    x = features(0, 4)
    out = apply(Plan(PAIR, size=PAIR, how=how), Tokens(x, size=SIZE))
    np.testing.assert_array_equal(out.x[:, 0], x[:, 3])
    np.testing.assert_allclose(out.x[:, 1], expected(x), atol=1e-6)
    np.testing.assert_array_equal(out.x[:, 2], np.zeros((BATCH, 3)))  # empty: zeros, not NaN
    np.testing.assert_array_equal(out.size, [[2, 4, 0]] * BATCH)


def test_what_travels_follows_the_anchor():
    tokens = Tokens(
        features(0, 4),
        size=SIZE,
        position=jnp.broadcast_to(jnp.arange(4)[:, None] * jnp.array([1, 10]), (BATCH, 4, 2)),
        key_bias=jnp.array([[0.0, -1, -2, -3]] * BATCH),
        kind=jnp.array([[5, 6, 7, 8]] * BATCH),
        prefix=1,
        carry={"graph": 1},
    ).traced()
    out = apply(Plan(PAIR, carry={"seen": 2}), tokens)
    np.testing.assert_array_equal(out.position[0], [[3, 30], [0, 0], [-1, -1]])
    np.testing.assert_array_equal(out.key_bias[0], [-3, 0, 0])
    np.testing.assert_array_equal(out.kind[0], [8, 5, 0])
    np.testing.assert_array_equal(out.origin[0], [1, 3, 1, 0])
    np.testing.assert_array_equal(out.size[0], [2, 1, 1])  # without a map for sizes a slot has its anchor's
    assert out.carry == {"graph": 1, "seen": 2}
    assert out.prefix == 1
    assert out.valid is None


def test_sizes_are_tracked_only_where_a_plan_says_so():
    tokens = Tokens(features(0, 4))
    assert apply(Plan(PAIR), tokens).size is None
    np.testing.assert_array_equal(apply(Plan(PAIR, size=PAIR), tokens).size, [[1, 2, 0]] * BATCH)
    other = apply(Plan(PAIR, size=SoftMap(jnp.full((BATCH, 3, 4), 0.5), PAIR.keep)), tokens.replace(size=SIZE))
    np.testing.assert_array_equal(other.size, [[5.5] * 3] * BATCH)
    np.testing.assert_allclose(other.x, apply(Plan(PAIR), tokens.replace(size=SIZE)).x)  # features by their own map


def test_a_slot_is_valid_if_anything_valid_is_in_it():
    map = HardMap(
        keep=jnp.array([[0, 1, 2, 5]]), moved=jnp.array([[3, 4]]), into=jnp.array([[1, 3]]), num_in=5
    ).replace(weight=jnp.array([[-1.0, 0.0]]))
    valid = jnp.array([[True, False, False, True, True]])
    tokens = Tokens(features(0, 5)[:1], valid=valid)
    np.testing.assert_array_equal(apply(Plan(map, how="sum"), tokens).valid, [[True, True, False, True]])
    soft = SoftMap(jnp.ones((1, 2, 5)), jnp.array([[0, 1]]))
    np.testing.assert_array_equal(apply(Plan(soft), tokens).valid, [[True, False]])
    said = jnp.array([[True, True, True, False]])
    np.testing.assert_array_equal(apply(Plan(map, valid=said), tokens).valid, said)
    np.testing.assert_array_equal(apply(Plan(map, valid=said), tokens.replace(valid=None)).valid, said)


def test_a_plan_appends_and_sets_gates_of_all_that_comes_out():
    gates = jnp.zeros((BATCH, 5)).at[:, 4].set(-2.0)
    plan = Plan(PAIR, append=Tokens(features(1, 2)), key_bias=gates, proportional=False)
    out = apply(plan, Tokens(features(0, 4)).traced())
    assert out.length == 5
    np.testing.assert_array_equal(out.x[:, 3:], features(1, 2))
    np.testing.assert_array_equal(out.key_bias, gates)
    assert not out.proportional
    np.testing.assert_array_equal(out.origin[0], [1, 5, 1, 0])  # dropped tokens have the new N


def test_a_plan_sets_positions_and_a_token_that_is_kept_twice_lives_in_its_first_slot():
    nobody, place = jnp.zeros((BATCH, 0), jnp.int32), jnp.tile(jnp.arange(3), (BATCH, 1))
    map = HardMap(jnp.tile(jnp.array([2, 0, 2]), (BATCH, 1)), nobody, nobody, 4)
    tokens = Tokens(features(0, 4), position=7 + jnp.tile(jnp.arange(4), (BATCH, 1))).traced()
    out = apply(Plan(map, how="keep", position=place), tokens)
    np.testing.assert_array_equal(out.x, features(0, 4)[:, jnp.array([2, 0, 2])])
    np.testing.assert_array_equal(out.position, place)
    np.testing.assert_array_equal(out.origin[0], [1, 3, 0, 3])


def test_an_empty_plan_does_nothing():
    tokens = Tokens(features(0), size=jnp.ones((BATCH, N)))
    out = apply(Plan(), tokens)
    assert out.x is tokens.x
    assert out.size is tokens.size


def test_apply_refuses_a_map_of_another_length():
    with pytest.raises(ValueError, match=r"plan.map takes 4 tokens, tokens.x has 7"):
        apply(Plan(PAIR), Tokens(features(0)))


def test_a_plan_moves_other_features_than_the_tokens_own():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, N, 3)), jnp.bfloat16)
    other = 2 * x.astype(jnp.float32) + 1e-3
    weights = jnp.asarray(np.random.default_rng(1).random((BATCH, M, N)), jnp.float32)
    mixed = apply(Plan(SoftMap(weights, weights.argmax(-1)), how="sum", x=other), Tokens(x)).x
    expected = np.asarray(weights) @ np.asarray(other)
    assert mixed.dtype == jnp.bfloat16  # rounded once, behind the sum
    np.testing.assert_allclose(mixed.astype(jnp.float32), expected, rtol=2**-8)
    np.testing.assert_array_equal(apply(Plan(x=other), Tokens(x)).x, other.astype(jnp.bfloat16))


@pytest.mark.parametrize("m", [M, N + 2])
def test_a_soft_map_behind_a_prefix_leaves_it_alone(m):
    weights = np.random.default_rng(0).random((BATCH, m, N)).astype(np.float32)
    whole = behind_prefix(SoftMap(jnp.asarray(weights), jnp.asarray(weights.argmax(-1))), 2)
    expected = np.zeros((BATCH, m + 2, N + 2), np.float32)
    expected[:, :2, :2], expected[:, 2:, 2:] = np.eye(2), weights
    np.testing.assert_array_equal(whole.weights, expected)
    np.testing.assert_array_equal(whole.anchor, expected.argmax(-1))


def test_averages_of_bf16_features_are_made_in_float32():
    n = 300
    nobody, keep = jnp.arange(1, n)[None], jnp.zeros((1, 1), jnp.int32)
    merge = HardMap(keep, nobody, jnp.zeros_like(nobody), num_in=n)
    tokens = Tokens(jnp.ones((1, n, 2), jnp.bfloat16).at[:, 0].set(4.0))
    for form in ("scatter", "matmul"):
        with apply_form(form):
            out = apply(Plan(merge, size=merge), tokens)
        assert out.x.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.x.astype(jnp.float32), (n + 3) / n, rtol=1e-2)  # adding in bf16 stalls at 256
        assert out.size.dtype == jnp.float32
        np.testing.assert_array_equal(out.size, [[n]])


def test_gradients_flow_through_both_forms_and_stay_finite():
    map, x = drawn(5, weighted=True), features(0)

    def total(x, weight):
        tokens = apply(Plan(map.replace(weight=weight), how="sum"), Tokens(x))
        return (tokens.x**2).sum()

    gradients = []
    for form in ("scatter", "matmul"):
        with apply_form(form):
            gradients.append(jax.grad(total, (0, 1))(x, map.weight))
    matrix, _ = written_out(map)
    expected = 2 * matrix.swapaxes(1, 2) @ (matrix @ x)
    for of_x, of_weight in gradients:
        np.testing.assert_allclose(of_x, expected, atol=1e-4)
        np.testing.assert_allclose(of_weight, gradients[0][1], atol=1e-5)
    mean = jax.grad(lambda x: apply(Plan(map.replace(weight=None)), Tokens(x)).x.sum())(x)
    assert np.isfinite(mean).all()


# Back on the grid


GRID = (3, 5)


@quick
@hypothesis.given(seeds, st.sampled_from((0.1, 0.5, 1.0)), st.sampled_from((0, 2)))
def test_restore_takes_the_nearest_survivor_or_zeros(seed, share, prefix):
    rng = np.random.default_rng(seed)
    slots, patches = 9, GRID[0] * GRID[1]
    lives = np.where(rng.random((BATCH, patches)) < share, rng.integers(0, slots, (BATCH, patches)), slots)
    origin = np.concatenate([np.full((BATCH, prefix), slots), lives], 1)  # prefix tokens are nobody's neighbours
    x = rng.normal(size=(BATCH, slots, 2)).astype(np.float32)
    nearest = np.zeros((BATCH, patches, 2), np.float32)
    place = np.stack(np.divmod(np.arange(patches), GRID[1]), -1)
    for b in range(BATCH):
        alive = np.flatnonzero(lives[b] < slots)
        for p in range(patches):
            if len(alive):
                distance = ((place[alive] - place[p]) ** 2).sum(-1)
                nearest[b, p] = x[b, lives[b, alive[distance.argmin()]]]  # numpy too takes the first of equals
    zeros = np.where((lives < slots)[..., None], np.take_along_axis(x, np.minimum(lives, slots - 1)[..., None], 1), 0)
    for fill, expected in (("nearest", nearest), ("zeros", zeros)):
        given = restore(jnp.asarray(x), jnp.asarray(origin), GRID, prefix=prefix, fill=fill)
        np.testing.assert_array_equal(given, expected)


def test_restore_undoes_hard_maps_as_unmerge_does():
    first, second = drawn(1, n=15, m=9, r=5), drawn(2, n=9, m=6, r=3)
    every = jnp.broadcast_to(jnp.arange(15), (BATCH, 15))
    tokens = Tokens(jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, 15, 3)), jnp.float32), origin=every)
    after = apply(Plan(map=second), apply(Plan(map=first), tokens))
    given = restore(after.x, after.origin, GRID, fill="zeros")
    np.testing.assert_array_equal(given, first.unmerge(second.unmerge(after.x)))


def test_restore_refuses():
    x, origin = jnp.zeros((1, 4, 2)), jnp.zeros((1, 15), jnp.int32)
    with pytest.raises(ValueError, match="fill='mean': must be one of nearest, zeros"):
        restore(x, origin, GRID, fill="mean")
    with pytest.raises(ValueError, match=r"grid=\(4, 4\): with prefix=0 does not hold the 15"):
        restore(x, origin, (4, 4))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_the_first_hit_is_found(axis):
    x = np.random.default_rng(0).integers(0, 4, (3, 5, 4))
    np.testing.assert_array_equal(first_true(jnp.asarray(x == x.max(axis, keepdims=True)), axis), x.argmax(axis))
