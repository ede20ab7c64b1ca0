"""Gradients of reducers that learn, in the form in which they train: in bf16, with padded rows, to every parameter."""

import functools

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.hooks import losses
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers import create, entry
from tokjax.train.optimisers import path_name

CFG = ViTConfig((16, 16), 4, width=16, depth=3, heads=2, num_classes=5, dtype="bfloat16")
SETTINGS = {
    "clca": {"reducer": "dynamicvit", "num_clr": 1},
    "dynamicvit": {},
    "patchmerger": {},
    "sinkhorn": {},
    "sit": {},
    "tokenlearner": {},
}
# A softmax over tokens does not see what is added to all of them.
BLIND = {"sit": "out/bias", "tokenlearner": "masks/out/bias"}


@pytest.fixture(scope="module")
def vit() -> ViT:
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(ViT(CFG, rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), state))


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_reach_every_parameter(vit, name):
    reducer = create(name, CFG.info, keep_rate=0.5, layers=(0, 1), **SETTINGS[name], **entry(name).training)
    rng = np.random.default_rng(1)
    graphdef, params, moving = nnx.split(reducer, nnx.Param, nnx.BatchStat)
    params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params)
    tokens = vit.embed(jnp.asarray(rng.normal(size=(3, 16, 16, 3)), jnp.float32))
    valid = jnp.arange(17) < jnp.array([[17], [12], [9]])

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradient(params, x):
        def loss(params):
            hooks = nnx.merge(graphdef, params, moving).hooks(CFG.info)
            out = vit.encode(tokens.replace(x=x, valid=valid), hooks)
            terms = sum(term.mean() for term in losses(out.tokens.aux).values())
            return -jax.nn.log_softmax(out.logits)[:, 0].mean() + terms

        return jax.grad(loss)(params)

    got = gradient(params, tokens.x)
    for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(got))[0]:
        place = path_name(path)
        assert np.isfinite(leaf).all(), place
        assert np.abs(leaf).max() > 0 or place.endswith(BLIND.get(name, "-")), place
    other = gradient(params, jnp.where(valid[..., None], tokens.x, 3))  # what padding holds moves nothing
    same = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)  # but for the policy softmax' epsilon
    jax.tree.map(same, *map(nnx.to_pure_dict, (got, other)))
