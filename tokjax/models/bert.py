"""BERT: an encoder of texts that is pre-trained on gaps and read through its first token.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", NAACL 2019;
numbers as in transformers' `models/bert/modeling_bert.py`: norms behind each sum, learned positions and token types,
the exact GELU, and a pooler, tanh of a dense layer on [CLS], before the classifier.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar, Literal

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from tokjax import hooks as hk
from tokjax.models import layers
from tokjax.models.transformer import (
    SITES,
    Block,
    Blocks,
    Drop,
    Gelu,
    MlpKind,
    Output,
    check_blocks,
    mlp_macs,
)
from tokjax.signals import Context, Signals
from tokjax.tokens import Tokens


class Encoding(struct.PyTreeNode):
    """Texts or pairs of them, padded on the right, [CLS] first."""

    ids: Int[Array, "B N"]
    types: Int[Array, "B N"] | None = None  # which text of a pair a token is of; None: all of the first
    valid: Bool[Array, "B N"] | None = None  # None: wherever ids has no padding


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Everything that decides a BERT's parameters and numbers; the defaults are BERT-base, uncased.

    Raises:
        ValueError: fields that do not fit together; the message names the field, its value and what is allowed.
    """

    vocab_size: int = 30522
    length: int = 512  # of the text that `cost` counts
    max_length: int = 512  # rows of the position table
    types: int = 2  # rows of the token-type table
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 0  # 0: no classifier, `logits` is what was pooled
    labels: tuple[str, ...] = ()  # names of the classes; empty: they have none
    pooler: bool = True  # else the feature is [CLS] as the last block leaves it
    pad_id: int = 0
    norm_eps: float = 1e-12
    gelu: Gelu = "exact"
    dropout: float = 0.0  # in training; 0.1 in published runs
    dtype: str = "float32"  # of activations; parameters stay float32
    scan: bool = False  # blocks stored stacked, long equal runs scanned
    attention: Literal["xla", "cudnn"] = "xla"

    # What these encoders do not vary.
    mlp: ClassVar[MlpKind] = "plain"
    layer_scale: ClassVar[None] = None
    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = True
    key_bias: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    rope: ClassVar[None] = None
    drop_path: ClassVar[float] = 0.0
    head_bias: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))  # which JSON has as a list
        for name in ("vocab_size", "length", "max_length", "types"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.length > self.max_length:
            raise ValueError(f"length={self.length}: must be at most max_length={self.max_length}")
        check_blocks(self)
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes}: must be at least 0")
        if self.labels and len(self.labels) != self.num_classes:
            raise ValueError(f"labels={self.labels}: must be num_classes={self.num_classes} names, or none")
        if not self.pooler and self.num_classes:
            raise ValueError(f"pooler=False: must be True with num_classes={self.num_classes}, which read it")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id={self.pad_id}: must be in [0, {self.vocab_size})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")

    @property
    def info(self) -> hk.ModelInfo:
        """[CLS] is the one protected token."""
        mlp, classes = mlp_macs(self), self.num_classes
        return hk.ModelInfo(self.depth, self.width, self.heads, self.length, 1, None, "cls", SITES, classes, mlp=mlp)

    def example(self, batch: int) -> Any:
        """Shape and type of the input, for tracing."""
        return jax.ShapeDtypeStruct((batch, self.length), jnp.int32)

    def check(self, inputs: Any) -> None:
        """Refuses texts of another shape or type, too long, or (where it can be looked at) outside of the vocabulary.

        Raises:
            ValueError: names what is wrong and what is allowed.
        """
        encoding = encoded(inputs)
        self._check_ids("ids", encoding.ids, self.vocab_size)
        if encoding.types is not None:
            self._check_ids("types", encoding.types, self.types)
        for name in ("types", "valid"):
            part = getattr(encoding, name)
            if part is not None and part.shape != encoding.ids.shape:
                raise ValueError(f"{name} has shape {part.shape}: must be that of ids, {encoding.ids.shape}")

    def _check_ids(self, name: str, ids: Any, end: int) -> None:
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", None)
        if not isinstance(shape, tuple) or len(shape) != 2 or not 1 <= shape[1] <= self.max_length:
            raise ValueError(f"{name} has shape {shape}: must be (batch, 1 to {self.max_length} tokens)")
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} has type {dtype}: must be an integer type")
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < end:
            raise ValueError(f"{name} lie in {ids.min()}..{ids.max()}: must be in [0, {end})")


_SIZES = {  # width, depth, heads; the small ones are of Turc et al., "Well-Read Students Learn Better", 2019
    "bert-tiny": (128, 2, 2),
    "bert-mini": (256, 4, 4),
    "bert-small": (512, 4, 8),
    "bert-medium": (512, 8, 8),
    "bert-base": (768, 12, 12),
    "bert-large": (1024, 24, 16),
}


def preset(name: str, **changes: Any) -> BertConfig:
    """A published size, such as "bert-base", with fields changed.

    Raises:
        ValueError: an unknown name, or fields that do not fit together.
    """
    if name not in _SIZES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(_SIZES)}")
    width, depth, heads = _SIZES[name]
    return BertConfig(**{"width": width, "depth": depth, "heads": heads, **changes})


def encoded(inputs: Encoding | Int[Array, "B N"]) -> Encoding:
    """Ids alone are texts of one part."""
    return inputs if isinstance(inputs, Encoding) else Encoding(inputs)


class BertBlock(Block):
    """A block whose norms stand behind each sum; dropout of whole branches' values and of attention weights."""

    def _enter(self, norm, x: Array) -> Array:
        return x

    def _leave(self, norm, x: Array) -> Array:
        return norm(x).astype(x.dtype)

    def _attend(self, signals: Signals, drop: Drop | None) -> Array:
        return self.attn(layers.drop_weights(signals, layers.salted(drop, 3)))

    def _dropped(self, y: Array, drop: Drop) -> Array:
        return layers.dropout(y, drop)


class Bert(Blocks):
    """An encoder of texts whose feature is its first token's; reducers leave that one alone.

    Padding is not valid: reducers neither count nor merge it. What a token's place in the text says stands in its
    features from the start, so that nothing in the blocks reads its `position`, which reducers may.
    """

    def __init__(self, cfg: BertConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        c, normal = cfg.width, nnx.initializers.truncated_normal(0.02)
        self.token_embed = nnx.Param(normal(rngs.params(), (cfg.vocab_size, c)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, cfg.max_length, c)))
        self.type_embed = nnx.Param(normal(rngs.params(), (cfg.types, c)))
        self.norm_embed = layers.layer_norm(c, cfg.norm_eps, rngs)
        self._make_blocks(cfg, rngs, BertBlock)
        if cfg.pooler:
            self.pooler = layers.linear(c, c, bias=True, dtype=cfg.dtype, rngs=rngs)
        if cfg.num_classes:
            self.head = layers.linear(c, cfg.num_classes, bias=True, dtype=cfg.dtype, rngs=rngs, init=normal)

    def __call__(
        self,
        inputs: Encoding | Int[Array, "B N"],
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> Output:
        """Encodes and classifies texts.

        Args:
            inputs: token ids, or an `Encoding`; ids outside of a table count as its nearest end under jit.
            hooks: where reducers come in.
            key: PRNG key, for dropout and for reducers that draw.
            train: whether dropout is on.
            trace: whether to follow every token.
            states: whether to give the tokens after every block.
            context: what reducers shall know beside; its key is the call's own.

        Returns:
            `logits` [B, K] of the classes, what was pooled [B, C] without any.

        Raises:
            ValueError: inputs of another shape, or hooks that this model would never call.
        """
        cfg = self.cfg
        cfg.check(inputs)
        hk.check(hooks, cfg.info)
        drop = key if train else None
        tokens = self.embed(inputs, drop)
        tokens = tokens.traced() if trace else tokens
        ran = self._run(cfg, tokens, hooks, (context or Context()).replace(key=key), drop, states)
        features = ran.tokens.x
        pooled = features[:, 0] if ran.pooled is None else ran.pooled
        if cfg.pooler:
            pooled = jnp.tanh(self.pooler(pooled))
        heads: tuple[Array, ...] = ()
        if cfg.num_classes:
            heads = (self.head(layers.dropout(pooled, self._drop(cfg, cfg.depth + 1, drop))).astype(jnp.float32),)
        if ran.logits is not None:
            heads = (ran.logits.astype(jnp.float32),)
        return Output(heads[0] if heads else pooled, heads, pooled, features, ran.tokens, ran.trace, ran.states)

    def embed(self, inputs: Encoding | Int[Array, "B N"], key: Array | None = None) -> Tokens:
        """Token, position and type vectors, summed and normalised; every token with its place. `key`: of dropout."""
        cfg, encoding = self.cfg, encoded(inputs)
        ids = encoding.ids
        types = jnp.zeros_like(ids) if encoding.types is None else encoding.types
        x = self.token_embed[...].at[ids].get(mode="clip") + self.type_embed[...].at[types].get(mode="clip")
        x = self.norm_embed(x + self.pos_embed[...][:, : ids.shape[1]]).astype(cfg.dtype)
        valid = ids != cfg.pad_id if encoding.valid is None else encoding.valid
        position = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        x = layers.dropout(x, self._drop(cfg, cfg.depth, key))
        return Tokens(x, position=position, valid=jnp.asarray(valid), prefix=1)

    def _drop(self, cfg: Any, layer: int | Array, key: Array | None) -> Drop | None:
        """The same rate everywhere."""
        return (self.cfg.dropout, layers.fold_in(key, layer)) if key is not None and self.cfg.dropout else None
