"""Layers that the models share: attention under an AttentionRule, MLP, norms, pooling, stacks of blocks."""

from collections.abc import Callable
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.signals import Signals, attention_rows
from tokjax.tokens import MASKED, Tokens

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "exact": lambda x: jax.nn.gelu(x, approximate=False),
    "tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP
    "swiglu": lambda x: jax.nn.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],  # Shazeer 2020
    "geglu": lambda x: jax.nn.gelu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :],  # with tanh: T5 1.1
    "relu": jax.nn.relu,
}
GATED = ("swiglu", "geglu")


def attention(signals: Signals, implementation: Literal["xla", "cudnn"] = "xla") -> Float[Array, "B N H D"]:
    """The attention output under the rule, biases and weights of `signals`; fused wherever the rule allows it.

    Fused kernels take no `[B,1,1,N]` bias, so for "cudnn" a bias on keys rides as an extra column of queries and keys.
    """
    query, key, value = signals.need("query"), signals.need("key"), signals.need("value")
    rule, bias = signals.rule, signals.bias
    if signals.weights is not None or rule.soft_cap is not None or rule.normaliser == "policy":
        weights = attention_rows(signals).astype(value.dtype)
        b, h, q, n = weights.shape
        grouped = weights.reshape(b, value.shape[2], h // value.shape[2], q, n)
        return jnp.einsum("bkgqn,bnkd->bqkgd", grouped, value).reshape(b, q, h, -1)
    if signals.pair_bias is not None:
        pair = signals.pair_bias(slice(None))
        bias = pair if bias is None else bias + pair
    causal = rule.causal
    if rule.normaliser == "softmax1":  # a key of zeros: logit 0, value 0
        if causal:  # every query sees it, so that the kernel's own causal mask will not do
            past = jnp.where(jnp.tri(query.shape[1], key.shape[1], dtype=bool), 0.0, MASKED)
            bias, causal = past[None, None] if bias is None else bias + past, False
        key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
        bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, 1)))
    if implementation == "cudnn" and bias is not None and bias.shape[1] == bias.shape[2] == 1:
        query, key, value = bias_as_columns(query, key, value, bias[:, 0, 0], rule.scale)
        bias = None
    out = fused(query, key, value, bias=bias, scale=rule.scale, is_causal=causal, implementation=implementation)
    return out[..., : signals.need("value").shape[-1]]


def fused(query: Array, key: Array, value: Array, **options: Any) -> Float[Array, "B N H D"]:
    """`jax.nn.dot_product_attention`, where a CPU is good at it.

    It has no float16 products with float32 sums, and long products take half as long with the default algorithm.
    """
    if jax.default_backend() == "cpu":
        if query.dtype == jnp.float16:
            wide = (x.astype(jnp.float32) for x in (query, key, value))
            return fused(*wide, **options).astype(jnp.float16)
        if query.shape[1] * key.shape[1] >= _LONG and query.shape[2] == key.shape[2]:
            return _long(query, key, value, **options)
    return jax.nn.dot_product_attention(query, key, value, **options)


_LONG = 512 * 512  # products of a head


def _long(query, key, value, *, bias=None, scale=None, is_causal=False, implementation=None) -> Array:
    """The same numbers, with the products written out."""
    logits = jnp.einsum("bqhd,bnhd->bhqn", query, key, preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias
    if is_causal:
        logits = jnp.where(jnp.tri(logits.shape[2], logits.shape[3], dtype=bool), logits, MASKED)
    return jnp.einsum("bhqn,bnhd->bqhd", jax.nn.softmax(logits, -1).astype(key.dtype), value)


def bias_as_columns(
    query: Float[Array, "B Q H D"],
    key: Float[Array, "B N K D"],
    value: Float[Array, "B N K D"],
    bias: Float[Array, "#B N"],
    scale: float,
) -> tuple[Array, Array, Array]:
    """Moves an additive bias on keys into 8 more columns (kernels want multiples): 1 in queries, bias/scale in keys.

    In bf16 the bias is split in a high and a low part, so that its rounding is that of the products.
    """
    most = float(jnp.finfo(key.dtype).max) / 2  # a masked key must stay finite in float16 too
    bias = jnp.clip(bias / scale, -most, most)
    high = bias.astype(key.dtype)
    low = (bias - high.astype(jnp.float32)).astype(key.dtype)
    column = jnp.broadcast_to(jnp.stack([high, low], -1)[:, :, None], (*key.shape[:3], 2))
    ones = jnp.ones((*query.shape[:3], 2), query.dtype)

    def widen(x, columns):
        pad = jnp.zeros((*x.shape[:3], 8 - columns.shape[-1]), x.dtype)
        return jnp.concatenate([x, columns, pad], -1)

    return widen(query, ones), widen(key, column), widen(value, jnp.zeros((*value.shape[:3], 0), value.dtype))


def layer_norm(width: int, eps: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Norms run in float32; the two-pass variance is the exact one."""
    return nnx.LayerNorm(width, epsilon=eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)


def rms_norm(width: int, eps: float, rngs: nnx.Rngs, scale: float = 1.0) -> nnx.RMSNorm:
    """A norm without mean and bias (Zhang and Sennrich 2019), in float32; `scale`: its weights at first."""
    init = nnx.initializers.constant(scale)
    return nnx.RMSNorm(width, epsilon=eps, scale_init=init, dtype=jnp.float32, rngs=rngs)


def linear(inputs: int, outputs: int, *, bias: bool, dtype: str, rngs: nnx.Rngs, init=None) -> nnx.Linear:
    """A dense layer with parameters in float32, which computes in `dtype`; `init` of its kernel, None: Xavier's."""
    init = init or nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=jnp.dtype(dtype), kernel_init=init, rngs=rngs)


def by_heads(
    layer: nnx.Linear, x: Float[Array, "B N C"], parts: int, heads: int, bias: Array | None = None
) -> tuple[Float[Array, "B N H D"], ...]:
    """What a dense layer gives that makes queries, keys and values, or some of them, part by part and head by head.

    The kernel is what is reshaped: a compiler that splits heads over devices takes its columns where they lie, while
    results side by side would have to be sent around.

    Args:
        layer: of parts * H * D outputs.
        x: its input.
        parts: how many.
        heads: H, of every part.
        bias: in place of the layer's own.
    """
    own = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    kernel, bias = own["kernel"].astype(layer.dtype), own.get("bias") if bias is None else bias
    kernel = kernel.reshape(x.shape[-1], parts, heads, -1)
    out = jax.lax.dot_general(x.astype(layer.dtype), kernel, (((2,), (0,)), ((), ())))
    out = out if bias is None else out + bias.astype(out.dtype).reshape(kernel.shape[1:])
    return tuple(out[:, :, i] for i in range(parts))


class LayerScale(nnx.Module):
    """A learned factor for every channel of a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, init: float):
        self.gamma = nnx.Param(jnp.full((width,), init, jnp.float32))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        return x * self.gamma[...].astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers; if the activation is gated the first is twice as wide, its gate in front of its values.

    `init`: of the two kernels.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        *,
        dtype: str,
        rngs: nnx.Rngs,
        bias: bool = True,
        init: tuple[Any, Any] = (None, None),
    ):
        self.activation = activation
        wide = hidden * (1 + (activation in GATED))
        self.fc1 = linear(width, wide, bias=bias, dtype=dtype, rngs=rngs, init=init[0])
        self.fc2 = linear(hidden, width, bias=bias, dtype=dtype, rngs=rngs, init=init[1])

    def __call__(
        self, x: Float[Array, "B N C"], inner: Callable[[Array], Array] = lambda hidden: hidden
    ) -> Float[Array, "B N C"]:
        """`inner`: what becomes of the hidden activations (dropout)."""
        return self.fc2(inner(ACTIVATIONS[self.activation](self.fc1(x))))


class AttentionPool(nnx.Module):
    """SigLIP's head: a learned query attends to all tokens, then an MLP (Zhai et al. 2023; big_vision `MAPHead`).

    Keys count as in the blocks' attention: merged tokens by their size, padding not at all.
    """

    def __init__(self, cfg: Any, *, rngs: nnx.Rngs):
        c, self.heads = cfg.width, cfg.heads
        self.probe = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), (1, 1, c)))
        self.qkv = linear(c, 3 * c, bias=True, dtype=cfg.dtype, rngs=rngs)
        self.proj = linear(c, c, bias=True, dtype=cfg.dtype, rngs=rngs)
        self.norm = layer_norm(c, cfg.norm_eps, rngs)
        self.mlp = Mlp(c, int(c * cfg.mlp_ratio), cfg.gelu, dtype=cfg.dtype, rngs=rngs)

    def __call__(self, tokens: Tokens) -> Float[Array, "B C"]:
        x, c = tokens.x, tokens.x.shape[-1]
        params = nnx.to_pure_dict(nnx.state(self.qkv))
        kernel, bias = params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype)
        query = jnp.broadcast_to(self.probe[...].astype(x.dtype) @ kernel[:, :c] + bias[:c], (len(x), 1, c))
        key, value = jnp.split(x @ kernel[:, c:] + bias[c:], 2, -1)
        query, key, value = (y.reshape(*y.shape[:2], self.heads, c // self.heads) for y in (query, key, value))
        on_keys = tokens.attention_bias()
        if tokens.gate is not None:  # counts each key as its gate
            there = tokens.gate > 0.5
            gate = jnp.where(there, jnp.log(jnp.where(there, tokens.gate, 1)), MASKED)
            on_keys = gate if on_keys is None else on_keys + gate
        on_keys = None if on_keys is None else on_keys[:, None, None]
        out = fused(query, key, value, bias=on_keys)
        pooled = self.proj(out.reshape(len(x), 1, c))
        return (pooled + self.mlp(self.norm(pooled).astype(x.dtype)))[:, 0]


def rope_2d(
    vectors: tuple[Float[Array, "B N H D"], ...],
    position: Int[Array, "B N 2"],
    grid: tuple[int, int],
    base: float,
) -> tuple[Float[Array, "B N H D"], ...]:
    """Rotates queries and keys by the centre of their patch (DINOv3, Simeoni et al. 2025; transformers `dinov3_vit`).

    Coordinates run from -1 to 1 over the grid, so that any image size has the same range; the first D/4 angles belong
    to the row, the next to the column, and the halves of a head form the pairs. A position of -1 is not rotated.
    """
    quarter = vectors[0].shape[-1] // 4
    frequency = 2 * jnp.pi * base ** -(jnp.arange(quarter, dtype=jnp.float32) / quarter)
    centre = 2 * (position.astype(jnp.float32) + 0.5) / jnp.asarray(grid, jnp.float32) - 1
    angle = jnp.where(position < 0, 0.0, centre)[..., None] * frequency  # [B, N, 2, D/4]
    angle = jnp.tile(angle.reshape(*position.shape[:2], -1), 2)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def rotate(x: Array) -> Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, -1)
        return (x * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)

    return tuple(rotate(x) for x in vectors)


def drop_path(x: Float[Array, "B N C"], rate: float | Array, key: Array | None) -> Float[Array, "B N C"]:
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole rows; off without a key.

    With one key a row, what becomes of a row does not depend on the batch around it.
    """
    if key is None:
        return x
    if key.ndim:
        kept = jax.vmap(lambda one: jax.random.bernoulli(one, 1 - rate))(key)[:, None, None]
    else:
        kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(kept, x / (1 - rate), 0)


def dropout(x: Array, drop: tuple[float | Array, Array] | None) -> Array:
    """Drops single values of x [B, ...] at a rate, with one key or one a row; None: nothing."""
    if drop is None:
        return x
    rate, key = drop
    if key.ndim:
        kept = jax.vmap(lambda one: jax.random.bernoulli(one, 1 - rate, x.shape[1:]))(key)
    else:
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def drop_weights(signals: Signals, drop: tuple[float | Array, Array] | None) -> Signals:
    """Signals whose attention lacks single weights, for which the whole map must be there; None: as they are."""
    return signals if drop is None else signals.replace(weights=dropout(attention_rows(signals), drop))


def salted(drop: tuple[float | Array, Array] | None, salt: int) -> tuple[float | Array, Array] | None:
    """The same rate with another key, for another place of a block."""
    return None if drop is None else (drop[0], fold_in(drop[1], salt))


def fold_in(key: Array, number: int | Array) -> Array:
    """`jax.random.fold_in` of one key, or of one key a row."""
    return jax.vmap(jax.random.fold_in, (0, None))(key, number) if key.ndim else jax.random.fold_in(key, number)


def pool(tokens: Tokens, how: Literal["cls", "mean", "size_mean", "cls_mean"]) -> Float[Array, "B K"]:
    """One vector a row: token 0, the mean of the patches, or their mean weighted by size (padding left out).

    What is no patch (CLS, registers) is in no mean. "cls_mean" is token 0 and behind it the mean weighted by size, K =
    2C channels, which DINOv2's classifiers read (facebookresearch/dinov2 `dinov2/eval/linear.py`, of one layer).

    Tokens that are masked by a gate which learns count as their gate, of which the divisor takes no gradient (DiffRate,
    Chen et al. 2023, `DiffRate/patch/mae.py`).

    Weighted by size, the mean over merged tokens is the mean over the patches that they stand for (ToMe's MAE models,
    `tome/patch/mae.py`); where no size is tracked both means are the same.
    """
    if how == "cls":
        return tokens.x[:, 0]
    if how == "cls_mean":
        return jnp.concatenate([tokens.x[:, 0], pool(tokens, "size_mean")], -1)
    x = tokens.x[:, tokens.prefix :].astype(jnp.float32)
    weight = jnp.ones(x.shape[:2]) if how == "mean" else tokens.sizes()[:, tokens.prefix :]
    if tokens.valid is not None:
        weight = weight * tokens.valid[:, tokens.prefix :]
    if tokens.gate is not None:
        weight = weight * tokens.gate[:, tokens.prefix :]
    total = jnp.maximum(weight.sum(1, keepdims=True), 1e-6)
    if tokens.gate is not None:
        total = jax.lax.stop_gradient(total)
    return (jnp.einsum("bnc,bn->bc", x, weight, precision="highest") / total).astype(tokens.x.dtype)


def stack(tree: dict[int, Any]) -> Any:
    """Parameter trees of equal blocks, `{0: ..., 1: ...}`, as one tree with a leading L axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[i] for i in range(len(tree))))


def unstack(tree: Any) -> dict[int, Any]:
    """The inverse of `stack`."""
    depth = jax.tree.leaves(tree)[0].shape[0]
    return {i: jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(depth)}
