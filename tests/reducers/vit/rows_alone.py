"""The law of padding: the valid outputs of a padded row equal the outputs of that row alone."""

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.signals import AttentionRule, Context, Signals
from tokjax.token_map import apply
from tokjax.tokens import Tokens

CAPACITY, WIDTH, HEADS = 17, 6, 2
# Many programs that each run once: compiling is all that costs.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def signals_of(tokens, project, key):
    """Queries, keys and values of the tokens as they are now, with the bias that a block would use."""
    b, n, _ = tokens.x.shape
    query, key_, value = jnp.moveaxis((tokens.x @ project).reshape(b, n, 3, HEADS, -1), 2, 0)
    bias = tokens.attention_bias()
    bias = None if bias is None else bias[:, None, None]
    return Signals(query, key_, value, bias, context=Context(key=key), rule=AttentionRule(0.7))


def consecutive(reducer, steps, tokens, project, key):
    """The tokens after every one of `steps` plans."""

    def run(tokens, project, key):
        states = []
        for _ in range(steps):
            plan = reducer.plan(tokens, signals_of(tokens, project, key))
            tokens = tokens if plan is None else apply(plan, tokens)
            states.append(tokens)
        return states

    return jax.jit(run).lower(tokens, project, key).compile(compiler_options=QUICK)(tokens, project, key)


def check(reducer, prefix, patches=(16, 11, 6, 2, 1), steps=3, holes=False, atol=1e-5):
    """Rows with so many valid patches, in one batch and alone; with `holes` the padding stands in between."""
    rng, patches = np.random.default_rng(0), [min(count, CAPACITY - prefix) for count in patches]
    valid = np.zeros((len(patches), CAPACITY), bool)
    valid[:, :prefix] = True
    for row, count in zip(valid, patches, strict=True):
        behind = rng.permutation(CAPACITY - prefix)[:count] if holes else np.arange(count)
        row[prefix + behind] = True
    x, position = rng.normal(size=(*valid.shape, WIDTH)), np.broadcast_to(np.arange(CAPACITY), valid.shape)
    size = rng.integers(1, 4, valid.shape)
    project = jnp.asarray(rng.normal(size=(WIDTH, 12)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), len(patches))

    def made(choose, valid):
        x_, size_, position_ = (jnp.asarray(choose(field)) for field in (x, size, position))
        tokens = Tokens(x_.astype(jnp.float32), size_.astype(jnp.float32), position_, valid, prefix=prefix)
        return tokens.traced()

    padded = consecutive(reducer, steps, made(lambda field: field, jnp.asarray(valid)), project, keys)
    for b, inside in enumerate(valid):
        alone = consecutive(
            reducer, steps, made(lambda f, b=b, i=inside: f[b : b + 1, i], None), project, keys[b : b + 1]
        )
        for step, (ours, own) in enumerate(zip(padded, alone, strict=True)):
            there = np.asarray(ours.valid[b])
            told = f"{patches[b]} patches, after plan {step + 1}"
            assert there.sum() == own.length, told
            for name in ("x", "size", "position"):
                got, want = np.asarray(getattr(ours, name)[b])[there], np.asarray(getattr(own, name)[0])
                np.testing.assert_allclose(got, want, atol=atol, err_msg=f"{name} of {told}")
            slot = np.append(np.where(there, np.cumsum(there) - 1, -1), own.length)  # as counted without padding
            np.testing.assert_array_equal(slot[np.asarray(ours.origin[b])[inside]], own.origin[0], err_msg=told)
            assert np.isfinite(ours.x).all(), told
    return padded
