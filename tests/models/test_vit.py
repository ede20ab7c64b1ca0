"""The vision transformer: configs, embedding, every hook site, tracing, heads, and scanned blocks."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import token_map
from tokjax.hooks import Hook
from tokjax.models import layers
from tokjax.models.vit import PRESETS, SITES, ViT, ViTConfig, preset, sincos
from tokjax.reducers.vit.tome import ToMe
from tokjax.reducers.vit.topk import TopK
from tokjax.token_map import HardMap, Plan

TINY = ViTConfig(image_size=(8, 12), patch_size=4, width=8, depth=3, heads=2, num_classes=5, mlp_ratio=2)


def images(cfg=TINY, batch=2, seed=0):
    shape = (batch, *cfg.image_size, cfg.channels)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def built(cfg=TINY, seed=0):
    """Graph and parameters, all of them drawn: biases, scales and heads start as zeros and ones."""
    graphdef, state = nnx.split(ViT(cfg, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return leaf + jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(state))


def run(cfg, hooks=(), *, params=None, **options):
    graphdef, drawn = built(cfg)
    options = {"key": options.pop("key", None)} | options
    static = {name: options.pop(name) for name in ("train", "trace") if name in options}

    @jax.jit
    def forward(params, images, options):
        return nnx.merge(graphdef, params)(images, hooks, **options, **static)

    return forward(drawn if params is None else params, images(cfg), options)


# Configs.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (8, 3)}, r"image_size=\(8, 3\): must be .* at least patch_size=4 each"),
        ({"image_size": (8,)}, r"image_size=\(8,\): must be \(height, width\)"),
        ({"patch_size": 0}, r"patch_size=0: must be at least 1"),
        ({"depth": 0}, r"depth=0"),
        ({"heads": 3}, r"heads=3: must divide width=8"),
        ({"width": 6, "position": "sincos"}, r"width=6: must be a multiple of 4"),
        ({"pooling": "max"}, r"pooling='max': must be one of cls, mean, size_mean"),
        ({"gelu": "relu"}, r"gelu='relu': must be one of exact, tanh, quick"),
        ({"position": "rotary"}, r"position='rotary': must be one of learned, sincos"),
        ({"class_token": False}, r"pooling='cls': needs class_token=True"),
        ({"class_token": False, "pooling": "cls_mean"}, r"pooling='cls_mean': needs class_token=True"),
        ({"fc_norm": True, "pooling": "cls_mean"}, r"pooling='cls_mean': needs fc_norm=False"),
        ({"class_token": False, "pooling": "mean", "distilled": True}, r"distilled=True: needs class_token=True"),
        ({"dtype": "int8"}, r"dtype='int8': must be one of float32, bfloat16, float16"),
        ({"drop_path": 1.0}, r"drop_path=1.0: must be in \[0, 1\)"),
    ],
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_config_derives_what_follows():
    cfg = dataclasses.replace(TINY, image_size=[8, 12], distilled=True, registers=3)
    assert hash(cfg) == hash(dataclasses.replace(cfg))
    assert (cfg.grid, cfg.num_patches, cfg.prefix, cfg.table_prefix) == ((2, 3), 6, 5, 2)
    info = cfg.info
    assert (info.depth, info.width, info.heads, info.length, info.prefix) == (3, 8, 2, 11, 5)
    assert (info.grid, info.pooling, info.sites) == ((2, 3), "cls", SITES)
    assert dataclasses.replace(cfg, position_prefix=False).table_prefix == 0


def test_presets():
    cfg = preset("H/14", num_classes=10)
    assert (cfg.width, cfg.depth, cfg.heads, cfg.patch_size, cfg.num_classes) == (1280, 32, 16, 14, 10)
    assert all(preset(f"{name}/16").width == sizes["width"] for name, sizes in PRESETS.items())
    for wrong in ("x/16", "s", "s/16.5", "s/"):
        with pytest.raises(ValueError, match="must be SIZE/PATCH with a size of ti, s, b, l, so400m, h, g"):
            preset(wrong)


def test_parameter_tree():
    cfg = dataclasses.replace(
        TINY,
        distilled=True,
        registers=2,
        layer_scale=0.1,
        qk_norm=True,
        pre_norm=True,
        qkv_bias=False,
        patch_bias=False,
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, built(cfg)[1], is_leaf=lambda leaf: hasattr(leaf, "shape"))
    norm = {"scale": (8,), "bias": (8,)}
    small = {"scale": (4,), "bias": (4,)}
    block = {
        "norm1": norm,
        "attn": {
            "qkv": {"kernel": (8, 24)},
            "proj": {"kernel": (8, 8), "bias": (8,)},
            "q_norm": small,
            "k_norm": small,
        },
        "ls1": {"gamma": (8,)},
        "norm2": norm,
        "mlp": {"fc1": {"kernel": (8, 16), "bias": (16,)}, "fc2": {"kernel": (16, 8), "bias": (8,)}},
        "ls2": {"gamma": (8,)},
    }
    head = {"kernel": (8, 5), "bias": (5,)}
    assert shapes == {
        "patch_embed": {"kernel": (48, 8)},
        "cls_token": (1, 1, 8),
        "dist_token": (1, 1, 8),
        "reg_token": (1, 2, 8),
        "pos_embed": (1, 8, 8),
        "norm_pre": norm,
        "blocks": {0: block, 1: block, 2: block},
        "norm": norm,
        "head": head,
        "head_dist": head,
    }


# Embedding.


def test_sincos_is_two_one_dimensional_codes():
    h, w, width = 3, 5, 16
    table = sincos((h, w), width)
    assert table.shape == (h * w, width)
    for row in range(h):
        for column in range(w):
            for i in range(width // 4):
                frequency = 1 / 10000 ** (4 * i / width)
                expected = [
                    f(place * frequency) for place in (column, row) for f in (math.sin, math.cos)
                ]  # column first, sines before cosines
                got = table[row * w + column, [i, i + width // 4, i + width // 2, i + 3 * width // 4]]
                np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("position_prefix", [True, False])
def test_embedding_puts_prefix_patches_and_positions_in_order(position_prefix):
    cfg = dataclasses.replace(TINY, distilled=True, registers=2, position_prefix=position_prefix)
    graphdef, params = built(cfg)
    tokens = nnx.merge(graphdef, params).embed(images(cfg))
    assert tokens.prefix == 4
    assert tokens.size is None
    kernel, bias, table = params["patch_embed"]["kernel"], params["patch_embed"]["bias"], params["pos_embed"][0]
    shift = 2 if position_prefix else 0
    for row in range(2):
        for column in range(3):
            patch = images(cfg)[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            place = 3 * row + column
            expected = patch.reshape(2, -1) @ kernel + bias + table[place + shift]
            np.testing.assert_allclose(tokens.x[:, 4 + place], expected, atol=1e-5)
    for i, name in enumerate(("cls_token", "dist_token")):
        expected = params[name][0, 0] + (table[i] if position_prefix else 0)
        np.testing.assert_allclose(tokens.x[:, i], jnp.broadcast_to(expected, (2, 8)), atol=1e-6)
    np.testing.assert_array_equal(tokens.x[:, 2:4], jnp.broadcast_to(params["reg_token"], (2, 2, 8)))


def test_sincos_positions_of_the_prefix_are_zero():
    state = nnx.to_pure_dict(nnx.split(ViT(dataclasses.replace(TINY, position="sincos"), rngs=nnx.Rngs(0)))[1])
    np.testing.assert_array_equal(state["pos_embed"][0, 0], 0)
    np.testing.assert_array_equal(state["pos_embed"][0, 1:], sincos((2, 3), 8))


# Hooks.


@dataclasses.dataclass(frozen=True)
class Spy:
    """Notes, while the model is traced, where it is called and with what."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def plan(self, tokens, signals):
        self.seen.append((tokens.length, signals.key is not None, signals.context.grid))

    def attend(self, tokens, signals):
        self.seen.append((tokens.length, signals.key is not None, signals.context.grid))
        return signals

    def readout(self, states):
        self.seen.append([state.length for state in states])
        return states[0].x[:, 0]


@pytest.mark.parametrize("scan", [False, True])
def test_every_site_is_called_where_it_should(scan):
    calls = {"attend": "attend", "readout": "readout"}
    spies = {
        (site, layer): Spy() for site in SITES for layer in (range(3) if site not in ("input", "readout") else (0,))
    }
    hooks = [Hook(site, layer, spy, calls.get(site, "plan")) for (site, layer), spy in spies.items()]
    assert len(SITES) == 8
    run(dataclasses.replace(TINY, scan=scan), hooks)
    for (site, _), spy in spies.items():
        if site == "readout":
            assert spy.seen == [[7, 7, 7]]
        else:
            assert spy.seen == [(7, site in ("attend", "after_attention", "after_block"), (2, 3))]


def test_hooks_that_would_never_be_called_are_refused_before_anything_runs():
    model = ViT(TINY, rngs=nnx.Rngs(0))
    for hook, message in (
        (Hook("before_llm", 0, Spy()), "Spy hooks in at 'before_llm'"),
        (Hook("after_block", 3, Spy()), "Spy hooks in at layer 3; this model has layers 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(images(), [hook])
        assert hook.reducer.seen == []


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 8, 12, 1), (8, 12, 3)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"images has shape .*: must be \(batch, 8, 12, 3\)"):
        ViT(TINY, rngs=nnx.Rngs(0))(jnp.zeros(shape))


@dataclasses.dataclass(frozen=True)
class Merge:
    """Token 1 takes in token 2, at any site."""

    def plan(self, tokens, signals):
        keep = jnp.array([[0, 1, *range(3, tokens.length)]] * tokens.batch)
        merge = HardMap(keep, jnp.array([[2]] * tokens.batch), jnp.array([[1]] * tokens.batch), tokens.length)
        return Plan(merge, size=merge)


def by_hand(block, x, tokens, around):
    """A block with a branch that runs on merged tokens, from its own layers."""

    def branch(x, norm, run, here):
        part = tokens.replace(x=norm(x))
        if not here:
            return x + run(part)
        plan = Merge().plan(part, None)
        return x + plan.map.unmerge(run(token_map.apply(plan, part)))

    def attend(part):
        return block.attn(block.attn.signals(part.x, part, None))

    x = branch(x, block.norm1, attend, around == "around_attention")
    return branch(x, block.norm2, lambda part: block.mlp(part.x), around == "around_mlp")


@pytest.mark.parametrize("site", ["around_attention", "around_mlp"])
def test_around_a_branch_tokens_come_back(site):
    graphdef, params = built()

    @jax.jit
    def blocks(params):
        model = nnx.merge(graphdef, params)
        tokens, block = model.embed(images()), model.blocks[0]
        hooked, plain = block(tokens, [Hook(site, 0, Merge())], 0)[0], block(tokens)[0]
        return hooked, by_hand(block, tokens.x, tokens, site), plain, by_hand(block, tokens.x, tokens, None)

    out, expected, plain, expected_plain = blocks(params)
    assert out.length == 7
    assert out.size is None
    np.testing.assert_allclose(out.x, expected, atol=1e-5)
    np.testing.assert_allclose(plain.x, expected_plain, atol=1e-5)
    assert np.abs(out.x - plain.x).max() > 1e-3


def test_proportional_attention_counts_a_merged_token_twice():
    """Merging two equal tokens changes nothing if attention counts the merged one twice."""
    graphdef, params = built()

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        tokens = model.embed(images())
        tokens = tokens.replace(x=tokens.x.at[:, 2].set(tokens.x[:, 1]))
        return model.encode(tokens), model.encode(tokens, [Hook("input", 0, Merge())])

    plain, merged = both(params)
    np.testing.assert_allclose(merged.logits, plain.logits, atol=1e-5)
    np.testing.assert_allclose(merged.tokens.x[:, 2:], plain.tokens.x[:, 3:], atol=1e-5)


def test_attend_hooks_change_the_attention():
    @dataclasses.dataclass(frozen=True)
    class OnlyCls:
        def attend(self, tokens, signals):
            return signals.replace(bias=jnp.where(jnp.arange(tokens.length) == 0, 0.0, -1e30)[None, None, None])

    graphdef, params = built()
    block = nnx.merge(graphdef, params).blocks[1]
    tokens = nnx.merge(graphdef, params).embed(images())
    out, _ = block(tokens, [Hook("attend", 1, OnlyCls(), "attend")], 1)
    value = block.attn.signals(block.norm1(tokens.x), tokens, None).value[:, :1].reshape(2, 1, 8)
    middle = tokens.x + block.attn.proj(value)
    np.testing.assert_allclose(out.x, middle + block.mlp(block.norm2(middle)), atol=1e-5)


# Outputs.


def test_tracing_follows_every_input_token():
    out = run(TINY, ToMe(r=(2, 0, 1)).hooks(TINY.info), trace=True)
    lengths = [5, 5, 4]
    assert [layer.length for layer in out.trace] == [layer.slots for layer in out.trace] == lengths
    for layer, length in zip(out.trace, lengths, strict=True):
        np.testing.assert_array_equal(layer.tokens, [length] * 2)
        source = token_map.source(layer.origin, length)
        np.testing.assert_array_equal(source.sum(1), 1)  # every input token is somewhere
        np.testing.assert_array_equal(source.sum(2), layer.size)  # and a size is how many
    np.testing.assert_array_equal(out.trace[-1].origin, out.tokens.origin)
    assert run(TINY).trace is None
    plain, traced = run(TINY), run(TINY, trace=True)
    np.testing.assert_allclose(plain.logits, traced.logits, atol=1e-6)
    np.testing.assert_array_equal(traced.trace[0].origin, [range(7)] * 2)


def test_tracing_marks_dropped_tokens():
    out = run(TINY, TopK(kept=2, layers=(1,)).hooks(TINY.info), trace=True)
    assert [layer.slots for layer in out.trace] == [7, 3, 3]
    for row in np.asarray(out.trace[1].origin):
        assert sorted(row) == [0, 1, 2, 3, 3, 3, 3]


def test_aux_is_returned():
    @dataclasses.dataclass(frozen=True)
    class Count:
        def plan(self, tokens, signals):
            return Plan(aux={"length": jnp.int32(tokens.length)})

    out = run(TINY, [Hook("after_attention", 2, Count())])
    assert {key: int(value["length"]) for key, value in out.tokens.aux.items()} == {"02.after_attention.Count": 7}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda x, norm: norm(x)[:, 0]),
        ({"pooling": "mean"}, lambda x, norm: norm(x)[:, 1:].mean(1)),
        ({"pooling": "mean", "class_token": False}, lambda x, norm: norm(x).mean(1)),
        ({"pooling": "mean", "fc_norm": True}, lambda x, norm: norm(x[:, 1:].mean(1))),
        ({"pooling": "size_mean", "registers": 2}, lambda x, norm: norm(x)[:, 3:].mean(1)),
        (
            {"pooling": "cls_mean", "registers": 2},
            lambda x, norm: jnp.concatenate([norm(x)[:, 0], norm(x)[:, 3:].mean(1)], 1),
        ),
    ],
)
def test_pooling_and_head(changes, expected):
    cfg = dataclasses.replace(TINY, **changes)
    graphdef, params = built(cfg)
    out, model = run(cfg), nnx.merge(graphdef, params)
    pooled = expected(out.tokens.x, model.fc_norm if cfg.fc_norm else model.norm)
    np.testing.assert_allclose(out.pooled, pooled, atol=1e-5)
    np.testing.assert_allclose(out.logits, pooled @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5)
    assert len(out.head_logits) == 1


def test_a_readout_replaces_pooling():
    @dataclasses.dataclass(frozen=True)
    class First:
        def readout(self, states):
            return states[0].x[:, 1]

    out = run(TINY, [Hook("readout", 0, First(), "readout")])
    graphdef, params = built()
    model = nnx.merge(graphdef, params)
    first, _ = model.blocks[0](model.embed(images()))
    np.testing.assert_allclose(out.pooled, first.x[:, 1], atol=1e-5)
    with pytest.raises(ValueError, match=r"readout hook gave features of shape \(2, 8\): must be \(batch, 16\)"):
        run(dataclasses.replace(TINY, pooling="cls_mean"), [Hook("readout", 0, First(), "readout")])


def test_distilled_models_have_two_heads_and_answer_with_their_mean():
    cfg = dataclasses.replace(TINY, distilled=True)
    out, (_, params) = run(cfg), built(cfg)
    heads = [
        out.features[:, i] @ params[name]["kernel"] + params[name]["bias"]
        for i, name in enumerate(("head", "head_dist"))
    ]
    for got, want in zip(out.head_logits, heads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(out.logits, (heads[0] + heads[1]) / 2, atol=1e-5)


def test_without_classes_the_features_come_out():
    out = run(dataclasses.replace(TINY, num_classes=0))
    assert out.head_logits == ()
    np.testing.assert_array_equal(out.logits, out.pooled)


def test_bf16_activations_stay_near():
    cfg = dataclasses.replace(TINY, dtype="bfloat16", layer_scale=0.5, qk_norm=True, pre_norm=True)
    hooks = ToMe(r=(1,)).hooks(cfg.info)
    half, full = run(cfg, hooks), run(dataclasses.replace(cfg, dtype="float32"), hooks)
    assert half.tokens.x.dtype == jnp.bfloat16
    assert half.logits.dtype == jnp.float32
    assert half.tokens.size.dtype == jnp.float32
    np.testing.assert_allclose(half.logits, full.logits, atol=0.15)


# Scan and stochastic depth.

DEEP = dataclasses.replace(TINY, depth=9)


def scanned(cfg, params):
    return dataclasses.replace(cfg, scan=True), params | {"blocks": layers.stack(params["blocks"])}


@pytest.mark.parametrize("reducer", [None, TopK(kept=4, layers=(4,)), ToMe(r=1, layers=(0, 5))])
def test_scanned_blocks_give_the_same(reducer):
    params = built(DEEP)[1]
    hooks = () if reducer is None else reducer.hooks(DEEP.info)
    cfg, stacked = scanned(DEEP, params)
    plain, scan = run(DEEP, hooks, params=params), run(cfg, hooks, params=stacked)
    np.testing.assert_allclose(plain.logits, scan.logits, atol=1e-5)
    np.testing.assert_allclose(plain.features, scan.features, atol=1e-5)


def test_long_runs_are_really_scanned():
    graphdef, params = built(dataclasses.replace(DEEP, scan=True))

    def program(hooks):
        jaxpr = jax.make_jaxpr(lambda p, x: nnx.merge(graphdef, p)(x, hooks).logits)(params, images())
        return [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]

    assert program(()) == [9]
    assert program(TopK(kept=4, layers=(4,)).hooks(DEEP.info)) == [4, 4]
    assert program(TopK(kept=4, layers=(2,)).hooks(DEEP.info)) == [6]  # runs below four do not pay
    assert program(ToMe(r=1, layers=tuple(range(9))).hooks(DEEP.info)) == []


def test_scanned_blocks_trace_and_drop_the_same():
    cfg = dataclasses.replace(DEEP, drop_path=0.5)
    params = built(cfg)[1]
    scan_cfg, stacked = scanned(cfg, params)
    options = {"key": jax.random.key(1), "train": True}
    plain, scan = run(cfg, params=params, **options), run(scan_cfg, params=stacked, **options)
    np.testing.assert_allclose(plain.logits, scan.logits, atol=1e-5)
    assert len(run(scan_cfg, params=stacked, trace=True).trace) == 9


def test_stochastic_depth_needs_train_and_spares_the_first_block():
    cfg = dataclasses.replace(TINY, drop_path=0.9)
    key = jax.random.key(0)
    still = run(cfg, key=key)
    np.testing.assert_array_equal(still.logits, run(dataclasses.replace(cfg, drop_path=0.0)).logits)
    moving = [run(cfg, key=jax.random.key(i), train=True).logits for i in range(2)]
    assert not np.allclose(moving[0], moving[1])
    one = dataclasses.replace(cfg, depth=1)
    np.testing.assert_array_equal(run(one, key=key, train=True).logits, run(one).logits)


def test_gradients_are_finite_and_reach_every_parameter():
    cfg = dataclasses.replace(TINY, distilled=True, registers=1, layer_scale=0.1, qk_norm=True, pre_norm=True)
    graphdef, params = built(cfg)
    hooks = ToMe(r=(1,)).hooks(cfg.info)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: (nnx.merge(graphdef, p)(images(cfg), hooks).logits ** 2).sum())(params)

    for path, leaf in jax.tree.leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
