"""Batches split over devices: the same numbers as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax import parallel
from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig

CFG = ViTConfig(image_size=(16, 16), patch_size=4, width=8, depth=2, heads=1, num_classes=3, drop_path=0.5)


@pytest.fixture(scope="module")
def mesh():
    return parallel.data_mesh(8)


def test_which_devices(mesh):
    assert mesh.size == 8 and parallel.data_mesh(1) is None
    assert parallel.data_mesh().size == jax.device_count()
    assert list(parallel.data_mesh(2).devices.flat) == jax.devices()[:2]
    with pytest.raises(UserError, match="devices=99: must be 0"):
        parallel.data_mesh(99)


def test_a_batch_is_split_and_parameters_are_not(mesh):
    batch = parallel.place(mesh, {"image": np.zeros((16, 3)), "valid": np.ones(16, bool)})
    assert batch["image"].addressable_shards[0].data.shape == (2, 3)
    (where,) = jax.tree.leaves(parallel.shardings(mesh, {"w": jnp.zeros(8)}))
    assert where.is_fully_replicated
    with pytest.raises(UserError, match="batch_size=12: must be a multiple of 8, the devices that split it"):
        parallel.place(mesh, {"image": np.zeros((12, 3))})


def test_keys_of_rows():
    key = jax.random.key(3)
    keys = parallel.row_keys(key, 4)
    assert (jax.random.key_data(keys[2]) == jax.random.key_data(jax.random.fold_in(key, 2))).all()


def test_scalars_are_means_over_the_parts(mesh):
    def run(params, x):
        return {"rows": params * x, "mean": (params * x).mean(), "constant": params}

    x = np.arange(16.0, dtype=np.float32)
    for where in (None, mesh):
        found = jax.jit(parallel.by_rows(run, where))(jnp.float32(2), x)
        np.testing.assert_array_equal(found["rows"], 2 * x)
        assert (found["mean"], found["constant"]) == (15.0, 2.0)
        split = parallel.by_rows(run, where)
        grad = jax.jit(jax.grad(lambda p, split=split: split(p, x)["mean"] + split(p, x)["constant"]))
        assert grad(jnp.float32(2)) == 8.5


def test_a_model_draws_the_same_however_the_batch_is_split(mesh):
    """Stochastic depth and the reducer's own draws; no collective in the forward pass, one sum of gradients."""
    model = tokjax.reduce(tokjax.api.build(CFG), "dynamicvit", keep_rate=0.5, layers=(1,), masked=True)
    rng = np.random.default_rng(0)
    model = model.with_params(jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), model.params))
    images = rng.normal(size=(16, 16, 16, 3)).astype(np.float32)
    weight = rng.normal(size=(16, 3)).astype(np.float32)

    def forward(params, images, keys):
        return model.forward(params, images, key=keys, train=True).logits

    def value(where):
        run = parallel.by_rows(forward, where)

        def loss(params, images):
            logits = run(params, images, parallel.row_keys(jax.random.key(0), 16))
            return (weight * logits).sum(), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (whole, logits), grads = value(None)(model.params, images)
    (split, parts), grads_of_parts = value(mesh)(model.params, parallel.place(mesh, images))
    assert np.ptp(logits, axis=0).min() > 0.01
    np.testing.assert_allclose(parts, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads_of_parts, grads)

    keys = jax.eval_shape(lambda: parallel.row_keys(jax.random.key(0), 16))
    run = jax.jit(parallel.by_rows(forward, mesh), in_shardings=(None, *[parallel.batch_sharding(mesh)] * 2))
    text = run.lower(model.params, images, keys).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))
