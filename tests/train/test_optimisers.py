import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax.errors import UserError
from tokjax.train import optimisers

C, F, L = 4, 8, 3


def vit_tree(stack: int | None = None):
    """The parameter tree of a small ViT with every optional part; `stack`: blocks stored with a leading axis."""

    def leaf(*shape):
        return jnp.ones(shape)

    def norm():
        return {"scale": leaf(C), "bias": leaf(C)}

    def dense(n, m):
        return {"kernel": leaf(n, m), "bias": leaf(m)}

    def block():
        attn = {"qkv": dense(C, 3 * C), "proj": dense(C, C), "q_norm": norm(), "k_norm": norm()}
        mlp = {"fc1": dense(C, F), "fc2": dense(F, C)}
        scales = {"ls1": {"gamma": leaf(C)}, "ls2": {"gamma": leaf(C)}}
        return {"norm1": norm(), "attn": attn, "norm2": norm(), "mlp": mlp, **scales}

    blocks = {i: block() for i in range(2)}
    if stack is not None:
        blocks = jax.tree.map(lambda x: jnp.broadcast_to(x, (stack, *x.shape)), block())
    return {
        "patch_embed": dense(12, C),
        "cls_token": leaf(1, 1, C),
        "dist_token": leaf(1, 1, C),
        "reg_token": leaf(1, 2, C),
        "pos_embed": leaf(1, 5, C),
        "norm_pre": norm(),
        "blocks": blocks,
        "norm": norm(),
        "head": dense(C, 3),
        "head_dist": dense(C, 3),
    }


def true_paths(mask):
    return {optimisers.path_name(path) for path, value in jax.tree_util.tree_flatten_with_path(mask)[0] if value}


@pytest.mark.parametrize("stack", [None, L])
def test_only_matrices_decay(stack):
    inside = {"attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"}
    blocks = [f"blocks/{i}/" for i in range(2)] if stack is None else ["blocks/"]
    expected = {f"{b}{name}/kernel" for b in blocks for name in inside}
    expected |= {"patch_embed/kernel", "head/kernel", "head_dist/kernel"}
    assert true_paths(optimisers.decayed(vit_tree(stack))) == expected


def test_decay_reaches_kernels_only_and_is_scaled_by_the_rate():
    params = vit_tree()
    cfg = {"lr": 0.1, "weight_decay": 0.5, "clip_norm": None}
    optimiser = optimisers.make_optimiser(cfg, 10, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimiser.update)(zero, optimiser.init(params), params)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.05, rtol=1e-6)
    moved = true_paths(jax.tree.map(lambda u: bool(jnp.any(u != 0)), updates))
    assert moved == true_paths(optimisers.decayed(params))


def test_schedule_values():
    rate = optimisers.schedule({"lr": 1.0, "final_lr": 0.1, "warmup_steps": 4}, 12)
    np.testing.assert_allclose([float(rate(t)) for t in range(5)], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(float(rate(8)), 0.55, rtol=1e-6)
    np.testing.assert_allclose(float(rate(6)), 0.1 + 0.45 * (1 + np.cos(np.pi / 4)), rtol=1e-6)
    np.testing.assert_allclose([float(rate(12)), float(rate(1000))], 0.1, rtol=1e-6)
    assert all(float(rate(t)) > float(rate(t + 1)) for t in range(4, 12))


def test_schedule_warmup_as_a_fraction_or_none():
    by_fraction = optimisers.schedule({"lr": 1.0, "warmup_fraction": 0.25}, 12)
    by_steps = optimisers.schedule({"lr": 1.0, "warmup_steps": 3}, 12)
    assert [float(by_fraction(t)) for t in range(13)] == [float(by_steps(t)) for t in range(13)]
    assert float(optimisers.schedule({"lr": 1.0}, 12)(0)) == 1.0


def test_warmup_must_end_before_the_run():
    with pytest.raises(UserError, match="warmup_steps is 10; it must be below total_steps, which is 10"):
        optimisers.schedule({"warmup_steps": 10}, 10)


def test_clipping_by_the_norm_of_what_is_trained():
    params = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    cfg = {"lr": 1.0, "clip_norm": 1.0, "b1": 0.0, "b2": 0.0, "eps": 1.0, "frozen": "b"}
    optimiser = optimisers.make_optimiser(cfg, 10, params)
    grads = {"a": jnp.array([3.0, 4.0, 0.0, 0.0]), "b": jnp.full(4, 1e6)}
    updates, _ = jax.jit(optimiser.update)(grads, optimiser.init(params), params)
    clipped = np.array([0.6, 0.8, 0.0, 0.0])
    np.testing.assert_allclose(updates["a"], -clipped / (clipped + 1.0), rtol=1e-5)
    assert not updates["b"].any()


def test_frozen_gets_no_update_and_no_moments():
    params = vit_tree()
    cfg = {"lr": 0.1, "frozen": ("pos_embed", "blocks/0/.*")}
    optimiser = optimisers.make_optimiser(cfg, 10, params)
    state = optimiser.init(params)
    frozen = optimisers.frozen(cfg, params)
    assert frozen["pos_embed"] and not frozen["blocks"][1]["attn"]["qkv"]["kernel"]
    trained = sum(
        p.size for p, fixed in zip(jax.tree.leaves(params), jax.tree.leaves(frozen), strict=True) if not fixed
    )
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * trained + 2  # two moments, two counters

    updates, state = jax.jit(optimiser.update)(params, state, params)
    after = optax.apply_updates(params, updates)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), params, after)
    assert jax.tree.map(lambda c, f: c != f, changed, frozen) == jax.tree.map(lambda _: True, frozen)


def test_frozen_matches_a_path_or_its_end_from_a_slash_on():
    params = {"model": vit_tree()}

    def some(*patterns):
        return true_paths(optimisers.frozen({"frozen": patterns}, params))

    assert some("pos_embed") == some("model/pos_embed") == {"model/pos_embed"}
    assert some("norm/scale") == {"model/norm/scale"}  # q_norm/scale does not end in /norm/scale
    assert len(some("blocks/1/.*")) == len(jax.tree.leaves(params["model"]["blocks"][1]))
    assert some("head/bias|head_dist/bias") == some("head/bias", "head_dist/bias")


def test_frozen_must_fit():
    params = vit_tree()
    with pytest.raises(UserError, match=r"'pos_embedding', which is the path of no parameter.*blocks/0/attn"):
        optimisers.make_optimiser({"frozen": "pos_embedding"}, 10, params)
    with pytest.raises(UserError, match="leaves nothing to train"):
        optimisers.make_optimiser({"frozen": ".*"}, 10, params)


def test_learning_rates_by_path():
    """The first expression that matches counts; an update is scaled with its decay, nothing else is."""
    params = {"model": vit_tree(), "reducers": {0: {"kernel": jnp.ones((2, 2))}}}
    cfg = {"lr": 0.1, "weight_decay": 0.5, "frozen": "pos_embed"}
    scales = [["head/.*", 2.0], ["model/.*", 0.5]]

    def update(**more):
        optimiser = optimisers.make_optimiser(cfg | more, 10, params)
        return optimiser.update(params, optimiser.init(params), params)[0]

    plain, scaled = update(), update(scales=scales)
    factors = optimisers.scales({"scales": scales}, params)
    assert factors["model"]["head"]["kernel"] == 2.0 and factors["model"]["pos_embed"] == 0.5
    assert factors["reducers"][0]["kernel"] == 1.0
    jax.tree.map(lambda p, s, f: np.testing.assert_allclose(s, f * p, rtol=1e-6), plain, scaled, factors)
    with pytest.raises(UserError, match=r"optimiser.scales has 'nothing', which is the path of no parameter"):
        update(scales=[["nothing", 1.0]])
    for wrong in (("head", 1.0), [["head"]], [["head", -1.0]], [["(", 1.0]]):
        with pytest.raises(UserError, match=r"optimiser.scales"):
            update(scales=wrong)
