"""Decoder language models: LLaMA, Mistral, Qwen2, Gemma and OPT as one module, with a KV cache of every layer.

Sources: Touvron et al., "LLaMA" and "Llama 2", 2023; "The Llama 3 Herd of Models", 2024; Jiang et al., "Mistral 7B",
2023; Yang et al., "Qwen2 Technical Report", 2024; the Gemma reports, 2024; Zhang et al., "OPT", 2022. Numbers are those
of transformers' `models/<name>/modeling_<name>.py`.

The blocks are `transformer.Block`s, so that reducers plan on tokens between them and inside of them. Rotary and learned
positions, windows and the causal mask read every token's own `position` and `order`: tokens may leave at any layer. A
prompt is read by `prefill`, which keeps keys and values of the tokens that are left in every layer, and gone on with by
`step`; see `tokjax.cache`.

Methods of depth need no other model: with `kv_layers` later blocks make keys and values of an earlier one's output, and
`depth` hooks say which blocks run. `call(column, prompt, end)` gives booleans [L, *column] for the columns (slots) of a
padded batch; those from `prompt` on are new (None: a text as a whole, without a cache), and there is room for those
before `end`. NumPy columns shall give NumPy. A block that a column skips must be skipped by all later ones, so that no
key is ever missing.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import operator
from typing import Any, ClassVar, Literal, get_args

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokjax import cache as kv
from tokjax import hooks as hk
from tokjax.cache import Cache, Group, Kept
from tokjax.models import layers
from tokjax.models.transformer import SITES, Block, Blocks, LayerTrace
from tokjax.signals import AttentionRule, Context, Queries, Signals, last_slot, select
from tokjax.token_map import rows
from tokjax.tokens import MASKED, Tokens

Feed = Literal["swiglu", "geglu", "relu", "tanh", "exact"]
Norm = Literal["rms", "rms_offset", "layer"]
NormOrder = Literal["pre", "post", "both"]
Position = Literal["rope", "learned"]
Scaling = Literal["none", "linear", "llama3"]
Shares = Literal["mean", "reference"]
CACHE_SITES: frozenset[hk.Where] = frozenset({"after_prefill", "decode_step", "depth"})
_LEARNED = 2  # rows of a table of positions before that of position 0


class Prompts(struct.PyTreeNode):
    """Texts, padded on either side."""

    ids: Int[Array, "B N"]
    valid: Bool[Array, "B N"] | None = None  # None: wherever ids has no padding, if the model has a padding id


class DecoderOutput(struct.PyTreeNode):
    """What the model gives for the tokens that are left, N where nothing is reduced."""

    logits: Float[Array, "B N V"]
    features: Float[Array, "B N C"]  # after the final norm
    tokens: Tokens  # after the last block
    trace: tuple[LayerTrace, ...] | None = None
    states: tuple[Tokens, ...] | None = None  # after every block, where they were asked for


class Prefilled(struct.PyTreeNode):
    """What `prefill` gives."""

    cache: Cache
    logits: Float[Array, "B V"]  # of the first new token
    features: Float[Array, "B M C"]  # after the final norm, of the tokens that are left
    tokens: Tokens  # after the last block


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides a decoder's parameters and numbers; the defaults are LLaMA-2-7B's.

    Attributes:
        length: tokens of the example that `cost` counts; texts may be longer.
        max_length: positions that the model was made for. A text, with what is made, may not go beyond.
        hidden: channels within an MLP.
        kv_heads: key heads, each for `heads / kv_heads` neighbouring query heads.
        feed: "swiglu" (LLaMA), "geglu" (Gemma, with tanh), or the activation of an MLP of two layers.
        norm: "rms_offset" has weights that are added to 1 (Gemma).
        norm_order: before a branch; behind the sum (OPT-350m, which has no final norm); "both": before a branch and on
            its output (Gemma 2).
        qkv_bias, proj_bias, mlp_bias: which linear layers have one.
        position: rotary, or a learned table.
        rope_base: of the rotary frequencies.
        rope_scaling: "linear" divides all frequencies by `rope_factor`; "llama3" those of long wavelengths, with
            `rope_low`, `rope_high` and `rope_length` (its `original_max_position_embeddings`).
        rope_sections: frequencies for the time, row and column of tokens whose positions are [B, N, 3] (Qwen2-VL).
        window: a query sees this many positions, its own included; None: all.
        window_layers: where it does; None: everywhere.
        query_scale: of the logits; None: head_width**-0.5.
        soft_cap: logits of the attention become `cap * tanh(logits / cap)`.
        logit_cap: the same of the head's.
        embed_scaled: embeddings times sqrt(width), a factor that has the type of the activations.
        embed_width: channels of the embeddings, projected to and from `width`; None: the same.
        tied: the head is the embedding.
        kv_layers: blocks from here on take keys and values from the residual stream before the first of them, through
            a norm of its own (SwiftKV, Qiao et al. 2024); None: every block from its own input.
        kv_group: so many neighbours of those share keys and values.
        rotate: whether the cache holds rotated keys ("write"), or keys that are rotated wherever they are read, so that
            they can be merged and moved.
        init_std: of weights before training; of those that end a branch divided by the root of all branches (GPT-2).
        dtype: of activations and cache; parameters stay float32.
        scan: blocks stored stacked, long equal runs scanned at prefill. A step, whose blocks are unrolled, works on
            copies of their weights.

    Raises:
        ValueError: fields that do not fit together; the message names the field, its value and what is allowed.
    """

    vocab_size: int = 32000
    length: int = 1024
    max_length: int = 4096
    width: int = 4096
    hidden: int = 11008
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    feed: Feed = "swiglu"
    norm: Norm = "rms"
    norm_order: NormOrder = "pre"
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    position: Position = "rope"
    rope_base: float = 10000.0
    rope_scaling: Scaling = "none"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_length: int = 8192
    rope_sections: tuple[int, int, int] | None = None
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    query_scale: float | None = None
    soft_cap: float | None = None
    logit_cap: float | None = None
    embed_scaled: bool = False
    embed_width: int | None = None
    tied: bool = False
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = None
    kv_layers: int | None = None
    kv_group: int = 1
    rotate: kv.Rotate = "write"
    init_std: float = 0.02
    dtype: str = "float32"
    scan: bool = False
    attention: Literal["xla", "cudnn"] = "xla"

    drop_path: ClassVar[float] = 0.0

    def __post_init__(self):
        for name in ("window_layers", "eos_ids", "rope_sections"):  # which JSON has as lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = ("vocab_size", "length", "max_length", "width", "hidden", "depth", "heads", "kv_heads", "head_width")
        for name in (*counts, "kv_group", "rope_length", "window", "embed_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        kinds = {"feed": Feed, "norm": Norm, "norm_order": NormOrder, "position": Position, "rope_scaling": Scaling}
        for name, kind in {**kinds, "rotate": kv.Rotate, "attention": Literal["xla", "cudnn"]}.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.rope_sections is not None:
            if len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.head_width:
                half = self.head_width // 2
                raise ValueError(f"rope_sections={self.rope_sections}: must be three numbers with the sum {half}")
            if self.rotate == "read" or self.window is not None:
                raise ValueError(f"rope_sections={self.rope_sections}: needs rotate='write' and no window")
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(f"head_width={self.head_width}: must be even for position='rope'")
        if self.position == "learned" and self.rotate == "read":
            raise ValueError("rotate='read': needs position='rope'")
        for name in ("norm_eps", "rope_base", "rope_factor", "rope_low", "rope_high", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0 and finite")
        if self.rope_scaling == "llama3" and self.rope_high <= self.rope_low:
            raise ValueError(f"rope_high={self.rope_high}: must be above rope_low={self.rope_low}")
        for name in ("query_scale", "soft_cap", "logit_cap"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0 and finite, or None")
        if any(not 0 <= layer < self.depth for layer in self.window_layers or ()):
            raise ValueError(f"window_layers={self.window_layers}: must be in [0, {self.depth})")
        if self.kv_layers is not None and not 0 <= self.kv_layers < self.depth:
            raise ValueError(f"kv_layers={self.kv_layers}: must be in [0, {self.depth}), or None")
        for name in ("bos_id", "pad_id"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, {self.vocab_size})")
        if any(not 0 <= index < self.vocab_size for index in self.eos_ids):
            raise ValueError(f"eos_ids={self.eos_ids}: must be in [0, {self.vocab_size})")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: must be one of float32, bfloat16, float16")

    @property
    def shallow(self) -> dict[str, Any]:
        """What a config of one block, otherwise alike, has in place of these."""
        return {"window_layers": None, "kv_layers": None if self.kv_layers is None else 0}

    @property
    def rule(self) -> AttentionRule:
        """Of tokens that stand in order."""
        scale = self.head_width**-0.5 if self.query_scale is None else self.query_scale
        return AttentionRule(scale=scale, soft_cap=self.soft_cap, causal=True)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of every layer."""
        narrow = range(self.depth) if self.window_layers is None else self.window_layers
        return tuple(self.window if layer in narrow else None for layer in range(self.depth))

    @property
    def kv_source(self) -> tuple[int, ...]:
        """For every layer the one whose keys and values it attends to."""
        first, group = self.depth if self.kv_layers is None else self.kv_layers, self.kv_group
        return tuple(i if i < first else first + (i - first) // group * group for i in range(self.depth))

    @property
    def info(self) -> hk.ModelInfo:
        mlp = (3 if self.feed in layers.GATED else 2) * self.width * self.hidden
        sites = SITES | CACHE_SITES
        return hk.ModelInfo(self.depth, self.width, self.heads, self.length, pooling="mean", sites=sites, mlp=mlp)

    def example(self, batch: int) -> Any:
        """Shape and type of the input, for tracing."""
        return jax.ShapeDtypeStruct((batch, self.length), jnp.int32)

    def check(self, inputs: Any) -> None:
        """Refuses texts of another shape or type, too long, or (where it can be looked at) outside of the vocabulary.

        Raises:
            ValueError: names what is wrong and what is allowed.
        """
        if isinstance(inputs, Tokens):
            return
        ids, valid = (inputs.ids, inputs.valid) if isinstance(inputs, Prompts) else (inputs, None)
        self.check_ids("ids", ids)
        if valid is not None and valid.shape != ids.shape:
            raise ValueError(f"valid has shape {valid.shape}: must be that of ids, {ids.shape}")

    def check_cache(self, cache: Cache, batch: int) -> None:
        """Refuses a cache that is not of this model and batch.

        Raises:
            ValueError: names what is wrong and what is allowed.
        """
        if len(cache.layers) != self.depth:
            raise ValueError(f"cache has {len(cache.layers)} layers: must have {self.depth}")
        shape = (batch, self.kv_heads, self.head_width)
        for group in cache.groups:
            b, heads, _, width = group.keys[0].shape
            if (b, heads, width) != shape:
                raise ValueError(f"cache has (batch, key heads, head width) {(b, heads, width)}: must have {shape}")
        if cache.rotate != self.rotate:
            raise ValueError(f"cache has rotate={cache.rotate!r}: must have {self.rotate!r}")

    def check_ids(self, name: str, ids: Any) -> None:
        """The same of one array."""
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", None)
        if not isinstance(shape, tuple) or len(shape) != 2 or not 1 <= shape[1] <= self.max_length:
            raise ValueError(f"{name} has shape {shape}: must be (batch, 1 to {self.max_length} tokens)")
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} has type {dtype}: must be an integer type")
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"{name} lie in {ids.min()}..{ids.max()}: must be in [0, {self.vocab_size})")


_SIZES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {},
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "max_length": 131072,
        "hidden": 14336,
        "kv_heads": 8,
        "rope_base": 5e5,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "bos_id": 128000,
        "eos_ids": (128001, 128008, 128009),
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "max_length": 131072,
        "width": 2048,
        "hidden": 8192,
        "depth": 16,
        "kv_heads": 8,
        "head_width": 64,
        "rope_base": 5e5,
        "rope_scaling": "llama3",
        "rope_factor": 32.0,
        "tied": True,
        "bos_id": 128000,
        "eos_ids": (128001, 128008, 128009),
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "max_length": 32768,
        "width": 896,
        "hidden": 4864,
        "depth": 24,
        "heads": 14,
        "kv_heads": 2,
        "head_width": 64,
        "norm_eps": 1e-6,
        "qkv_bias": True,
        "rope_base": 1e6,
        "tied": True,
        "bos_id": 151643,
        "eos_ids": (151643,),
    },
    "opt-125m": {
        "vocab_size": 50272,
        "max_length": 2048,
        "width": 768,
        "hidden": 3072,
        "depth": 12,
        "heads": 12,
        "kv_heads": 12,
        "head_width": 64,
        "feed": "relu",
        "norm": "layer",
        "qkv_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "position": "learned",
        "tied": True,
        "bos_id": 2,
        "pad_id": 1,
    },
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """A published size, such as "llama-3.2-1b" or "opt-125m", with fields changed.

    Raises:
        ValueError: an unknown name, or fields that do not fit together.
    """
    if name not in _SIZES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(_SIZES)}")
    return DecoderConfig(**{**_SIZES[name], **changes})


@functools.cache
def frequencies(cfg: DecoderConfig) -> np.ndarray:
    """Rotary frequencies, float32 [D/2] (transformers' `modeling_rope_utils.py`)."""
    frequency = cfg.rope_base ** (-np.arange(0, cfg.head_width, 2) / cfg.head_width)
    if cfg.rope_scaling == "linear":
        frequency = frequency / cfg.rope_factor
    elif cfg.rope_scaling == "llama3":  # long waves are stretched, short ones stay, between them a ramp
        turns = cfg.rope_length * frequency / (2 * np.pi)
        stays = np.clip((turns - cfg.rope_low) / (cfg.rope_high - cfg.rope_low), 0, 1)
        frequency = frequency * (stays + (1 - stays) / cfg.rope_factor)
    return frequency.astype(np.float32)


Turn = tuple[Float[Array, "B N D/2"], Float[Array, "B N D/2"]]


def turns(cfg: DecoderConfig, position: Int[Array, "B *N"]) -> Turn | None:
    """Cosines and sines of positions, float32; None where they are not rotary."""
    if cfg.position != "rope":
        return None
    if cfg.rope_sections is None:
        by_frequency = position[..., None]
    else:  # of Qwen2-VL: the first frequencies belong to the time, the next to the row, the last to the column
        axes = position if position.ndim > 2 else jnp.repeat(position[..., None], 3, -1)
        by_frequency = axes[..., np.repeat(np.arange(3), cfg.rope_sections)]
    angle = by_frequency.astype(jnp.float32) * frequencies(cfg)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*B D"], turn: Turn | None) -> Float[Array, "*B D"]:
    """Rotates pairs of channels, one of each half of a head (Su et al. 2021, in GPT-NeoX's layout)."""
    if turn is None:
        return x
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def by_head(turn: Turn | None) -> Any:
    """For x [B, N, H, D]."""
    return None if turn is None else tuple(part[:, :, None] for part in turn)


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, times weights, which may be stored as offsets from 1."""

    def __init__(self, cfg: DecoderConfig):
        self.eps, self.offset = cfg.norm_eps, float(cfg.norm == "rms_offset")
        self.scale = nnx.Param(jnp.full((cfg.width,), 1 - self.offset, jnp.float32))

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        return rms(x, self.scale[...] + self.offset, self.eps)


def rms(x: Float[Array, "*B C"], weight: Float[Array, "C"], eps: float) -> Float[Array, "*B C"]:
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * weight).astype(x.dtype)


def _norm(cfg: DecoderConfig, rngs: nnx.Rngs) -> Any:
    return layers.layer_norm(cfg.width, cfg.norm_eps, rngs) if cfg.norm == "layer" else RMSNorm(cfg)


class Shared(struct.PyTreeNode):
    """What the blocks share, and what of it is the next one's own."""

    position: Int[Array, "B N"]  # of the tokens that `turn` is of
    turn: Turn | None
    window: int | Int[Array, ""] | None = None
    source: Tokens | None = None  # normed, what keys and values are made of where that is not the block's own input
    taken: Any = None  # of the block whose keys and values are this one's too
    ordered: bool = struct.field(pytree_node=False, default=True)  # whether the slots stand in causal order


class Inside(Signals):
    """Signals of a decoder's attention."""

    unrotated: Float[Array, "B N K D"] | None = None  # the keys, where the cache wants them so
    there: Bool[Array, "B N"] | None = None  # queries that count; the others attend to nothing


class Attention(nnx.Module):
    """Causal attention in two steps, as in `transformer.Attention`; `context.relative` is the stack's `Shared`."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        inner, kept = cfg.heads * cfg.head_width, cfg.kv_heads * cfg.head_width
        self.q = _linear(cfg, cfg.width, inner, cfg.qkv_bias, rngs)
        self.kv = _linear(cfg, cfg.width, 2 * kept, cfg.qkv_bias, rngs)
        self.proj = _linear(cfg, inner, cfg.width, cfg.proj_bias, rngs, last=True)

    def queries(self, x: Float[Array, "B N C"]) -> Float[Array, "B N H D"]:
        """Not rotated."""
        return self.q(x).reshape(*x.shape[:2], self.cfg.heads, -1)

    def pairs(self, x: Float[Array, "B N C"]) -> tuple[Float[Array, "B N K D"], Float[Array, "B N K D"]]:
        """Keys, not rotated, and values."""
        key, value = layers.by_heads(self.kv, x, 2, self.cfg.kv_heads)
        return key, value

    def signals(self, x: Float[Array, "B N C"], tokens: Tokens, context: Context) -> Inside:
        """What attention works on.

        Args:
            x: normalised features of the tokens.
            tokens: their positions, order, masks and gates.
            context: what lies outside of the block.
        """
        shared: Shared = context.relative
        memory = tokens.replace(x=x) if shared.source is None else shared.source

        def turn(position: Array | None) -> Any:
            assert position is not None
            return by_head(shared.turn if position is shared.position else turns(self.cfg, position))

        query = rotate(self.queries(x), turn(tokens.position))
        if shared.taken is None:
            unrotated, value = self.pairs(memory.x)
            key = rotate(unrotated, turn(memory.position))
        else:
            unrotated, key, value = shared.taken.unrotated, shared.taken.key, shared.taken.value
        bias = memory.attention_bias()
        causal = shared.ordered and tokens.position is memory.position and tokens.position is shared.position
        return Inside(
            query,
            key,
            value,
            None if bias is None else bias[:, None, None],
            context=context,
            rule=dataclasses.replace(self.cfg.rule, causal=causal),
            pair_bias=visible_pairs(tokens, memory, causal, shared.window),
            unrotated=unrotated if self.cfg.rotate == "read" else None,
            there=tokens.valid,
        )

    def __call__(self, signals: Signals) -> Float[Array, "B N C"]:
        out = layers.attention(signals, self.cfg.attention)
        there = getattr(signals, "there", None)
        if there is not None and there.shape == out.shape[:2]:
            out = jnp.where(there[..., None, None], out, 0)
        return self.proj(out.reshape(*out.shape[:2], -1))


def visible_pairs(tokens: Tokens, memory: Tokens, causal: bool, window: Any) -> Any:
    """What of the mask is a matter of pairs, beyond a causal one by slots."""
    if causal and window is None and tokens.segment is None:
        return None
    position, positions = tokens.position, memory.position
    order = position if tokens.order is None else tokens.order
    orders = positions if memory.order is None else memory.order
    assert position is not None and positions is not None and order is not None and orders is not None

    def bias(queries: Queries) -> Float[Array, "B 1 Q N"]:
        seen = jnp.bool_(True)
        if not causal:
            seen = select(order, queries, 1)[..., None] >= orders[:, None]
        if window is not None:
            seen &= select(position, queries, 1)[..., None] - positions[:, None] < window
        if tokens.segment is not None and memory.segment is not None:
            seen &= select(tokens.segment, queries, 1)[..., None] == memory.segment[:, None]
        return jnp.where(seen, 0.0, MASKED)[:, None]

    return bias


def _linear(
    cfg: DecoderConfig, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs, last: bool = False
) -> nnx.Linear:
    """`last`: of a residual branch, whose weights are smaller, so that the stream stays of order 1 (GPT-2)."""
    init = nnx.initializers.normal(cfg.init_std * (2 * cfg.depth) ** -0.5 if last else cfg.init_std)
    return layers.linear(inputs, outputs, bias=bias, dtype=cfg.dtype, rngs=rngs, init=init)


class DecoderBlock(Block):
    """Attention and MLP with the sites of `transformer.Block`, and `step` for a single token."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.norm1, self.norm2, self.attn = _norm(cfg, rngs), _norm(cfg, rngs), Attention(cfg, rngs=rngs)
        inits = nnx.initializers.normal(cfg.init_std), nnx.initializers.normal(cfg.init_std * (2 * cfg.depth) ** -0.5)
        self.mlp = layers.Mlp(
            cfg.width, cfg.hidden, cfg.feed, bias=cfg.mlp_bias, dtype=cfg.dtype, init=inits, rngs=rngs
        )
        self.scaled = cfg.norm_order == "both"
        if self.scaled:
            self.ls1, self.ls2 = _norm(cfg, rngs), _norm(cfg, rngs)

    def _enter(self, norm, x: Array) -> Array:
        return x if self.cfg.norm_order == "post" else norm(x).astype(x.dtype)

    def _leave(self, norm, x: Array) -> Array:
        return norm(x).astype(x.dtype) if self.cfg.norm_order == "post" else x

    def branch(self, which: Literal["1", "2"], x: Float[Array, "B N C"], run: Any) -> Float[Array, "B N C"]:
        """The stream with a branch added, without hooks."""
        return self.added(which, x, run(self._enter(getattr(self, f"norm{which}"), x)))

    def added(self, which: Literal["1", "2"], x: Float[Array, "B N C"], y: Float[Array, "B N C"]) -> Array:
        """The stream with what a branch gave."""
        y = getattr(self, f"ls{which}")(y).astype(x.dtype) if self.scaled else y
        return self._leave(getattr(self, f"norm{which}"), x + y)


class Decoder(Blocks):
    """A decoder whose reducers may drop and merge tokens at any layer, while it reads and while it makes."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        wide, init = cfg.embed_width or cfg.width, nnx.initializers.normal(cfg.init_std)
        self.embedding = nnx.Param(init(rngs.params(), (cfg.vocab_size, wide)))
        if cfg.embed_width is not None:
            self.project_in = _linear(cfg, wide, cfg.width, False, rngs)
            self.project_out = _linear(cfg, cfg.width, wide, False, rngs)
        if cfg.position == "learned":
            self.positions = nnx.Param(init(rngs.params(), (cfg.max_length + _LEARNED, cfg.width)))
        self._make_blocks(cfg, rngs, DecoderBlock)
        if cfg.norm_order != "post":
            self.norm = _norm(cfg, rngs)
        if cfg.kv_layers is not None:
            self.norm_kv = _norm(cfg, rngs)
        if not cfg.tied:
            self.head = _linear(cfg, wide, cfg.vocab_size, False, rngs)

    def __call__(
        self,
        inputs: Any,
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> DecoderOutput:
        """Tells the next token at every place of texts, without a cache.

        Args:
            inputs: ids [B, N], `Prompts`, or `Tokens` that are embedded already. Ids outside of the vocabulary count as
                its nearest end under jit. A row without a token gives finite numbers of no meaning.
            hooks: where reducers come in; those of the cache are not called.
            key: for reducers that draw.
            train: nothing here depends on it.
            trace: whether to follow every token.
            states: whether to give the tokens after every block.
            context: what reducers shall know beside; its key is the call's own.

        Raises:
            ValueError: texts of another shape, or hooks that this model would never call.
        """
        tokens = self.embed(inputs)
        tokens = tokens.traced() if trace else tokens
        context = (context or Context()).replace(key=key)
        active = self.active(hooks, np.arange(tokens.length), None, tokens.length)
        tokens, _, traces, kept = self._through(tokens, hooks, context, inputs, active, states=states)
        features = self.normed(tokens.x)
        return DecoderOutput(
            self.logits(features), features, tokens, tuple(traces) if trace else None, tuple(kept) if states else None
        )

    def prefill(
        self,
        inputs: Any,
        hooks: Sequence[hk.Hook] = (),
        *,
        capacity: int,
        key: Array | None = None,
        context: Context | None = None,
    ) -> Prefilled:
        """Reads texts, to go on with them.

        Args:
            inputs: as of a call.
            hooks: reducers, those of the cache too: `after_prefill` ones are called with the cache and the tokens that
                are left, whose `aux` has what hooks of the blocks noted, and give a cache.
            capacity: G, tokens that there shall be room for behind the prompt.
            key: for reducers that draw.
            context: what reducers shall know beside.

        Raises:
            ValueError: texts of another shape, or hooks that this model would never call.
        """
        context = (context or Context()).replace(key=key, reading=True)
        tokens = self.embed(inputs)
        length, position = tokens.length, tokens.position
        assert position is not None
        largest = position if position.ndim == 2 else position.max(-1)
        start = (largest if tokens.valid is None else jnp.where(tokens.valid, largest, -1)).max(1) + 1
        active = self.active(hooks, np.arange(length), length, length + capacity)
        tokens, kept, _, _ = self._through(tokens, hooks, context, inputs, active, cached=True)
        cache = kv.fill(kept, start.astype(jnp.int32), length, capacity, self.cfg.rotate)
        for hook in hk.at(hooks, "after_prefill"):
            cache = hook(cache, tokens)
        features = self.normed(tokens.x)
        last = rows(features, last_slot(tokens)[:, None])
        return Prefilled(cache, self.logits(last)[:, 0], features, tokens)

    def embed(self, inputs: Any) -> Tokens:
        """Tokens of texts. The position of a token is its number among those of its row that count, -1 for padding.

        Raises:
            ValueError: texts of another shape.
        """
        cfg = self.cfg
        cfg.check(inputs)
        if isinstance(inputs, Tokens):
            places = _places(inputs.x, inputs.valid)
            if inputs.position is None:
                return inputs.replace(position=places)
            return inputs if inputs.order is not None else inputs.replace(order=places)
        ids, valid = (inputs.ids, inputs.valid) if isinstance(inputs, Prompts) else (inputs, None)
        if valid is None and cfg.pad_id is not None:
            valid = ids != cfg.pad_id
        position = _places(ids, valid)
        return Tokens(self._vectors(ids, position), position=position, valid=valid)

    def _vectors(self, ids: Int[Array, "B N"], position: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        cfg = self.cfg
        x = self.embedding[...].at[ids].get(mode="clip").astype(cfg.dtype)
        if cfg.embed_scaled:
            x *= jnp.asarray(cfg.width**0.5, x.dtype)
        if cfg.embed_width is not None:
            x = self.project_in(x)
        if cfg.position == "learned":
            x += self.positions[...].at[position + _LEARNED].get(mode="clip").astype(x.dtype)
        return x

    def normed(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Features after the final norm, where there is one."""
        return x if self.cfg.norm_order == "post" else self.norm(x).astype(x.dtype)

    def logits(self, features: Float[Array, "B N C"]) -> Float[Array, "B N V"]:
        """Of features after the final norm, float32."""
        cfg = self.cfg
        x = features if cfg.embed_width is None else self.project_out(features)
        out = x @ self.embedding[...].astype(x.dtype).T if cfg.tied else self.head(x)
        out = out.astype(jnp.float32)
        return out if cfg.logit_cap is None else cfg.logit_cap * jnp.tanh(out / cfg.logit_cap)

    # Prefill.

    def _through(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook],
        context: Context,
        inputs: Any,
        active: Any = None,
        *,
        states: bool = False,
        cached: bool = False,
    ) -> tuple[Tokens, list[Kept | None], list[LayerTrace], list[Tokens]]:
        """All blocks: the tokens behind them, what each leaves for a cache, traces and states, if asked for.

        `inputs`: what the tokens were made of. `active` [L, N]: which blocks run for which slots; where it is a NumPy
        array, a block that runs for none costs nothing.
        """
        cfg, first = self.cfg, tokens.position
        assert first is not None
        hk.check(hooks, cfg.info)
        hooks = [hook for hook in hooks if hook.where not in CACHE_SITES]
        traced = tokens.origin is not None
        tokens, _ = hk.reduce(hooks, "input", 0, tokens, Signals(context=context))
        given = isinstance(inputs, Tokens)
        # A window that reaches as far as the text is none. Positions that were given may lie anywhere.
        windows = [w if w is not None and (given or w < first.shape[1]) else None for w in cfg.windows]
        stand = not given or inputs.order is None  # in the order of their slots
        spans = [cfg.depth]
        position = first if tokens.position is None else tokens.position
        shared = Shared(position, turns(cfg, position), ordered=stand and position is first)
        if cfg.kv_layers is not None:
            spans = [cfg.kv_layers, cfg.depth]
        kept: list[Kept | None] = []
        traces: list[LayerTrace] = []
        after: list[Tokens] = []
        whole = not states and not traced and active is None
        for start, stop in zip([0, *spans[:-1]], spans, strict=True):
            if start == cfg.kv_layers:
                shared = shared.replace(source=tokens.replace(x=self.norm_kv(tokens.x).astype(tokens.x.dtype)))
            alone = start == cfg.kv_layers and cfg.kv_group > 1
            for at, end, block in self._runs(cfg, hooks, start, stop, whole=whole and not alone):
                shared = self._of(shared, tokens, first if stand else None)
                if block is None:
                    tokens, some = self._scan_cached(tokens, at, end, context, shared, windows, cached)
                    kept += some
                    continue
                if active is not None and isinstance(active, np.ndarray) and not active[at].any():
                    kept.append(None)
                    if states:
                        after.append(tokens)
                    continue
                takes, entering = cfg.kv_source[at] != at, tokens
                own = shared.replace(window=windows[at], taken=shared.taken if takes else None)
                tokens, entered, (part, signals) = block.run(tokens, hooks, at, context.replace(relative=own))
                if active is not None and not (isinstance(active, np.ndarray) and active[at].all()):
                    if tokens.length != entering.length:
                        raise ValueError(f"a depth schedule that differs by token: block {at} must keep all tokens")
                    tokens = tokens.replace(x=jnp.where(jnp.asarray(active[at])[:, None], tokens.x, entering.x))
                shared = shared.replace(taken=signals if alone else None)
                kept.append(_keep(part if shared.source is None else shared.source, signals, takes))
                if states:
                    after.append(tokens)
                if tokens.origin is not None:
                    size = tokens.size
                    traces.append(LayerTrace(tokens.origin, size, entered.count(), entered.length, tokens.length))
        return tokens, kept, traces, after

    def _of(self, shared: Shared, tokens: Tokens, first: Array | None) -> Shared:
        if tokens.position is shared.position:
            return shared
        assert tokens.position is not None
        turn, ordered = turns(self.cfg, tokens.position), tokens.position is first
        return shared.replace(position=tokens.position, turn=turn, ordered=ordered)

    def _scan_cached(
        self,
        tokens: Tokens,
        first: int,
        last: int,
        context: Context,
        shared: Shared,
        windows: Sequence[int | None],
        cached: bool,
    ) -> tuple[Tokens, list[Kept]]:
        """Blocks without hooks, as a scan."""
        graphdef, state = nnx.split(self.blocks)
        params = jax.tree.map(lambda leaf: leaf[first:last], state)
        here = windows[first:last]
        wide = np.iinfo(np.int32).max
        varied = np.array([wide if window is None else window for window in here], np.int32)
        one = len(set(here)) == 1

        def body(x, step):
            window, params = step
            own = shared.replace(window=here[0] if one else window)
            block = nnx.merge(graphdef, params)
            out, _, (_, signals) = block.run(tokens.replace(x=x), context=context.replace(relative=own))
            new = _keep(tokens, signals)
            return out.x, (new.key, new.value) if cached else None

        x, pairs = jax.lax.scan(body, tokens.x, (varied, params))
        holds = tokens if shared.source is None else shared.source
        kept = [Kept(holds, pairs[0][i], pairs[1][i]) for i in range(last - first)] if cached else []
        return tokens.replace(x=x), kept

    # Steps.

    def begin(
        self,
        ids: Int[Array, "B N"],
        hooks: Sequence[hk.Hook] = (),
        *,
        length: int,
        beams: int = 1,
        valid: Bool[Array, "B N"] | None = None,
        key: Array | None = None,
    ) -> tuple[Any, Cache, Float[Array, "R V"]]:
        """Reads texts, to go on with each of them; for `tokjax.generate.run`.

        Args:
            ids: of the texts that are read.
            hooks: reducers.
            length: tokens at most, for which the cache has room.
            beams: rows for every text, R in all.
            valid: which of the ids count; None: those that are no padding.
            key: for reducers that draw.

        Returns:
            How to take a step, the cache, and the logits of the first token.

        Raises:
            ValueError: ids of another shape, or hooks that this model would never call.
        """
        read = self.prefill(Prompts(ids, valid), hooks, capacity=length, key=key)
        cache, logits = jax.tree.map(lambda x: jnp.repeat(x, beams, 0) if x.ndim else x, (read.cache, read.logits))
        return self.steps(hooks), cache, logits

    def steps(self, hooks: Sequence[hk.Hook] = ()) -> Any:
        """How to take a step: `step(cache, ids [B]) -> (logits [B, V], cache)`, to be called in a loop.

        `decode_step` hooks are called after every step with the cache and the weights [B, H, S] of every layer's
        attention, and give a cache.
        """
        blocks = self._unstacked()  # once, outside of the loop

        def step(cache: Cache, ids: Int[Array, "B"]) -> tuple[Float[Array, "B V"], Cache]:
            x = self._vectors(ids[:, None], cache.position[:, None])
            features, cache = self.step(cache, x, hooks, blocks)
            return self.logits(features)[:, 0], cache

        return step

    def step(
        self,
        cache: Cache,
        x: Float[Array, "B 1 C"],
        hooks: Sequence[hk.Hook] = (),
        blocks: Sequence[DecoderBlock] | None = None,
    ) -> tuple[Float[Array, "B 1 C"], Cache]:
        """Takes in one embedded token a row: its features after the final norm, and the cache with it.

        A cache has room for its `capacity` of tokens; one more would take the last one's place.

        Raises:
            ValueError: a cache of another model, batch or rotation.
        """
        cfg = self.cfg
        cfg.check_cache(cache, len(x))
        blocks = self._unstacked() if blocks is None else blocks
        active = self.active(hooks, cache.order, cache.length, cache.length + cache.capacity)
        turn, order, position = by_head(turns(cfg, cache.position[:, None])), cache.order, cache.position
        cache, slots = kv.admit(cache)
        keys, values = ([list(getattr(group, name)) for group in cache.groups] for name in ("keys", "values"))
        in_place: list[Turn | None] = [None] * len(cache.groups)
        if cache.rotate == "read":
            in_place = [_of_slots(turns(cfg, group.position), group) for group in cache.groups]
        weights: list[Array | None] = []
        source: Array | None = None
        for layer, (block, window, at) in enumerate(zip(blocks, cfg.windows, cache.layers, strict=True)):
            if layer == cfg.kv_layers:
                source = self.norm_kv(x).astype(x.dtype)
            if at is None:
                weights.append(None)
                continue
            (g, i), owns, made_of = at, cfg.kv_source[layer] == layer, source
            group = cache.groups[g]

            def project(x: Array, block=block, owns=owns, made_of=made_of) -> tuple[Array, ...]:
                normed = block._enter(block.norm1, x)
                query = rotate(block.attn.queries(normed), turn)
                if not owns:
                    return (query,)
                key, value = block.attn.pairs(normed if made_of is None else made_of)
                return query, key if cache.rotate == "read" else rotate(key, turn), value

            def rest(x: Array, query: Array, key: Array, value: Array, block=block, window=window, g=g, group=group):
                seen, bias = rotate(key, in_place[g]), group.visible(order, position, window)
                out, weight = kv.attend(query, seen, value, bias, cfg.rule.scale, cfg.soft_cap)
                y = block.attn.proj(out.reshape(*out.shape[:2], -1))
                return block.branch("2", block.added("1", x, y), block.mlp), weight

            # A skipped block writes zeros, which nobody reads: later tokens skip it too.
            query, *new = _if(None if active is None else active[layer], project, x)
            if owns:
                keys[g][i], values[g][i] = (
                    kv.write(x[g][i], y, slots[g]) for x, y in zip((keys, values), new, strict=True)
                )
            x, weight = _if(None if active is None else active[layer], rest, x, query, keys[g][i], values[g][i])
            weights.append(weight)
        groups = (
            group.replace(keys=tuple(k), values=tuple(v))
            for group, k, v in zip(cache.groups, keys, values, strict=True)
        )
        cache = cache.replace(groups=tuple(groups), at=cache.at + 1)
        for hook in hk.at(hooks, "decode_step"):
            cache = hook(cache, tuple(weights))
        return self.normed(x), cache

    def _unstacked(self) -> list[Any]:
        return [self._block(self.cfg, layer) for layer in range(self.cfg.depth)]

    def active(self, hooks: Sequence[hk.Hook], column: Any, prompt: int | None, end: int) -> Any:
        """Which blocks run for the tokens of these columns, booleans [L, *column]; None: all.

        Raises:
            ValueError: blocks that are skipped, where others need their keys.
        """
        told = [hook(column, prompt, end) for hook in hk.at(hooks, "depth")]
        if told and self.cfg.kv_group > 1:
            raise ValueError(f"kv_group={self.cfg.kv_group}: must be 1 where a depth schedule skips blocks")
        return functools.reduce(lambda a, b: a & b, told) if told else None


def share_keys(
    cfg: DecoderConfig, params: Mapping[str, Any], layer: int, group: int = 1, shares: Shares = "mean"
) -> tuple[DecoderConfig, dict[str, Any]]:
    """A decoder whose blocks from `layer` on make keys and values of what enters the first of them (SwiftKV).

    Its new norm is a copy of that block's first one, and blocks that share keys and values have the mean of their
    projections; all else stays as it is (snowflakedb/ArcticTraining, `projects/swiftkv`). Nothing changes for the block
    `layer` itself; the ones behind it want training, see `tokjax.train.losses.swift_kv`.

    Args:
        cfg: of a decoder without shared keys, or with these, which stays as it is.
        params: pure dict of arrays; nothing is copied that stays the same.
        layer: K; the depth: nothing changes.
        group: so many neighbours share keys and values.
        shares: "mean" divides the sum over a group by its blocks; "reference" by `group`, also where the last one has
            fewer, as the published code does.

    Raises:
        ValueError: another `layer` or `group` than the decoder has already, one out of range, or norms behind the sum.
    """
    if not 0 <= layer <= cfg.depth:
        raise ValueError(f"layer={layer}: must be in [0, {cfg.depth}], the blocks of the model")
    if shares not in get_args(Shares):
        raise ValueError(f"shares={shares!r}: must be one of {', '.join(get_args(Shares))}")
    if cfg.kv_layers is not None and (cfg.kv_layers, cfg.kv_group) != (layer, group):
        told = f"must be kv_layers={cfg.kv_layers} and kv_group={cfg.kv_group}, which the model has already"
        raise ValueError(f"layer={layer}, group={group}: {told}")
    if cfg.kv_layers is not None or layer == cfg.depth:
        return cfg, dict(params)
    if cfg.norm_order == "post":
        raise ValueError("norm_order='post': keys of an earlier block need norms before the branches")
    cfg, blocks = dataclasses.replace(cfg, kv_layers=layer, kv_group=group), params["blocks"]

    def of(block: int, part: str) -> Any:
        """`part` of a block's parameters."""
        if cfg.scan:
            return jax.tree.map(lambda leaf: leaf[block], blocks[part])
        return blocks[block][part]

    norm = of(layer, "norm1")
    for first in range(layer, cfg.depth, group):
        members = range(first, min(first + group, cfg.depth))
        divisor = group if shares == "reference" else len(members)
        if divisor == 1:
            continue
        pairs = [of(block, "attn")["kv"] for block in members]
        mean = jax.tree.map(lambda *leaves, by=divisor: functools.reduce(operator.add, leaves) / by, *pairs)
        if cfg.scan:
            new = jax.tree.map(lambda leaf, x, at=first: leaf.at[at].set(x), blocks["attn"]["kv"], mean)
            blocks = {**blocks, "attn": {**blocks["attn"], "kv": new}}
        else:
            blocks = {**blocks, first: {**blocks[first], "attn": {**of(first, "attn"), "kv": mean}}}
    return cfg, {**params, "blocks": blocks, "norm_kv": norm}


def _if(condition: Any, run: Any, x: Array, *others: Array) -> Any:
    """`run(x, *others)`, or x and zeros for all else that it gives; a condition that is no tracer costs nothing."""
    if condition is None:
        return run(x, *others)

    def skip(x: Array, *others: Array) -> Any:
        first, *rest = jax.eval_shape(run, x, *others)
        zeros = [jnp.zeros(each.shape, each.dtype) for each in rest]
        return (x if first.shape == x.shape else jnp.zeros(first.shape, first.dtype), *zeros)

    if isinstance(condition, np.bool_):
        return run(x, *others) if condition else skip(x, *others)
    return jax.lax.cond(condition, lambda *a: tuple(run(*a)), skip, x, *others)


def _of_slots(turn: Turn | None, group: Group) -> Any:
    """For keys [B, K, S, D] as the group has them."""
    return turn if turn is None or group.per_head else tuple(part[:, None] for part in turn)


def _keep(tokens: Tokens, signals: Any, shared: bool = False) -> Kept:
    key = signals.key if getattr(signals, "unrotated", None) is None else signals.unrotated
    return Kept(tokens, key, signals.value, shared)


def _places(x: Array, valid: Bool[Array, "B N"] | None) -> Int[Array, "B N"]:
    if valid is None:
        return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return jnp.where(valid, jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, -1)
