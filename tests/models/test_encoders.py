"""What CLIP, SigLIP and DINO add to the ViT: rotary and flexible positions, gated MLPs, attention pooling, biases."""

import dataclasses
import functools

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax.hooks import Hook
from tokjax.models import layers
from tokjax.models.text import TextConfig
from tokjax.models.vit import Patches, ViTConfig, flexible_positions
from tokjax.pretrained.positions import resize_grid
from tokjax.reducers import REGISTRY
from tokjax.token_map import HardMap, Plan
from tokjax.tokens import Tokens

BASE = ViTConfig(image_size=(16, 20), patch_size=4, width=16, depth=3, heads=2, num_classes=5, mlp_ratio=2)
ROPE = dataclasses.replace(BASE, position="rope", registers=4, key_bias=False, mlp="swiglu", layer_scale=0.5)
NAFLEX = dataclasses.replace(BASE, image_size=(16, 16), position="naflex", class_token=False, pooling="map")
SIGLIP = dataclasses.replace(BASE, class_token=False, pooling="map", gelu="tanh")
CLIP_TEXT = TextConfig(vocab_size=20, length=9, width=16, depth=3, heads=2, embed_dim=6, eos_id=19)
SIGLIP_TEXT = dataclasses.replace(CLIP_TEXT, causal=False, pooling="last", eos_id=None, embed_dim=16, head_bias=True)
SHAPES = np.array([[4, 4], [3, 4], [2, 5], [1, 1]], np.int32)


@functools.cache
def model(cfg):
    made = tokjax.build(cfg)
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), made.params))


def images(cfg=BASE, batch=2):
    return np.random.default_rng(1).normal(size=(batch, *cfg.image_size, 3)).astype(np.float32)


def run(model, x, **options):
    """The whole output."""
    return jax.jit(lambda p, x: model.forward(p, x, **options), compiler_options=QUICK)(model.params, x)


def patches(length=16, shapes=SHAPES):
    values = np.random.default_rng(2).normal(size=(len(shapes), 16, 48)).astype(np.float32)
    valid = np.arange(16) < shapes.prod(1)[:, None]
    padded = np.pad(np.where(valid[..., None], values, 9.0), ((0, 0), (0, max(length - 16, 0)), (0, 0)))[:, :length]
    return Patches(padded.astype(np.float32), np.arange(length) < shapes.prod(1)[:, None], shapes)


# Rotary positions.


def test_rotation_is_that_of_complex_numbers():
    rng = np.random.default_rng(0)
    x, position = rng.normal(size=(1, 3, 1, 8)).astype(np.float32), np.array([[[0, 0], [1, 2], [-1, -1]]])
    (out,) = layers.rope_2d((x,), position, (2, 4), 100.0)
    frequency = 2 * np.pi * 100.0 ** -np.array([0, 0.5])
    for i, (row, column) in enumerate(position[0][:2]):
        y, x_ = 2 * (row + 0.5) / 2 - 1, 2 * (column + 0.5) / 4 - 1
        turned = (x[0, i, 0, :4] + 1j * x[0, i, 0, 4:]) * np.exp(1j * np.concatenate([y * frequency, x_ * frequency]))
        np.testing.assert_allclose(out[0, i, 0], np.concatenate([turned.real, turned.imag]), atol=1e-5)
    np.testing.assert_array_equal(out[0, 2], x[0, 2])  # without a place, not rotated


def test_rotary_logits_depend_on_differences_of_place_only():
    rng = np.random.default_rng(0)
    q, k = (np.tile(rng.normal(size=(1, 1, 1, 8)), (1, 2, 1, 1)).astype(np.float32) for _ in range(2))
    (rq,) = layers.rope_2d((q,), np.array([[[0, 0], [2, 3]]]), (5, 5), 100.0)
    (rk,) = layers.rope_2d((k,), np.array([[[1, 1], [3, 4]]]), (5, 5), 100.0)
    dots = (np.asarray(rq) * np.asarray(rk)).sum(-1)[0, :, 0]
    np.testing.assert_allclose(dots[0], dots[1], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """Puts the patches in another order, which attention with true positions cannot notice."""

    def hooks(self, info):
        return [Hook("before_block", 1, self)]

    def plan(self, tokens, signals):
        b, n = tokens.x.shape[:2]
        order = np.concatenate([np.arange(tokens.prefix), tokens.prefix + np.random.default_rng(0).permutation(n - 5)])
        nobody = jnp.zeros((b, 0), jnp.int32)
        return Plan(HardMap(jnp.broadcast_to(order, (b, n)).astype(jnp.int32), nobody, nobody, n), how="keep")


def test_positions_travel_with_the_tokens():
    x = images()
    np.testing.assert_allclose(tokjax.reduce(model(ROPE), Shuffle())(x), model(ROPE)(x), atol=1e-5)


def test_a_merged_token_has_the_place_of_its_anchor():
    reduced = tokjax.reduce(model(ROPE), "tome", r=3)
    out = run(reduced, images(), trace=True)
    position, origin = np.asarray(out.tokens.position), np.asarray(out.trace[-1].origin)
    assert (position[:, :5] == -1).all()  # CLS and registers
    for row in range(2):
        for slot in range(5, position.shape[1]):
            members = np.flatnonzero(origin[row] == slot) - 5
            assert tuple(position[row, slot]) in {divmod(int(j), 5) for j in members}


def test_a_fused_token_is_not_rotated():
    reduced = tokjax.reduce(model(ROPE), "evit", keep_rate=0.5, layers=(1,))
    out = run(reduced, images())
    assert (np.asarray(out.tokens.position)[:, -1] == -1).all()
    assert np.isfinite(out.logits).all()


def test_another_size_needs_no_table():
    other = dataclasses.replace(ROPE, image_size=(24, 12))
    small, large = model(ROPE), tokjax.build(other)
    assert "pos_embed" not in small.params["model"]
    assert large.with_params(small.params)(images(other)).shape == (2, 5)


# Images of any aspect.


def test_flexible_positions_are_the_resized_table():
    table = np.random.default_rng(0).normal(size=(4, 4, 6)).astype(np.float32)
    shapes = np.array([[4, 4], [3, 5], [2, 8], [1, 1], [8, 2], [1, 16]], np.int32)
    valid = np.arange(18) < shapes.prod(1)[:, None]
    given = flexible_positions(table, Patches(np.zeros((6, 18, 3), np.float32), valid, shapes))
    for row, shape in enumerate(shapes):
        wanted = resize_grid(table, tuple(shape), "bilinear", antialias=True).reshape(-1, 6)
        np.testing.assert_allclose(given[row, : len(wanted)], wanted, atol=1e-5)
        np.testing.assert_allclose(given[row, len(wanted) :], np.tile(wanted[:1], (18 - len(wanted), 1)), atol=1e-5)


def test_padding_never_shows():
    short, long = model(NAFLEX)(patches()), model(NAFLEX)(patches(length=23))
    np.testing.assert_allclose(short, long, atol=1e-5)
    changed = patches()
    noise = np.where(changed.valid[..., None], changed.patches, -5.0).astype(np.float32)
    np.testing.assert_allclose(model(NAFLEX)(changed.replace(patches=noise)), short, atol=1e-6)


@pytest.mark.parametrize("row", range(len(SHAPES)))
def test_a_padded_image_gives_what_it_gives_alone(row):
    count, given = SHAPES[row].prod(), patches()
    alone = Patches(given.patches[row : row + 1, :count], given.valid[row : row + 1, :count], SHAPES[row : row + 1])
    np.testing.assert_allclose(model(NAFLEX)(alone)[0], model(NAFLEX)(given)[row], atol=1e-5)


def test_a_full_square_is_a_fixed_resolution_model():
    fixed = dataclasses.replace(NAFLEX, position="learned")
    x = images(fixed)
    square = Patches.of(x, 4)
    np.testing.assert_array_equal(square.patches[0, 5], x[0, 4:8, 4:8].reshape(-1))
    np.testing.assert_allclose(
        model(NAFLEX)(square), tokjax.build(fixed).with_params(model(NAFLEX).params)(x), atol=1e-5
    )


def test_pictures_of_an_image_of_another_aspect():
    _, trace = tokjax.reduce(model(NAFLEX), "tome", r=2)(patches(), trace=True)
    pictures = trace.pictures(np.zeros((12, 16, 3), np.uint8), row=1)
    assert len(pictures) == 1 + NAFLEX.depth


# Every encoder with every reducer.

ENCODERS = {
    "vit": BASE,
    "mae": dataclasses.replace(BASE, pooling="size_mean", fc_norm=True),
    "distilled": dataclasses.replace(BASE, distilled=True),
    "dinov2": dataclasses.replace(BASE, registers=3, layer_scale=0.5, pooling="cls_mean"),
    "dinov3": ROPE,
    "clip": dataclasses.replace(BASE, pre_norm=True, patch_bias=False, head_bias=False, gelu="quick"),
    "siglip": SIGLIP,
    "naflex": NAFLEX,
    "clip text": CLIP_TEXT,
    "siglip text": SIGLIP_TEXT,
}
NO_GRID, NO_PADDING = r"grid=None|needs a patch grid", r"tokens\.valid: .* takes no padded rows"
REFUSED = {
    "naflex": {"a_clip": NO_GRID, "heuristic": NO_GRID, "tomesd": NO_GRID, "kmedoids": NO_PADDING},
    "clip text": {"a_clip": NO_GRID, "heuristic": NO_GRID, "tomesd": NO_GRID, "gtp": NO_GRID, "kmedoids": NO_PADDING},
    "siglip text": {"a_clip": NO_GRID, "heuristic": NO_GRID, "tomesd": NO_GRID, "gtp": NO_GRID},
}
PADDED = ("naflex", "clip text")
NAMES = sorted(name for name, entry in REGISTRY.items() if not entry.decoder)


def inputs(cfg):
    if isinstance(cfg, TextConfig):  # whose ends are the largest ids, at 8, 4 and 6
        ids = np.random.default_rng(1).integers(0, 18, (3, cfg.length)).astype(np.int32)
        ids[np.arange(3), [8, 4, 6]] = 19
        return ids
    return patches() if cfg is NAFLEX else images(cfg)


def counts_of(cfg):
    """Valid tokens of every row at the input."""
    if cfg is CLIP_TEXT:
        return np.array([9, 5, 7])
    return SHAPES.prod(1) if cfg is NAFLEX else cfg.info.length


def reduced_by(name, cfg, **settings):
    return tokjax.reduce(
        model(cfg), name, **{**(REGISTRY[name].example or {REGISTRY[name].knob.field: 0.6}), **settings}
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_reducer_has_its_shapes_in_every_encoder(encoder):
    cfg, refused = ENCODERS[encoder], REFUSED.get(encoder, {})
    x = inputs(cfg)
    whole = jax.eval_shape(lambda p, x: model(cfg).forward(p, x), model(cfg).params, x)
    for name in NAMES:
        entry = REGISTRY[name]
        assert entry.padding or encoder not in PADDED or name in refused
        if name in refused:
            with pytest.raises(ValueError, match=refused[name]):
                reduced_by(name, cfg)(x)
            assert not entry.padding or any("grid" in need for need in entry.needs)
            continue
        reduced = reduced_by(name, cfg)
        out = jax.eval_shape(lambda p, x, r=reduced: r.forward(p, x, trace=True), reduced.params, x)
        assert (out.logits, out.pooled) == (whole.logits, whole.pooled), name
        lengths = [layer.length for layer in out.trace]
        assert len(lengths) == cfg.depth and out.trace[-1].origin.shape == (
            len(x) if hasattr(x, "shape") and not isinstance(x, Patches) else len(x.valid),
            cfg.info.length,
        )
        if "model" not in entry.exempt and not entry.knob.learned:  # they grow again; nothing is learned yet
            assert min(lengths) < cfg.info.length, name
    if "gtp" in refused:
        semantic = reduced_by("gtp", cfg, graph_type="semantic")
        jax.eval_shape(lambda p, x: semantic.forward(p, x), semantic.params, x)


OTHERS = [encoder for encoder in ENCODERS if encoder != "naflex"]
RUNS = [(name, "naflex") for name in NAMES]  # padded rows are the hardest; and another encoder in turn
RUNS += [(name, OTHERS[i % len(OTHERS)]) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize(("name", "encoder"), [run for run in RUNS if run[0] not in REFUSED.get(run[1], {})])
def test_every_reducer_runs(name, encoder):
    cfg = ENCODERS[encoder]
    reduced, x = reduced_by(name, cfg), inputs(cfg)
    out = run(reduced, x, trace=True)
    assert np.isfinite(out.logits).all()
    if "model" not in REGISTRY[name].exempt:
        assert (np.asarray(out.trace[-1].tokens) <= counts_of(cfg)).all()
    prefix = cfg.info.prefix
    assert (np.asarray(out.trace[-1].origin)[:, :prefix] == np.arange(prefix)).all()


# Attention pooling.


def pool(tokens):
    return layers.AttentionPool(SIGLIP, rngs=nnx.Rngs(0))(tokens)


def test_pooling_counts_a_merged_token_as_its_members():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 16)).astype(np.float32)
    twice = np.concatenate([x, x[:, :2], x[:, :1]], 1)
    size = np.array([3, 2, 1, 1, 1, 1], np.float32)
    merged = pool(Tokens(jnp.asarray(x), size=jnp.tile(size, (2, 1))))
    np.testing.assert_allclose(merged, pool(Tokens(jnp.asarray(twice))), atol=1e-5)


def test_pooling_leaves_padding_out():
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    valid = jnp.asarray(np.arange(6) < np.array([[4], [6]]))
    pooled = pool(Tokens(jnp.asarray(x), valid=valid))
    np.testing.assert_allclose(pooled[:1], pool(Tokens(jnp.asarray(x[:1, :4]))), atol=1e-5)


# Gated MLPs and biases.


def test_swiglu_is_a_gate_times_a_value():
    params = model(ROPE).params["model"]["blocks"][0]["mlp"]
    x = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    mlp = layers.Mlp(16, 32, "swiglu", dtype="float32", rngs=nnx.Rngs(0))
    assert params["fc1"]["kernel"].shape == (16, 64)
    assert params["fc2"]["kernel"].shape == (32, 16)
    kernel, out = np.asarray(mlp.fc1.kernel[...]), np.asarray(mlp.fc2.kernel[...])
    gate, value = x @ kernel[:, :32], x @ kernel[:, 32:]
    np.testing.assert_allclose(mlp(x), (gate / (1 + np.exp(-gate)) * value) @ out, atol=1e-5)


def test_keys_without_bias():
    attn = model(ROPE).params["model"]["blocks"][0]["attn"]
    assert attn["qv_bias"].shape == (32,)
    assert "bias" not in attn["qkv"]
    biased = tokjax.build(dataclasses.replace(ROPE, key_bias=True))
    params = jax.tree.map(lambda leaf: leaf, model(ROPE).params)
    for block in params["model"]["blocks"].values():
        q, v = np.split(np.asarray(block["attn"].pop("qv_bias")), 2)
        block["attn"]["qkv"]["bias"] = jnp.concatenate([q, jnp.zeros(16), v])
    np.testing.assert_allclose(biased.with_params(params)(images()), model(ROPE)(images()), atol=1e-5)


def test_pixels_beyond_whole_patches_are_not_seen():
    """As a strided convolution: SigLIP so400m/14 takes 384 pixels and looks at 378."""
    larger = dataclasses.replace(SIGLIP, image_size=(19, 22))
    x = np.random.default_rng(0).normal(size=(2, 19, 22, 3)).astype(np.float32)
    given = tokjax.build(larger).with_params(model(SIGLIP).params)(x)
    np.testing.assert_allclose(given, model(SIGLIP)(x[:, :16, :20]), atol=1e-6)


def test_states_are_those_after_every_block():
    out = run(model(SIGLIP), images(SIGLIP), states=True)
    assert len(out.states) == SIGLIP.depth
    np.testing.assert_array_equal(out.states[-1].x, out.tokens.x)
    short = dataclasses.replace(SIGLIP, depth=2)
    params = dict(model(SIGLIP).params["model"])
    params["blocks"] = {i: params["blocks"][i] for i in range(2)}
    cut = run(tokjax.build(short).with_params({"model": params, "reducers": {}}), images(SIGLIP))
    np.testing.assert_allclose(out.states[1].x, cut.tokens.x, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "naflex"}, "position='naflex': needs a square image_size and no class_token"),
        ({"position": "rope", "heads": 8}, "heads=8: must leave a multiple of 4 channels"),
        ({"position": "none"}, "position='none': must be one of learned, sincos, rope, naflex"),
        ({"mlp": "moe"}, "mlp='moe': must be one of plain, swiglu"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01: must give at least one hidden channel"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_bad_patches():
    good = patches()
    with pytest.raises(ValueError, match="takes Patches"):
        model(NAFLEX)(images(NAFLEX))
    with pytest.raises(ValueError, match=r"must be \(batch, patches, 48\)"):
        model(NAFLEX)(good.replace(patches=good.patches[..., :12]))
    with pytest.raises(ValueError, match="valid has shape"):
        model(NAFLEX)(good.replace(valid=good.valid[:, :3]))


@pytest.mark.parametrize("cfg", [ROPE, SIGLIP], ids=["dinov3", "siglip"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(cfg, dtype):
    half = tokjax.build(dataclasses.replace(cfg, dtype=dtype)).with_params(model(cfg).params)
    whole = model(cfg)(images(cfg))
    np.testing.assert_allclose(half(images(cfg)), whole, atol=0.05 * float(np.abs(whole).max()))
