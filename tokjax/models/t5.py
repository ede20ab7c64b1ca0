"""T5: an encoder that hands its tokens to hooks, and a decoder that attends to what they leave of them.

Sources: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 2020;
Xue et al., "ByT5", TACL 2022, and "mT5", NAACL 2021; numbers as in transformers' `models/t5/modeling_t5.py`. The
softmax with a phantom key and the initial weights are those of MrT5 (Kallini et al., ICLR 2025; jkallini/mrt5).

A block differs from a ViT's: RMS norms, no biases, heads of a width of their own, no scale of the logits, and a bias of
every pair of tokens by how far apart they stand, in buckets that widen with the distance, from one table a stack. It is
recomputed from the true positions of the tokens, so that merged, moved and deleted ones keep theirs (a merged token has
its anchor's).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal, get_args

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokjax import hooks as hk
from tokjax.models import layers
from tokjax.models.transformer import SITES, Block, Blocks, Drop, LayerTrace, Ran, pair_mask
from tokjax.signals import AttentionRule, Context, Queries, Signals, select
from tokjax.tokens import MASKED, Tokens

Feed = Literal["relu", "geglu"]
Normaliser = Literal["softmax", "softmax1"]


class Seq2Seq(struct.PyTreeNode):
    """Texts to read and texts to go on with."""

    ids: Int[Array, "B N"]
    decoder_ids: Int[Array, "B T"]  # the target shifted right: the start first, its last token not
    valid: Bool[Array, "B N"] | None = None  # None: wherever ids has no padding


class T5Output(struct.PyTreeNode):
    """What the model gives; `encoder` and `decoder` are tokens after their stack's final norm."""

    logits: Float[Array, "B T V"]
    encoder: Tokens
    decoder: Tokens
    tokens: Tokens  # the encoder's after its last block; `aux` is of both stacks
    trace: tuple[LayerTrace, ...] | None = None
    states: tuple[Tokens, ...] | None = None  # after every block of the encoder, where they were asked for
    decoder_states: tuple[Tokens, ...] | None = None


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Everything that decides a T5's parameters and numbers; the defaults are ByT5-small's.

    Raises:
        ValueError: fields that do not fit together; the message names the field, its value and what is allowed.
    """

    vocab_size: int = 384
    length: int = 1024  # of the example that `cost` counts; texts may be longer
    decoder_length: int = 189  # the same of its target
    width: int = 1472
    hidden: int = 3584  # channels within an MLP
    heads: int = 6
    head_width: int = 64
    depth: int = 12
    decoder_depth: int = 4
    feed: Feed = "geglu"  # relu in T5 1.0
    buckets: int = 32  # of distances
    max_distance: int = 128  # from here on all are one
    tied: bool = False  # the head is the embedding (T5 1.0)
    scaled: bool = False  # features times width**-0.5 before the head (T5 1.0)
    normaliser: Normaliser = "softmax"
    norm_eps: float = 1e-6
    dropout: float = 0.0  # in training; 0.1 in published runs
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0  # what the decoder begins with
    dtype: str = "float32"  # of activations; parameters stay float32
    scan: bool = False  # blocks stored stacked, long equal runs scanned
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self):
        counts = ("vocab_size", "length", "decoder_length", "width", "hidden", "heads", "head_width", "depth")
        for name in (*counts, "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, kind in (("feed", Feed), ("normaliser", Normaliser), ("attention", Literal["xla", "cudnn"])):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"buckets={self.buckets}: must be a multiple of 4")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance={self.max_distance}: must be above buckets / 2 = {self.buckets // 2}")
        for name in ("pad_id", "eos_id", "start_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, {self.vocab_size})")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps}: must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: must be one of float32, bfloat16, float16")

    @property
    def rule(self) -> AttentionRule:
        return AttentionRule(scale=1.0, normaliser=self.normaliser)

    @property
    def encoder(self) -> "StackConfig":
        return StackConfig(self, self.depth, self.scan, decoder=False)

    @property
    def decoder(self) -> "StackConfig":
        return StackConfig(self, self.decoder_depth, self.scan, decoder=True)

    @property
    def info(self) -> hk.ModelInfo:
        """Of the encoder, which is what reducers reduce."""
        mlp = (3 if self.feed == "geglu" else 2) * self.width * self.hidden
        return hk.ModelInfo(
            self.depth,
            self.width,
            self.heads,
            self.length,
            pooling="mean",
            sites=SITES | hk.CROSS,
            mlp=mlp,
            decoder_depth=self.decoder_depth,
        )

    def example(self, batch: int) -> Seq2Seq:
        """Shape and type of the input, for tracing."""
        shapes = ((batch, self.length), (batch, self.decoder_length))
        return Seq2Seq(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))  # type: ignore[arg-type]

    def check(self, inputs: Seq2Seq) -> None:
        """Refuses ids of another shape or type, and (where they can be looked at) outside of the vocabulary.

        Raises:
            ValueError: names what is wrong and what is allowed.
        """
        if not isinstance(inputs, Seq2Seq):
            raise ValueError(f"inputs is a {type(inputs).__name__}: must be a Seq2Seq of ids and decoder_ids")
        self.check_ids("ids", inputs.ids)
        self.check_ids("decoder_ids", inputs.decoder_ids)
        if inputs.ids.shape[0] != inputs.decoder_ids.shape[0]:
            raise ValueError(f"decoder_ids has {inputs.decoder_ids.shape[0]} rows: must have {inputs.ids.shape[0]}")
        if inputs.valid is not None and inputs.valid.shape != inputs.ids.shape:
            raise ValueError(f"valid has shape {inputs.valid.shape}: must be that of ids, {inputs.ids.shape}")

    def check_ids(self, name: str, ids: Any) -> None:
        """The same of one array."""
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", None)
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"{name} has shape {shape}: must be (batch, at least 1 token)")
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} has type {dtype}: must be an integer type")
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"{name} lie in {ids.min()}..{ids.max()}: must be in [0, {self.vocab_size})")


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """One of the two stacks of a T5."""

    model: T5Config
    depth: int
    scan: bool
    decoder: bool
    drop_path: ClassVar[float] = 0.0

    @property
    def init(self) -> float:
        """Factor of the initial weights (jkallini/mrt5 `training/train.py`): what the blocks add up is of order 1."""
        return self.depth**-0.5


_SIZES = {  # width, hidden, heads, depth, decoder depth
    "byt5-small": (1472, 3584, 6, 12, 4),
    "byt5-base": (1536, 3968, 12, 18, 6),
    "byt5-large": (1536, 3840, 16, 36, 12),
    "byt5-xl": (2560, 6720, 32, 36, 12),
    "byt5-xxl": (4672, 12352, 64, 36, 12),
    "t5-v1_1-small": (512, 1024, 6, 8, 8),
    "t5-v1_1-base": (768, 2048, 12, 12, 12),
    "t5-v1_1-large": (1024, 2816, 16, 24, 24),
    "t5-v1_1-xl": (2048, 5120, 32, 24, 24),
    "t5-v1_1-xxl": (4096, 10240, 64, 24, 24),
}


def preset(name: str, **changes: Any) -> T5Config:
    """A published size, such as "byt5-small" or "t5-v1_1-base", with fields changed.

    Raises:
        ValueError: an unknown name, or fields that do not fit together.
    """
    if name not in _SIZES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(_SIZES)}")
    width, hidden, heads, depth, decoder_depth = _SIZES[name]
    vocab = 384 if name.startswith("byt5") else 32128
    sizes = {"width": width, "hidden": hidden, "heads": heads, "depth": depth, "decoder_depth": decoder_depth}
    return T5Config(**{"vocab_size": vocab, **sizes, **changes})


@functools.cache
def bucket_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of every bucket of one direction, from whole numbers alone.

    The first half holds one distance each; the others grow by a constant factor up to `max_distance`.
    """
    exact = buckets // 2
    wide = buckets - exact
    starts = list(range(exact + 1))
    for step in range(1, wide):  # the smallest d with ln(d / exact) / ln(max / exact) * wide >= step
        reached = exact ** (wide - step) * max_distance**step
        starts.append(next(d for d in range(starts[-1], max_distance + 1) if d**wide >= reached))
    return tuple(starts)


def relative_buckets(
    distance: Int[Any, "*shape"], *, causal: bool = False, buckets: int = 32, max_distance: int = 128
) -> Int[np.ndarray, "*shape"]:
    """The bucket of a distance, the key's position less the query's (transformers' `_relative_position_bucket`).

    Without `causal` half of the buckets are for keys behind the query; with it those share the bucket of distance 0.
    """
    distance = np.asarray(distance)
    side = buckets if causal else buckets // 2
    far = np.maximum(-distance, 0) if causal else np.abs(distance)
    bucket = np.searchsorted(bucket_starts(side, max_distance), far, side="right") - 1
    return (bucket + (0 if causal else side * (distance > 0))).astype(np.int32)


class Relative(struct.PyTreeNode):
    """The relative bias of a stack: what all of its blocks share.

    A map of all pairs costs as much as the logits of a block, so that it is made once for each set of positions: a
    stack that moves no tokens makes one of a single row, `4 H N**2` bytes; after a reduction there is one for every
    row, `4 B H N**2` bytes, which serves until positions change again. Its gradient is summed over the blocks first.
    """

    by_distance: Float[Array, "D H"]  # of distances -max_distance .. max_distance, and all beyond
    position: Int[Array, "B N"]  # of the tokens that `pairs` is of
    pairs: Float[Array, "#B H N N"]

    def rows(self, position: Int[Array, "B N"], queries: Queries) -> Float[Array, "B H Q N"]:
        """Bias of the chosen queries on all keys, for any positions."""
        if position is self.position:
            return select(self.pairs, queries, 2)
        return pair_bias(self.by_distance, select(position, queries, 1), position)


def pair_bias(
    by_distance: Float[Array, "D H"], queries: Int[Array, "B Q"], keys: Int[Array, "B N"]
) -> Float[Array, "B H Q N"]:
    """The bias of every query on every key, from their positions."""
    far = len(by_distance) // 2
    distance = jnp.clip(keys[:, None] - queries[:, :, None], -far, far) + far
    return jnp.moveaxis(by_distance.T[:, distance], 0, 1)


def _in_order(by_distance: Float[Array, "D H"], n: int) -> Float[Array, "1 H N N"]:
    """`pair_bias` of positions 0 .. n-1, by shifting one row: no gather, and a gradient without a scatter."""
    far = len(by_distance) // 2
    row = by_distance.T[:, jnp.clip(jnp.arange(-n, n), -far, far) + far]
    row = jnp.roll(row, -n, 1)  # distance d at d mod 2n
    skewed = jnp.tile(row, n)[:, : n * (2 * n - 1)].reshape(-1, n, 2 * n - 1)
    return skewed[None, :, :, :n]


class Attention(nnx.Module):
    """Self-attention in two steps, as in `transformer.Attention`, with T5's rule and relative bias."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        cfg = stack.model
        self.heads, self.rule, self.implementation = cfg.heads, cfg.rule, cfg.attention
        self.inner, init = cfg.heads * cfg.head_width, _normal(stack.init * cfg.width**-0.5)
        self.qkv = _linear(cfg, cfg.width, 3 * self.inner, init, rngs)
        self.proj = _linear(cfg, self.inner, cfg.width, _normal(stack.init * self.inner**-0.5), rngs)

    def project(self, x: Float[Array, "B N C"]) -> tuple[Float[Array, "B N H D"], ...]:
        """Queries, keys and values."""
        return layers.by_heads(self.qkv, x, 3, self.heads)

    def signals(self, x: Float[Array, "B N C"], tokens: Tokens, context: Context) -> Signals:
        """What attention works on; `context.relative` is the stack's `Relative`."""
        position, relative, mask = tokens.position, context.relative, pair_mask(None, tokens.segment)
        assert position is not None

        def pairs(queries: Queries) -> Array:
            bias = relative.rows(position, queries)
            return bias if mask is None else bias + mask(queries)

        bias = tokens.attention_bias()
        bias = None if bias is None else bias[:, None, None]
        query, keys, values = self.project(x)
        return Signals(query, keys, values, bias, context=context, rule=self.rule, pair_bias=pairs)

    def __call__(self, signals: Signals, drop: Drop | None = None) -> Float[Array, "B N C"]:
        return self.proj(_attend(signals, self.implementation, drop))


class CrossAttention(nnx.Module):
    """Attention of a decoder's tokens to those of an encoder, which count as their sizes, gates and validity say."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        cfg = stack.model
        self.heads, self.rule, self.implementation = cfg.heads, cfg.rule, cfg.attention
        self.inner, init = cfg.heads * cfg.head_width, _normal(stack.init * cfg.width**-0.5)
        self.q = _linear(cfg, cfg.width, self.inner, init, rngs)
        self.kv = _linear(cfg, cfg.width, 2 * self.inner, init, rngs)
        self.proj = _linear(cfg, self.inner, cfg.width, _normal(stack.init * self.inner**-0.5), rngs)

    def project(self, memory: Float[Array, "B N C"]) -> tuple[Float[Array, "B N H D"], ...]:
        """Keys and values."""
        return layers.by_heads(self.kv, memory, 2, self.heads)

    def signals(
        self,
        x: Float[Array, "B T C"],
        keys: Float[Array, "B N H D"],
        values: Float[Array, "B N H D"],
        bias: Float[Array, "B N"] | None,
        context: Context,
    ) -> Signals:
        """What attention works on; `bias` is the memory's."""
        query = self.q(x).reshape(*x.shape[:2], self.heads, -1)
        bias = None if bias is None else bias[:, None, None]
        return Signals(query, keys, values, bias, context=context, rule=self.rule)

    def __call__(self, signals: Signals, drop: Drop | None = None) -> Float[Array, "B T C"]:
        return self.proj(_attend(signals, self.implementation, drop))


def _normal(deviation: float) -> Any:
    return nnx.initializers.normal(deviation)


def _linear(cfg: T5Config, inputs: int, outputs: int, init: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return layers.linear(inputs, outputs, bias=False, dtype=cfg.dtype, rngs=rngs, init=init)


def _attend(signals: Signals, implementation: Literal["xla", "cudnn"], drop: Drop | None) -> Float[Array, "B N I"]:
    out = layers.attention(layers.drop_weights(signals, drop), implementation)
    return out.reshape(*out.shape[:2], -1)


class T5Block(Block):
    """Attention, in decoders attention to the encoder, and MLP, with the sites of `transformer.Block`."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        cfg, init = stack.model, stack.init
        norm = functools.partial(layers.rms_norm, cfg.width, cfg.norm_eps, rngs, init)
        self.norm1, self.norm2, self.attn = norm(), norm(), Attention(stack, rngs=rngs)
        inits = (_normal(init * cfg.width**-0.5), _normal(init * cfg.hidden**-0.5))
        self.mlp = layers.Mlp(cfg.width, cfg.hidden, cfg.feed, bias=False, dtype=cfg.dtype, init=inits, rngs=rngs)
        self.scaled, self.decoder = False, stack.decoder
        if stack.decoder:
            self.norm_cross, self.cross = norm(), CrossAttention(stack, rngs=rngs)

    def _attend(self, signals: Signals, drop: Drop | None) -> Array:
        return self.attn(signals, layers.salted(drop, 3))

    def _feed(self, x: Array, drop: Drop | None) -> Array:
        return self.mlp(x, lambda hidden: layers.dropout(hidden, layers.salted(drop, 4)))

    def _dropped(self, y: Array, drop: Drop) -> Array:
        return layers.dropout(y, drop)

    def _between(self, tokens: Tokens, hooks, layer: int, context: Context, drop: Drop | None, branch) -> Tokens:
        if not self.decoder:
            return tokens
        memory, seen = context.memory, [Signals(context=context)]
        assert memory is not None

        def look(part: Tokens) -> Array:
            keys, values = self.cross.project(memory.x)
            seen[0] = self.cross.signals(part.x, keys, values, memory.attention_bias(), context)
            return self.cross(seen[0], layers.salted(drop, 5))

        tokens = branch("around_cross_attention", tokens, self.norm_cross, look, "", 2)
        return hk.reduce(hooks, "after_cross_attention", layer, tokens, seen[0])[0]


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens that a decoder has made, [B, T, H, D] in every block, and how many there are."""

    kept: tuple[tuple[Array, Array], ...]
    at: Int[Array, ""]


Step = Callable[[Cache, Int[Array, "R"]], tuple[Float[Array, "R V"], Cache]]


class Stack(Blocks):
    """The blocks of the encoder or the decoder, the table of their relative bias, and the norm behind them."""

    def __init__(self, stack: StackConfig, *, rngs: nnx.Rngs):
        self.cfg, cfg = stack, stack.model
        drawn = _normal(stack.init * cfg.width**-0.5)(rngs.params(), (cfg.buckets, cfg.heads))
        self.relative_bias = nnx.Param(drawn)
        self._make_blocks(stack, rngs, T5Block)
        self.norm = layers.rms_norm(cfg.width, cfg.norm_eps, rngs, stack.init)

    def by_distance(self) -> Float[Array, "D H"]:
        """The bias of every distance, float32; in a decoder no query sees a later key."""
        cfg, causal = self.cfg.model, self.cfg.decoder
        distance = np.arange(-cfg.max_distance, cfg.max_distance + 1)
        bucket = relative_buckets(distance, causal=causal, buckets=cfg.buckets, max_distance=cfg.max_distance)
        bias = self.relative_bias[...].astype(jnp.float32)[bucket]
        return jnp.where((distance > 0)[:, None], MASKED, bias) if causal else bias

    def __call__(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook],
        context: Context,
        key: Array | None = None,
        keep_states: bool = False,
    ) -> tuple[Tokens, Ran]:
        """Runs tokens that stand in order; also gives them after the final norm. `key`: of dropout."""
        relative = self.relative(tokens, ordered=True)
        tokens = tokens.replace(x=layers.dropout(tokens.x, self._drop(self.cfg, self.cfg.depth, key)))
        ran = self._run(self.cfg, tokens, hooks, context.replace(relative=relative), key, keep_states)
        x = self.norm(ran.tokens.x).astype(ran.tokens.x.dtype)
        return ran.tokens.replace(x=layers.dropout(x, self._drop(self.cfg, self.cfg.depth + 1, key))), ran

    def relative(self, tokens: Tokens, ordered: bool) -> Relative:
        """The bias of these tokens, which stand at 0, 1, ... where they are `ordered`."""
        by_distance, position = self.by_distance(), tokens.position
        assert position is not None
        pairs = _in_order(by_distance, tokens.length) if ordered else pair_bias(by_distance, position, position)
        return Relative(by_distance, position, pairs)

    def stretch(
        self, tokens: Tokens, hooks: Sequence[hk.Hook], context: Context, span: tuple[int, int], opening: bool
    ) -> Tokens:
        """Runs some blocks only; see `T5.stretch`."""
        context = context.replace(relative=self.relative(tokens, ordered=opening))
        return self._run(self.cfg, tokens, hooks, context, span=span).tokens

    def _shared(self, context: Context, tokens: Tokens) -> Context:
        relative, position = context.relative, tokens.position
        if position is relative.position:
            return context
        pairs = pair_bias(relative.by_distance, position, position)  # type: ignore[arg-type]
        return context.replace(relative=relative.replace(position=position, pairs=pairs))

    def _drop(self, cfg: Any, layer: int | Array, key: Array | None) -> Drop | None:
        """The same rate everywhere."""
        if key is None or not self.cfg.model.dropout:
            return None
        return self.cfg.model.dropout, layers.fold_in(key, layer)


class T5(nnx.Module):
    """An encoder-decoder whose encoder reducers may reduce; the decoder attends to the tokens that they leave."""

    depths: ClassVar[tuple[str, ...]] = ("depth", "decoder_depth")

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        init = _normal(cfg.width**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (cfg.vocab_size, cfg.width)))
        self.encoder, self.decoder = Stack(cfg.encoder, rngs=rngs), Stack(cfg.decoder, rngs=rngs)
        if not cfg.tied:
            self.head = _linear(cfg, cfg.width, cfg.vocab_size, init, rngs)

    def deepen(self, cfg: T5Config) -> None:
        """See `transformer.skeleton`."""
        self.cfg = cfg
        self.encoder.deepen(cfg.encoder)
        self.decoder.deepen(cfg.decoder)

    def __call__(
        self,
        inputs: Seq2Seq,
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> T5Output:
        """Reads texts, and tells the next token at every place of their targets.

        Args:
            inputs: ids outside of the vocabulary count as its nearest end under jit. A row of padding alone gives
                finite numbers of no meaning.
            hooks: where reducers come in; those of cross-attention count the blocks of the decoder.
            key: PRNG key, for dropout and for reducers that draw.
            train: whether dropout is on.
            trace: whether to follow every token through the encoder.
            states: whether to give the tokens after every block.
            context: what reducers shall know beside; its key is the call's own.

        Raises:
            ValueError: ids of another shape, or hooks that this model would never call.
        """
        self.cfg.check(inputs)
        options: dict[str, Any] = {"key": key, "train": train, "states": states, "context": context}
        encoder, ran = self.encode(inputs.ids, hooks, valid=inputs.valid, trace=trace, **options)
        logits, decoder, read = self.decode(inputs.decoder_ids, encoder, hooks, **options)
        tokens = ran.tokens.replace(aux=decoder.aux)
        return T5Output(logits, encoder, decoder, tokens, ran.trace, ran.states, read.states)

    def encode(
        self,
        ids: Int[Array, "B N"],
        hooks: Sequence[hk.Hook] = (),
        *,
        valid: Bool[Array, "B N"] | None = None,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> tuple[Tokens, Ran]:
        """The first half: tokens after the encoder's final norm, and what its blocks left behind."""
        cfg = self.cfg
        cfg.check_ids("ids", ids)
        hk.check(hooks, cfg.info)
        tokens = self._read(ids, valid)
        tokens = tokens.traced() if trace else tokens
        drop = layers.fold_in(key, 0) if train and key is not None else None
        context = (context or Context()).replace(key=key, ids=ids)
        return self.encoder(tokens, [h for h in hooks if h.where not in hk.CROSS], context, drop, states)

    def _read(self, ids: Int[Array, "B N"], valid: Bool[Array, "B N"] | None) -> Tokens:
        return self._tokens(ids).replace(valid=ids != self.cfg.pad_id if valid is None else valid)

    def start(self, inputs: Seq2Seq) -> Tokens:
        """What the first stretch of the encoder runs on."""
        return self._read(inputs.ids, inputs.valid)

    def stretch(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook],
        context: Context,
        span: tuple[int, int],
        opening: bool = False,
    ) -> Tokens:
        """Runs some blocks of the encoder only, for programs that are cut where the number of tokens is looked at.

        `opening`: these are the tokens of the input, in order.
        """
        return self.encoder.stretch(tokens, [h for h in hooks if h.where not in hk.CROSS], context, span, opening)

    def finish(
        self, tokens: Tokens, inputs: Seq2Seq, hooks: Sequence[hk.Hook], context: Context
    ) -> Float[Array, "B T V"]:
        """Logits of what the last stretch left of these inputs."""
        memory = tokens.replace(x=self.encoder.norm(tokens.x).astype(tokens.x.dtype))
        return self.decode(inputs.decoder_ids, memory, hooks, key=context.key, context=context)[0]

    def decode(
        self,
        decoder_ids: Int[Array, "B T"],
        memory: Tokens,
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> tuple[Float[Array, "B T V"], Tokens, Ran]:
        """The second half: logits, tokens after the decoder's final norm, and what its blocks left behind.

        Args:
            decoder_ids: the target shifted right.
            memory: what `encode` gives; its aux is added to.
            hooks: those of cross-attention are called.
            key: of dropout.
            train: whether dropout is on.
            states: whether to give the tokens after every block.
            context: what reducers shall know beside.
        """
        self.cfg.check_ids("decoder_ids", decoder_ids)
        tokens = self._tokens(decoder_ids).replace(aux=memory.aux)
        drop = layers.fold_in(key, 1) if train and key is not None else None
        context = (context or Context()).replace(key=key, memory=memory)
        tokens, ran = self.decoder(tokens, [h for h in hooks if h.where in hk.CROSS], context, drop, states)
        return self.logits(tokens.x), tokens, ran

    def begin(
        self,
        ids: Int[Array, "B N"],
        hooks: Sequence[hk.Hook] = (),
        *,
        length: int,
        beams: int = 1,
        valid: Bool[Array, "B N"] | None = None,
        key: Array | None = None,
    ) -> tuple[Step, "Cache", Float[Array, "R V"]]:
        """Reads texts, to go on with each of them; for `tokjax.generate.run`.

        Args:
            ids: of the texts that are read.
            hooks: reducers of the encoder. Those that watch cross-attention are not called.
            length: tokens at most, for which the cache has room.
            beams: rows for every text, R in all.
            valid: which of the ids count; None: those that are no padding.
            key: for reducers that draw.

        Returns:
            How to take a step, the cache, and the logits of the first token.

        Raises:
            ValueError: ids of another shape, hooks that this model would never call, or one around cross-attention,
                which has no cache.
        """
        cfg = self.cfg
        if around := [hook for hook in hooks if hook.where == "around_cross_attention"]:
            raise ValueError(f"{type(around[0].reducer).__name__} hooks in around cross-attention, which has no cache")
        memory, _ = self.encode(ids, hooks, valid=valid, key=key)
        blocks: list[Any] = [self.decoder._block(self.decoder.cfg, layer) for layer in range(cfg.decoder_depth)]
        bias = memory.attention_bias()
        # Once for all steps: keys and values of the encoder's tokens, and the biases of distances.
        cross = [block.cross.project(memory.x) for block in blocks]
        cross, bias = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), (cross, bias))
        by_distance = self.decoder.by_distance()

        def step(cache: Cache, ids: Int[Array, "R"]) -> tuple[Array, Cache]:
            x, kept = self.embed(ids)[:, None], []
            relative = pair_bias(by_distance, cache.at[None, None], jnp.arange(length)[None])
            for block, (keys, values), past in zip(blocks, cross, cache.kept, strict=True):
                query, *new = block.attn.project(block.norm1(x))
                both = zip(past, new, strict=True)
                key, value = (jax.lax.dynamic_update_slice_in_dim(a, b, cache.at, 1) for a, b in both)
                own = Signals(query, key, value, relative, rule=cfg.rule)  # whose bias hides what is to come
                x = x + block.attn(own)
                look = block.cross.signals(block.norm_cross(x), keys, values, bias, Context())
                x = x + block.cross(look)
                x = x + block.mlp(block.norm2(x))
                kept.append((key, value))
            x = self.decoder.norm(x).astype(x.dtype)
            return self.logits(x)[:, 0], Cache(tuple(kept), cache.at + 1)

        rows = len(ids) * beams
        empty = jnp.zeros((rows, length, cfg.heads, cfg.head_width), cfg.dtype)
        cache = Cache(((empty, empty),) * cfg.decoder_depth, jnp.int32(0))
        logits, cache = step(cache, jnp.full(rows, cfg.start_id, jnp.int32))
        return step, cache, logits

    def embed(self, ids: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        """Vectors of the tokens; both stacks share the table."""
        return self.embedding[...].at[ids].get(mode="clip").astype(self.cfg.dtype)

    def _tokens(self, ids: Int[Array, "B N"]) -> Tokens:
        place = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return Tokens(self.embed(ids), position=place)

    def logits(self, x: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        """Of features after the decoder's final norm, float32."""
        x = x * self.cfg.width**-0.5 if self.cfg.scaled else x
        out = x @ self.embedding[...].astype(x.dtype).T if self.cfg.tied else self.head(x)
        return out.astype(jnp.float32)
