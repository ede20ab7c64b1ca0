"""Counts against the closed form, against arithmetic done by hand, and against the figures that the papers print."""

import math
import time

import jax
from jax import lax
from jax.experimental import pallas
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.bench import flops

Struct = jax.ShapeDtypeStruct
SQUARE = Struct((8, 8), jnp.float32)
PRODUCT = 8**3  # of two squares


def f32(*shape):
    return Struct(shape, jnp.float32)


# The closed form: published figures in G at 224 pixels and 1000 classes unless said otherwise.

TINY, SMALL, BASE, LARGE, HUGE = (192, 12, 16), (384, 12, 16), (768, 12, 16), (1024, 24, 16), (1280, 32, 14)


def closed_form(model, attention, mlp, image=224, **kwargs):
    width, _, patch = model
    patches = (image // patch) ** 2
    return flops.vit_macs(attention, mlp, width=width, patch=patch, num_patches=patches, **kwargs)


def full(model, image=224):
    tokens = [(image // model[2]) ** 2 + 1] * model[1]
    return closed_form(model, tokens, tokens, image)


def tome(model, r, image=224):
    attention, mlp, n = [], [], (image // model[2]) ** 2 + 1
    for _ in range(model[1]):
        attention.append(n)
        n -= min(r, (n - 1) // 2)
        mlp.append(n)
    return closed_form(model, attention, mlp, image)


def evit(model, keep, fuse, image=224):
    attention, mlp, n = [], [], (image // model[2]) ** 2 + 1
    for layer in range(model[1]):
        attention.append(n)
        if layer in (3, 6, 9):
            n = 1 + math.ceil(keep * (n - 1)) + fuse
        mlp.append(n)
    return closed_form(model, attention, mlp, image)


def dynamic(model, keep, image=224):
    patches = (image // model[2]) ** 2
    tokens = [1 + int(patches * keep ** (layer // 3)) for layer in range(model[1])]
    return closed_form(model, tokens, tokens, image)


PUBLISHED = [
    (full(TINY), 1.254),
    (full(SMALL), 4.599),
    (full(BASE), 17.564),
    (full(LARGE), 61.555),
    (full(HUGE), 167.295),
    (full(BASE, 384), 55.48),
    (full(LARGE, 384), 191.07),
    (full(BASE, 448), 78.50),
    *(
        (evit(SMALL, k, True), g)
        for k, g in zip((0.9, 0.8, 0.7, 0.6, 0.5), (4.02, 3.48, 3.03, 2.64, 2.31), strict=True)
    ),
    *(
        (evit(SMALL, k, False), g)
        for k, g in zip((0.9, 0.8, 0.7, 0.6, 0.5), (3.99, 3.44, 3.00, 2.61, 2.28), strict=True)
    ),
    (dynamic(SMALL, 0.7), 2.88),
    (dynamic(BASE, 0.7), 11.06),
    (tome(SMALL, 13), 2.70),
    (tome(BASE, 13), 10.37),
    (tome(BASE, 16), 8.77),
    (tome(LARGE, 8), 30.96),
    (tome(LARGE, 7), 34.71),
    (tome(HUGE, 7), 92.84),
    (tome(BASE, 45, 384), 28.25),
    (tome(LARGE, 23, 384), 96.24),
    (tome(LARGE, 40, 512), 182.8),
    (tome(HUGE, 40, 518), 513.4),
]


@pytest.mark.parametrize("macs, published", PUBLISHED)
def test_closed_form_gives_the_published_figures(macs, published):
    digits = len(str(published).split(".")[1])
    assert abs(macs / 1e9 - published) <= 0.6 * 10**-digits


def test_diffrate_convention_has_one_more_position():
    tokens = [197] * 12
    plain, diffrate = (closed_form(SMALL, tokens, tokens, convention=c) for c in ("standard", "diffrate"))
    assert plain == 4598882304
    assert diffrate == 4599177216
    assert diffrate - plain == 384 * 3 * 16**2


def test_closed_form_is_an_exact_python_int():
    n = np.full(48, 65537, np.int32)  # squares overflow what NumPy would use
    macs = flops.vit_macs(n, n, width=8192, patch=14, num_patches=65536)
    assert type(macs) is int
    assert macs == 48 * (12 * 65537 * 8192**2 + 2 * 65537**2 * 8192) + 65536 * 3 * 14**2 * 8192 + 8192 * 1000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens_mlp": [5]}, "got 2 and 1"),
        ({"convention": "fvcore"}, "fvcore"),
        ({"width": -1}, "width must not be negative, got -1"),
        ({"tokens_attention": [5, -5]}, "tokens_attention must not be negative, got -5"),
    ],
)
def test_closed_form_refuses(change, message):
    good = {"tokens_attention": [5, 5], "tokens_mlp": [5, 5], "width": 8, "patch": 2, "num_patches": 4}
    with pytest.raises(ValueError, match=message):
        flops.vit_macs(**{**good, **change})


# A whole model, counted and by formula.


def vit(model, image=224, r=0, scan=False, classes=1000):
    """A functional ViT that drops r tokens between attention and MLP, under a scope that scores them by q k^T."""
    width, depth, patch = model
    heads, side = 4, image // patch

    def attend(x, block):
        b, n, c = x.shape
        q, k, v = jnp.split(x @ block["qkv"] + block["bias"], 3, -1)
        q, k, v = (a.reshape(b, n, heads, c // heads) for a in (q, k, v))
        with jax.named_scope("attention"):
            x = x + jax.nn.dot_product_attention(q, k, v).reshape(b, n, c) @ block["proj"]
        if r:
            with jax.named_scope("reducer.drop"):
                score = jnp.einsum("bhd,bnhd->bn", q[:, 0], k)
                x = jnp.take_along_axis(x, lax.top_k(score, n - r)[1][..., None], 1)
        return x + jax.nn.gelu(x @ block["fc1"]) @ block["fc2"]

    def forward(params, images):
        b = images.shape[0]
        x = images.reshape(b, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, side * side, -1)
        x = jnp.concatenate([jnp.zeros((b, 1, width)), x @ params["patch"]], 1)
        if scan:
            x, _ = lax.scan(lambda x, block: (jax.checkpoint(attend)(x, block), None), x, params["blocks"])
        else:
            for block in params["blocks"]:
                x = attend(x, block)
        return x[:, 0] @ params["head"]

    shapes = {"qkv": (width, 3 * width), "bias": (3 * width,), "proj": (width, width)}
    shapes |= {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
    lead = (depth,) if scan else ()
    block = {name: f32(*lead, *shape) for name, shape in shapes.items()}
    params = {
        "patch": f32(3 * patch**2, width),
        "head": f32(width, classes),
        "blocks": block if scan else [block] * depth,
    }
    return forward, params, f32(1, image, image, 3)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("model", [SMALL, BASE, HUGE])
def test_model_equals_the_closed_form(model, scan):
    forward, params, images = vit(model, scan=scan)
    cost = flops.count(jax.jit(forward), params, images)
    assert cost == flops.Cost(full(model), 0, {"dot_general": full(model)}, ())
    assert type(cost.total) is int


def test_reduced_model_counts_apart_from_its_reducer():
    forward, params, images = vit(SMALL, r=13)
    cost = flops.count(forward, params, images)
    assert cost.model == tome(SMALL, 13)
    assert cost.reducer == sum(197 - 13 * layer for layer in range(12)) * 384
    assert cost.total == cost.model + cost.reducer == sum(cost.by_primitive.values())
    assert cost.notes == ()


def test_counts_add_up_over_the_batch_and_take_keywords():
    forward, params, images = vit(TINY)
    batch = Struct((5, *images.shape[1:]), images.dtype)
    assert flops.count(forward, params, images=batch).total == 5 * full(TINY)


def test_walk_is_fast():
    forward, params, images = vit(HUGE, r=7)
    step = jax.make_jaxpr(jax.grad(lambda p, x: forward(p, x).sum()))(params, images).jaxpr
    start = time.perf_counter()
    flops._walk(step, [True] * len(step.outvars), inside=False)
    assert time.perf_counter() - start < 1


def test_nothing_runs():
    def fails(x):
        return jax.pure_callback(lambda x: 1 / 0, x, x) @ x

    cost = flops.count(fails, jnp.ones((8, 8)))
    assert cost.total == PRODUCT
    assert "pure_callback" in cost.notes[0]


# Products.


def test_dot_general_with_batch_and_several_contracted_axes():
    cost = flops.count(lambda a, b: jnp.einsum("bhij,bhjkl->bikl", a, b), f32(2, 3, 4, 5), f32(2, 3, 5, 6, 7))
    assert cost.total == 2 * 4 * 6 * 7 * (3 * 5)


def test_grouped_query_attention():
    q, k = f32(2, 10, 8, 16), f32(2, 20, 2, 16)
    assert flops.count(jax.nn.dot_product_attention, q, k, k).total == 2 * (2 * 8 * 10 * 20 * 16)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_counts_padding_and_groups(groups):
    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (2, 1), ((1, 1), (2, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    image, kernel = f32(2, 9, 11, 8), f32(3, 3, 8 // groups, 12)
    out = jax.eval_shape(conv, image, kernel).shape
    cost = flops.count(conv, image, kernel)
    assert cost.total == math.prod(out) * 3 * 3 * 8 // groups
    assert cost.by_primitive == {"conv_general_dilated": cost.total}


def test_patch_embedding_as_convolution_equals_the_matrix_product():
    def embed(x, w):
        return lax.conv_general_dilated(x, w, (16, 16), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops.count(embed, f32(1, 224, 224, 3), f32(16, 16, 3, 384)).total == 196 * 3 * 16**2 * 384


def test_transposed_convolution_counts_every_pixel_with_every_tap():
    def up(x, w):
        return lax.conv_transpose(x, w, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops.count(up, f32(1, 7, 7, 6), f32(4, 4, 6, 5)).total == 7 * 7 * 4 * 4 * 6 * 5


def test_gradients_of_a_strided_convolution_cost_the_same_each():
    def loss(x, w):
        return lax.conv_general_dilated(x, w, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    image, kernel = f32(2, 16, 16, 3), f32(4, 4, 3, 5)
    forward = 2 * 4 * 4 * 5 * 4 * 4 * 3
    assert flops.count(loss, image, kernel).total == forward
    assert flops.count(jax.grad(loss, 0), image, kernel).total == forward
    assert flops.count(jax.grad(loss, 1), image, kernel).total == forward


def test_ragged_dot_counts_every_row_once():
    cost = flops.count(lax.ragged_dot, f32(32, 16), f32(4, 16, 24), Struct((4,), jnp.int32))
    assert cost.total == 32 * 16 * 24


def test_fused_attention_counts_as_the_plain_one(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    q, k = Struct((2, 16, 4, 64), jnp.bfloat16), Struct((2, 32, 4, 64), jnp.bfloat16)

    def attend(implementation):
        return lambda q, k: jax.nn.dot_product_attention(q, k, k, implementation=implementation)

    fast, plain = (flops.count(attend(i), q, k) for i in ("cudnn", "xla"))
    assert fast.total == plain.total == 2 * (2 * 4 * 16 * 32 * 64)
    step = jax.grad(lambda q, k: attend("cudnn")(q, k).astype(jnp.float32).sum(), (0, 1))
    assert flops.count(step, q, k).total == 7 * (2 * 4 * 16 * 32 * 64)


@pytest.mark.parametrize(
    "fn", [jnp.sort, jnp.argsort, lambda x: lax.top_k(x, 3), lambda x: x.at[x[0].astype(int)].add(1)]
)
def test_sorting_and_moving_cost_nothing(fn):
    assert flops.count(fn, SQUARE) == flops.Cost(0, 0, {}, ())


def test_linear_algebra_is_named_not_counted():
    cost = flops.count(jnp.linalg.cholesky, SQUARE)
    assert cost.total == 0
    assert cost.notes == ("cholesky: not a matrix product, its work is not counted",)


# Structure.


def test_calls_count_in_full():
    @jax.custom_vjp
    def with_vjp(x):
        return x @ x

    @jax.custom_jvp
    def with_jvp(x):
        return x @ x

    with_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    with_jvp.defjvp(lambda p, t: (with_jvp(*p), t[0] @ p[0] + p[0] @ t[0]))
    for wrap in (jax.jit, jax.checkpoint, lambda f: f, with_vjp, with_jvp):
        fn = wrap if wrap in (with_vjp, with_jvp) else wrap(lambda x: x @ x)
        assert flops.count(fn, SQUARE).total == PRODUCT
        assert flops.count(jax.vmap(fn), f32(5, 8, 8)).total == 5 * PRODUCT
        # Once forwards, and a product for each of the two factors backwards.
        assert flops.count(jax.value_and_grad(lambda x, f=fn: f(x).sum()), SQUARE).total == 3 * PRODUCT


def test_remat_counts_what_is_computed_again():
    def step(wrap):
        block = wrap(lambda x: jnp.sin(jnp.sin(x @ x) @ x))
        return flops.count(jax.value_and_grad(lambda x: block(x).sum()), SQUARE).total

    assert step(lambda f: f) == 6 * PRODUCT
    assert step(jax.checkpoint) == 8 * PRODUCT


def test_scan_counts_its_length():
    def nested(x):
        def inner(c, _):
            return c @ x, c @ c

        def outer(c, _):
            return lax.scan(inner, c, None, length=3)

        return lax.scan(outer, x, None, length=5)

    assert flops.count(nested, SQUARE).total == 5 * 3 * 2 * PRODUCT
    assert flops.count(lambda x: lax.fori_loop(0, 4, lambda i, c: c @ x, x), SQUARE).total == 4 * PRODUCT
    assert flops.count(lambda x: lax.map(lambda row: row @ x, x), SQUARE).total == PRODUCT
    assert flops.count(lambda x: lax.scan(lambda c, _: (c @ x, None), x, None, length=0), SQUARE).total == 0


@pytest.mark.parametrize(
    "start, condition, step, trips",
    [
        (2, lambda i: i < 7, lambda i: i + 1, 5),
        (0, lambda i: i < 10, lambda i: 3 + i, 4),
        (0, lambda i: i <= 10, lambda i: i + 5, 3),
        (9, lambda i: i > 0, lambda i: i - 2, 5),
        (9, lambda i: i >= 1, lambda i: i - 2, 5),
        (0, lambda i: jnp.greater(6, i), lambda i: i + 1, 6),
        (7, lambda i: i < 3, lambda i: i + 1, 0),
    ],
)
def test_while_loop_with_literal_bounds(start, condition, step, trips):
    def loop(x):
        return lax.while_loop(lambda c: condition(c[0]), lambda c: (step(c[0]), c[1] @ x), (start, x))[1]

    assert flops.count(loop, SQUARE) == flops.Cost(
        trips * PRODUCT, 0, {"dot_general": trips * PRODUCT} if trips else {}, ()
    )


def test_fori_loop_with_array_bounds_that_are_literals():
    cost = flops.count(lambda x: lax.fori_loop(jnp.int32(1), jnp.int32(6), lambda i, c: c @ x, x), SQUARE)
    assert (cost.total, cost.notes) == (5 * PRODUCT, ())


@pytest.mark.parametrize(
    "condition, step",
    [
        (lambda c: (c[1] @ c[1]).sum() < 3, lambda i: i + 1),
        (lambda c: c[0] < c[1][0, 0].astype(int), lambda i: i + 1),
        (lambda c: c[0] < 100, lambda i: i * 2),
        (lambda c: c[0] < 100, lambda i: i - 1),
        (lambda c: c[0] != 100, lambda i: i + 1),
    ],
)
def test_other_while_loops_count_once_and_say_so(condition, step):
    def loop(x):
        return lax.while_loop(condition, lambda c: (step(c[0]), c[1] @ x), (1, x))

    cost = flops.count(loop, SQUARE)
    assert cost.total in (PRODUCT, 2 * PRODUCT)
    assert len(cost.notes) == 1
    assert cost.notes[0].startswith("while: the number of iterations depends on the data")


def test_while_loop_without_products_needs_no_note():
    assert flops.count(lambda x: lax.while_loop(lambda c: c < 3, lambda c: c * 2, x[0, 0]), SQUARE).notes == ()


def test_cond_counts_its_most_expensive_branch():
    def choose(i, x):
        return lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    def same(i, x):
        return lax.cond(i > 0, lambda x: x @ x, lambda x: x.T @ x, x)

    index = Struct((), jnp.int32)
    cost = flops.count(choose, index, SQUARE)
    assert cost.total == 2 * PRODUCT
    assert cost.notes == ("cond: branches of different cost, the most expensive one is counted",)
    assert flops.count(same, index, SQUARE) == flops.Cost(PRODUCT, 0, {"dot_general": PRODUCT}, ())


def test_dead_code_does_not_count():
    @jax.jit
    def two(x):
        return x @ x, x @ x.T

    def scan(x):
        (_, kept), _ = lax.scan(lambda c, _: ((c[0] @ x, c[1] + 1), c[0]), (x, x), None, length=3)
        return kept

    def fed(x):  # the second part of the carry is needed by the first
        return lax.scan(lambda c, _: ((c[1], c[1] @ x), None), (x, x), None, length=3)[0][0]

    assert flops.count(lambda x: two(x)[0], SQUARE).total == PRODUCT
    assert flops.count(two, SQUARE).total == 2 * PRODUCT
    assert flops.count(scan, SQUARE).total == 0
    assert flops.count(fed, SQUARE).total == 3 * PRODUCT


def test_shard_map_counts_all_shards():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    spec = jax.sharding.PartitionSpec
    fn = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec("data"))
    assert flops.count(fn, f32(32, 8), SQUARE).total == 32 * 8 * 8


def test_pallas_kernel_counts_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def fn(x, y):
        rows = pallas.BlockSpec((4, 8), lambda i: (i, 0))
        whole = pallas.BlockSpec((8, 8), lambda i: (0, 0))
        call = pallas.pallas_call(
            kernel, grid=(6,), in_specs=[rows, whole], out_specs=rows, out_shape=f32(24, 8), interpret=True
        )
        return call(x, y)

    assert flops.count(fn, f32(24, 8), SQUARE) == flops.Cost(24 * 64, 0, {"dot_general": 24 * 64}, ())


# Scopes.


def scoped(x, name="reducer.tome"):
    with jax.named_scope(name):
        return x @ x


def test_scope_decides_the_column():
    cost = flops.count(lambda x: scoped(x) + x.T @ x, SQUARE)
    assert (cost.model, cost.reducer) == (PRODUCT, PRODUCT)


@pytest.mark.parametrize("name", ["block.3/reducer.tome", "reducer.a/match", "reducer.a-b_c"])
def test_scope_may_be_nested(name):
    assert flops.count(lambda x: scoped(x, name), SQUARE).reducer == PRODUCT


@pytest.mark.parametrize("name", ["reducer", "my_reducer.x", "reducers.tome", "attention"])
def test_other_scopes_are_the_model(name):
    assert flops.count(lambda x: scoped(x, name), SQUARE).model == PRODUCT


def test_scope_reaches_into_calls_and_not_beyond():
    """Inner jaxprs are cached with a name stack of their own: the same one serves inside and outside the scope."""
    bodies = {
        "jit": jax.jit(lambda x: x @ x),
        "remat": jax.checkpoint(lambda x: x @ x),
        "scan": lambda x: lax.scan(step, x, None, length=1)[0],
        "cond": lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x.T @ x, x),
        "twice": jax.jit(jax.jit(lambda x: x @ x)),
    }

    def step(c, _):
        return c @ c, None

    for name, body in bodies.items():

        def both(x, body=body):
            with jax.named_scope("reducer.x"):
                y = body(x)
            return y + body(x) + body(x)

        cost = flops.count(both, SQUARE)
        assert (cost.reducer, cost.model) == (PRODUCT, 2 * PRODUCT), name


@pytest.mark.parametrize(
    "wrap, again", [(lambda f: f, 0), (jax.jit, 0), (jax.checkpoint, 1), (lambda f: jax.jit(jax.checkpoint(f)), 1)]
)
def test_scope_survives_transforms(wrap, again):
    def loss(x):
        return wrap(lambda x: jnp.sin(scoped(x)))(x).sum()

    cost = flops.count(jax.vmap(loss), f32(5, 8, 8))
    assert (cost.model, cost.reducer) == (0, 5 * PRODUCT)
    cost = flops.count(jax.value_and_grad(loss), SQUARE)
    assert cost.model == 0
    assert cost.reducer == (3 + again) * PRODUCT  # remat computes the product again
    cost = flops.count(jax.vmap(jax.grad(loss)), f32(5, 8, 8))
    assert cost.model == 0
    assert cost.reducer == 5 * 3 * PRODUCT


def test_scope_survives_scan_and_its_gradient():
    def loss(x):
        return lax.scan(lambda c, _: (scoped(c) + c @ x, None), x, None, length=3)[0].sum()

    forward, backward = flops.count(loss, SQUARE), flops.count(jax.value_and_grad(loss), SQUARE)
    assert (forward.model, forward.reducer) == (3 * PRODUCT, 3 * PRODUCT)
    assert (backward.model, backward.reducer) == (9 * PRODUCT, 9 * PRODUCT)
