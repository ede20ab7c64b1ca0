"""Text encoders of image-text models: CLIP's causal one and SigLIP's bidirectional one.

Sources: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021
(openai/CLIP, `clip/model.py`); Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar, Literal, get_args

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from tokjax import hooks as hk
from tokjax.models import layers
from tokjax.models.transformer import SITES, Blocks, Gelu, MlpKind, Output, check_blocks, mlp_macs
from tokjax.signals import Context
from tokjax.token_map import rows
from tokjax.tokens import Tokens

Pooling = Literal["eos", "last"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Everything that decides a text encoder's parameters and numbers.

    Raises:
        ValueError: fields that do not fit together; the message names the field, its value and what is allowed.
    """

    vocab_size: int = 49408
    length: int = 77  # tokens of a text, padding included
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    causal: bool = True
    pooling: Pooling = "eos"  # the token that is the text's feature; last: the last one, padding included (SigLIP)
    eos_id: int | None = None  # pooling "eos" takes the first of these; None: the largest id (OpenAI's rule)
    norm_eps: float = 1e-5
    gelu: Gelu = "quick"
    embed_dim: int = 512  # of the projection; 0: none
    head_bias: bool = False
    drop_path: float = 0.0
    dtype: str = "float32"  # of activations; parameters stay float32
    scan: bool = False  # blocks stored stacked, long equal runs scanned
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self):
        for name in ("vocab_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        check_blocks(self)
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling={self.pooling!r}: must be one of {', '.join(get_args(Pooling))}")
        if self.eos_id is not None and not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(f"eos_id={self.eos_id}: must be in [0, {self.vocab_size})")

    # What these encoders do not vary.
    mlp: ClassVar[MlpKind] = "plain"
    layer_scale: ClassVar[None] = None
    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = True
    key_bias: ClassVar[bool] = True
    rope: ClassVar[None] = None

    @property
    def info(self) -> hk.ModelInfo:
        """The pooled token counts as the one protected token, see `Text`."""
        return hk.ModelInfo(self.depth, self.width, self.heads, self.length, 1, None, "cls", SITES, mlp=mlp_macs(self))

    def example(self, batch: int) -> Any:
        """Shape and type of the input, for tracing."""
        return jax.ShapeDtypeStruct((batch, self.length), jnp.int32)

    def check(self, ids: Any) -> None:
        """Refuses ids of another shape or type, and (where they can be looked at) outside of the vocabulary.

        Raises:
            ValueError: names what is wrong and what is allowed.
        """
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", None)
        if not isinstance(shape, tuple) or len(shape) != 2 or not 1 <= shape[1] <= self.length:
            raise ValueError(f"ids has shape {shape}: must be (batch, at most {self.length} tokens)")
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"ids has type {dtype}: must be an integer type")
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids lie in {ids.min()}..{ids.max()}: must be in [0, {self.vocab_size})")


class Text(Blocks):
    """A text encoder whose feature is one of its tokens.

    Under reduction that token moves to the front, where the encoder's reducers may not touch it (it serves them as CLS
    does in a ViT), and every token keeps its place in the text as `position`, by which the causal mask goes; a merged
    token has its anchor's. What stands behind the feature's token in a causal text cannot reach it and is not valid.
    """

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        c, normal = cfg.width, nnx.initializers.normal
        self.token_embed = nnx.Param(normal(0.02)(rngs.params(), (cfg.vocab_size, c)))
        self.pos_embed = nnx.Param(normal(0.01)(rngs.params(), (1, cfg.length, c)))
        self._make_blocks(cfg, rngs)
        self.norm = layers.layer_norm(c, cfg.norm_eps, rngs)
        if cfg.embed_dim:
            init = normal(c**-0.5)
            self.head = layers.linear(c, cfg.embed_dim, bias=cfg.head_bias, dtype=cfg.dtype, rngs=rngs, init=init)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> Output:
        """Encodes texts, padded to one length.

        Args:
            ids: token ids; those outside of the vocabulary count as its nearest end under jit.
            hooks: where reducers come in.
            key: PRNG key, for stochastic depth and for reducers that draw.
            train: whether stochastic depth is on.
            trace: whether to follow every token; with it or with hooks, the feature's token comes first.
            states: whether to give the tokens after every block.
            context: what reducers shall know beside; its key is the call's own.

        Returns:
            `logits` [B, E] is the projected feature, not normalised.

        Raises:
            ValueError: ids of another shape, or hooks that this model would never call.
        """
        cfg = self.cfg
        cfg.check(ids)
        hk.check(hooks, cfg.info)
        tokens, at = self.embed(ids), self._pooled(ids)
        if hooks or trace:
            tokens, at = self._front(tokens, at), jnp.zeros_like(at)
        tokens = tokens.traced() if trace else tokens
        context = (context or Context()).replace(key=key)
        ran = self._run(cfg, tokens, hooks, context, key if train else None, states)
        features = self.norm(ran.tokens.x).astype(ran.tokens.x.dtype)
        pooled = rows(features, at[:, None])[:, 0] if ran.pooled is None else ran.pooled
        heads = (self.head(pooled).astype(jnp.float32),) if cfg.embed_dim else ()
        return Output(heads[0] if heads else pooled, heads, pooled, features, ran.tokens, ran.trace, ran.states)

    def embed(self, ids: Int[Array, "B T"]) -> Tokens:
        """Token and position vectors."""
        x = self.token_embed[...].at[ids].get(mode="clip") + self.pos_embed[...][:, : ids.shape[1]]
        return Tokens(x.astype(self.cfg.dtype))

    def _pooled(self, ids: Int[Array, "B T"]) -> Int[Array, "B"]:
        """The place of the token whose feature is the text's; without an end the first one (as in transformers)."""
        if self.cfg.pooling == "last":
            return jnp.full(ids.shape[0], ids.shape[1] - 1)
        return jnp.argmax(ids if self.cfg.eos_id is None else ids == self.cfg.eos_id, 1)

    def _front(self, tokens: Tokens, at: Int[Array, "B"]) -> Tokens:
        every = jnp.arange(tokens.length)
        others = every[None, : tokens.length - 1]
        order = jnp.concatenate([at[:, None], others + (others >= at[:, None])], 1).astype(jnp.int32)
        valid = order <= at[:, None] if self.cfg.causal else None
        return tokens.replace(x=rows(tokens.x, order), position=order, valid=valid, prefix=1)
