"""A vision transformer that hands its tokens to hooks, and knows no method.

Architecture: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with the options of its descendants
(DeiT's distillation token, registers, LayerScale, q/k norm, MAE's mean pooling), named as in timm's
`vision_transformer.py`.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Literal, get_args

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokjax import hooks as hk
from tokjax.models import layers
from tokjax.signals import AttentionRule, Context, Signals
from tokjax.tokens import Tokens

Pooling = Literal["cls", "mean", "size_mean"]
Gelu = Literal["exact", "tanh", "quick"]
Position = Literal["learned", "sincos"]
SITES = frozenset(get_args(hk.Where)) - {"before_llm", "after_prefill", "decode_step"}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides a ViT's parameters and numbers.

    Raises:
        ValueError: fields that do not fit together; the message names the field, its value and what is allowed.
    """

    image_size: tuple[int, int] = (224, 224)  # height, width in pixels
    patch_size: int = 16
    channels: int = 3
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0  # hidden width int(width * mlp_ratio)
    num_classes: int = 1000  # 0: no head, the pooled features come out
    class_token: bool = True
    distilled: bool = False  # DeiT's distillation token and second head; evaluation takes the mean of both heads
    registers: int = 0
    pooling: Pooling = "cls"
    norm_eps: float = 1e-6
    gelu: Gelu = "exact"
    layer_scale: float | None = None  # initial value; None: no LayerScale
    qk_norm: bool = False
    qkv_bias: bool = True
    patch_bias: bool = True
    position: Position = "learned"
    position_prefix: bool = True  # the position table has rows for CLS and DIST (registers never have one)
    pre_norm: bool = False  # CLIP's norm before the blocks
    fc_norm: bool = False  # a norm after pooling instead of before it
    drop_path: float = 0.0  # of the last block, rising linearly from 0
    dtype: str = "float32"  # of activations; parameters stay float32
    scan: bool = False  # blocks stored stacked, long equal runs scanned
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))
        for name in ("patch_size", "channels", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if len(self.image_size) != 2 or any(s < 1 or s % self.patch_size for s in self.image_size):
            raise ValueError(
                f"image_size={self.image_size}: must be (height, width), multiples of patch_size={self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads}: must divide width={self.width}")
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"width={self.width}: must be a multiple of 4 for position='sincos'")
        for name, kind in (("pooling", Pooling), ("gelu", Gelu), ("position", Position)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if self.pooling == "cls" and not self.class_token:
            raise ValueError("pooling='cls': needs class_token=True")
        if self.distilled and not self.class_token:
            raise ValueError("distilled=True: needs class_token=True")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: must be one of float32, bfloat16, float16")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: must be in [0, 1)")

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def prefix(self) -> int:
        """Leading tokens that are not patches: CLS, DIST, registers."""
        return self.class_token + self.distilled + self.registers

    @property
    def table_prefix(self) -> int:
        """Rows of the position table that are not patches."""
        return self.position_prefix * (self.class_token + self.distilled)

    @property
    def info(self) -> hk.ModelInfo:
        return hk.ModelInfo(
            self.depth,
            self.width,
            self.heads,
            self.prefix + self.num_patches,
            self.prefix,
            self.grid,
            self.pooling,
            SITES,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "ti": {"width": 192, "depth": 12, "heads": 3},
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
    "h": {"width": 1280, "depth": 32, "heads": 16},
}


def preset(name: str, **changes: Any) -> ViTConfig:
    """A config by its usual name, such as "s/16" or "h/14": size and patch side, then any fields to change.

    Raises:
        ValueError: an unknown size, or a patch side that is not a number.
    """
    size, _, patch = name.lower().partition("/")
    if size not in PRESETS or not patch.isdigit():
        raise ValueError(f"preset={name!r}: must be SIZE/PATCH with a size of {', '.join(PRESETS)}, such as 's/16'")
    return ViTConfig(**{**PRESETS[size], "patch_size": int(patch), **changes})


class LayerTrace(struct.PyTreeNode):
    """What one block did to the tokens."""

    origin: Int[Array, "B N0"]  # slot of every input token after the block, N if dropped
    size: Float[Array, "B N"] | None
    tokens: Int[Array, "B"]  # valid tokens that entered the MLP
    length: int = struct.field(pytree_node=False)  # their number with empty slots: what is paid for
    slots: int = struct.field(pytree_node=False)  # after the block; an origin of this many was dropped


class ViTOutput(struct.PyTreeNode):
    """`logits` is the pooled features where the model has no head."""

    logits: Float[Array, "B K"]
    head_logits: tuple[Float[Array, "B K"], ...]  # of each head: CLS, and DIST in distilled models
    pooled: Float[Array, "B C"]
    features: Float[Array, "B N C"]  # tokens after the final norm
    tokens: Tokens  # after the last block
    trace: tuple[LayerTrace, ...] | None


class Attention(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        c, d = cfg.width, cfg.width // cfg.heads
        self.heads, self.implementation = cfg.heads, cfg.attention
        self.qkv = layers.linear(c, 3 * c, bias=cfg.qkv_bias, dtype=cfg.dtype, rngs=rngs)
        self.proj = layers.linear(c, c, bias=True, dtype=cfg.dtype, rngs=rngs)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (layers.layer_norm(d, cfg.norm_eps, rngs) for _ in range(2))
        self.qk_norm = cfg.qk_norm

    def signals(self, x: Float[Array, "B N C"], tokens: Tokens, context: Context) -> Signals:
        b, n, c = x.shape
        d = c // self.heads
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.heads, d), 2, 0)
        if self.qk_norm:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        bias = tokens.attention_bias()
        bias = None if bias is None else bias[:, None, None]
        return Signals(q, k, v, bias, context=context, rule=AttentionRule(scale=d**-0.5))

    def __call__(self, signals: Signals) -> Float[Array, "B N C"]:
        out = layers.attention(signals, self.implementation)
        return self.proj(out.reshape(*out.shape[:2], -1))


class Block(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        c, eps = cfg.width, cfg.norm_eps
        self.norm1, self.norm2 = layers.layer_norm(c, eps, rngs), layers.layer_norm(c, eps, rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = layers.Mlp(c, int(c * cfg.mlp_ratio), cfg.gelu, dtype=cfg.dtype, rngs=rngs)
        self.scaled = cfg.layer_scale is not None
        if cfg.layer_scale is not None:
            self.ls1, self.ls2 = layers.LayerScale(c, cfg.layer_scale), layers.LayerScale(c, cfg.layer_scale)

    def __call__(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook] = (),
        layer: int = 0,
        context: Context | None = None,
        drop: tuple[float | Array, Array] | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Attention and MLP with their hooks; also the tokens as they entered the MLP. `drop`: rate, key."""
        outside = Signals(context=context or Context())
        tokens, _ = hk.reduce(hooks, "before_block", layer, tokens, outside)
        inside = [outside]  # the signals of this block's attention, once it has run on all tokens

        def attend(part: Tokens) -> Array:
            signals = self.attn.signals(part.x, part, outside.context)
            signals = hk.attend(hooks, layer, part, signals)
            if part.length == tokens.length:
                inside[0] = signals
            return self.attn(signals)

        def branch(where: hk.Where, tokens: Tokens, norm, run, scale: str, salt: int) -> Tokens:
            y, after = hk.around(hooks, where, layer, tokens.replace(x=norm(tokens.x)), outside, run)
            y = getattr(self, scale)(y) if self.scaled else y
            if drop is not None:
                y = layers.drop_path(y, drop[0], jax.random.fold_in(drop[1], salt))
            return after.replace(x=tokens.x + y)

        tokens = branch("around_attention", tokens, self.norm1, attend, "ls1", 0)
        tokens, signals = hk.reduce(hooks, "after_attention", layer, tokens, inside[0], then="after_block")
        entered = tokens
        tokens = branch("around_mlp", tokens, self.norm2, lambda part: self.mlp(part.x), "ls2", 1)
        return hk.reduce(hooks, "after_block", layer, tokens, signals)[0], entered


class ViT(nnx.Module):
    def __init__(self, cfg: ViTConfig, *, rngs: nnx.Rngs):
        c, normal = cfg.width, nnx.initializers.truncated_normal(0.02)
        self.cfg = cfg
        patch = cfg.patch_size**2 * cfg.channels
        init = nnx.initializers.lecun_normal()
        self.patch_embed = layers.linear(patch, c, bias=cfg.patch_bias, dtype=cfg.dtype, rngs=rngs, init=init)
        if cfg.class_token:
            self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, c)))
        if cfg.distilled:
            self.dist_token = nnx.Param(normal(rngs.params(), (1, 1, c)))
        if cfg.registers:
            self.reg_token = nnx.Param(normal(rngs.params(), (1, cfg.registers, c)))
        rows = cfg.table_prefix + cfg.num_patches
        if cfg.position == "sincos":
            table = np.pad(sincos(cfg.grid, c), ((cfg.table_prefix, 0), (0, 0)))[None]
            self.pos_embed = nnx.Param(jnp.asarray(table))
        else:
            self.pos_embed = nnx.Param(normal(rngs.params(), (1, rows, c)))
        if cfg.pre_norm:
            self.norm_pre = layers.layer_norm(c, cfg.norm_eps, rngs)
        blocks = [Block(cfg, rngs=rngs) for _ in range(cfg.depth)]
        self.blocks: Any = _stacked(blocks) if cfg.scan else nnx.List(blocks)
        if cfg.fc_norm:
            self.fc_norm = layers.layer_norm(c, cfg.norm_eps, rngs)
        else:
            self.norm = layers.layer_norm(c, cfg.norm_eps, rngs)
        if cfg.num_classes:
            zeros = nnx.initializers.zeros
            self.head = layers.linear(c, cfg.num_classes, bias=True, dtype=cfg.dtype, rngs=rngs, init=zeros)
            if cfg.distilled:
                self.head_dist = layers.linear(c, cfg.num_classes, bias=True, dtype=cfg.dtype, rngs=rngs, init=zeros)

    def __call__(
        self,
        images: Float[Array, "B height width channels"],
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
    ) -> ViTOutput:
        """Classifies normalised images.

        Args:
            images: any float dtype, already normalised.
            hooks: where reducers come in.
            key: PRNG key, for stochastic depth and for reducers that draw.
            train: whether stochastic depth is on.
            trace: whether to follow every input token through all blocks.

        Raises:
            ValueError: images of another size, or hooks that this model would never call.
        """
        expected = (*self.cfg.image_size, self.cfg.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images has shape {images.shape}: must be (batch, {', '.join(map(str, expected))})")
        hk.check(hooks, self.cfg.info)
        tokens = self.embed(images)
        context = Context(grid=self.cfg.grid, key=key)
        return self.encode(tokens.traced() if trace else tokens, hooks, context, key=key if train else None)

    def embed(self, images: Float[Array, "B height width channels"]) -> Tokens:
        """Patches, with prefix tokens and positions, as tokens."""
        cfg = self.cfg
        (h, w), p, b = cfg.grid, cfg.patch_size, images.shape[0]
        patches = images.reshape(b, h, p, w, p, cfg.channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embed(patches.reshape(b, h * w, -1).astype(cfg.dtype))
        table = self.pos_embed[...].astype(x.dtype)
        first = [getattr(self, name)[...] for name in ("cls_token", "dist_token") if hasattr(self, name)]
        behind = [self.reg_token[...]] if cfg.registers else []

        def put_before(parts, x):
            parts = [jnp.broadcast_to(part.astype(x.dtype), (b, *part.shape[1:])) for part in parts]
            return jnp.concatenate([*parts, x], 1)

        if cfg.position_prefix:
            x = put_before(first, x) + table
            n = len(first)
            x = jnp.concatenate([x[:, :n], put_before(behind, x[:, n:])], 1) if behind else x
        else:
            x = put_before([*first, *behind], x + table)
        if cfg.pre_norm:
            x = self.norm_pre(x).astype(x.dtype)
        return Tokens(x, prefix=cfg.prefix)

    def encode(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook] = (),
        context: Context | None = None,
        *,
        key: Array | None = None,
    ) -> ViTOutput:
        """Runs blocks and head on embedded tokens; traces if `tokens.origin` is filled. `key`: stochastic depth."""
        context = context or Context(grid=self.cfg.grid)
        tokens, _ = hk.reduce(hooks, "input", 0, tokens, Signals(context=context))
        readout = hk.at(hooks, "readout", 0)
        states, traces = [], []
        for first, last, block in self._runs(hooks, whole=not readout and tokens.origin is None):
            if block is None:
                tokens = self._scan(tokens, first, last, context, key)
                continue
            tokens, entered = block(tokens, hooks, first, context, self._drop(first, key))
            if readout:
                states.append(tokens)
            if tokens.origin is not None:
                traces.append(LayerTrace(tokens.origin, tokens.size, entered.count(), entered.length, tokens.length))
        pooled = readout[0](tuple(states)) if readout else None
        return self._head(tokens, pooled, tuple(traces) if tokens.origin is not None else None)

    def _drop(self, layer, key):
        if key is None or not self.cfg.drop_path:
            return None
        rate = self.cfg.drop_path * layer / max(self.cfg.depth - 1, 1)
        return rate, jax.random.fold_in(key, layer)

    def _runs(self, hooks: Sequence[hk.Hook], whole: bool):
        """(first, last, block) in order; a run of at least four hook-free stacked blocks has None for the block."""
        hooked = {hook.layer for hook in hooks if hook.where not in ("input", "readout")}
        first, depth = 0, self.cfg.depth
        while first < depth:
            last = first + 1
            if self.cfg.scan and whole and first not in hooked:
                while last < depth and last not in hooked:
                    last += 1
            if last - first >= 4:
                yield first, last, None
            else:
                for layer in range(first, last):
                    yield layer, layer + 1, self._block(layer)
            first = last

    def _block(self, layer: int) -> Block:
        if not self.cfg.scan:
            return self.blocks[layer]
        graphdef, state = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))

    def _scan(self, tokens: Tokens, first: int, last: int, context: Context, key) -> Tokens:
        graphdef, state = nnx.split(self.blocks)
        params = jax.tree.map(lambda leaf: leaf[first:last], state)

        def body(tokens, step):
            layer, params = step
            tokens, _ = nnx.merge(graphdef, params)(tokens, context=context, drop=self._drop(layer, key))
            return tokens, None

        return jax.lax.scan(body, tokens, (jnp.arange(first, last), params))[0]

    def _head(self, tokens: Tokens, pooled: Array | None, trace) -> ViTOutput:
        cfg = self.cfg
        features = tokens.x if cfg.fc_norm else self.norm(tokens.x).astype(tokens.x.dtype)
        if pooled is None:
            pooled = layers.pool(tokens.replace(x=features), cfg.pooling)
        if cfg.fc_norm:
            pooled = self.fc_norm(pooled).astype(tokens.x.dtype)
        heads: tuple[Array, ...] = ()
        if cfg.num_classes:
            heads = (self.head(pooled).astype(jnp.float32),)
        if cfg.num_classes and cfg.distilled:
            heads += (self.head_dist(features[:, 1]).astype(jnp.float32),)
        logits = sum(heads[1:], heads[0]) / len(heads) if heads else pooled
        return ViTOutput(logits, heads, pooled, features, tokens, trace)


def sincos(grid: tuple[int, int], width: int) -> Float[np.ndarray, "P C"]:
    """Fixed 2-D sine-cosine positions (MAE, He et al. 2022, `util/pos_embed.py`): column half, then row half."""
    frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(math.prod(grid)), grid[1])

    def half(position):
        angle = position[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    return np.concatenate([half(columns), half(rows)], 1).astype(np.float32)


def _stacked(blocks: list[Block]) -> Block:
    """Equal blocks as one, whose parameters have a leading L axis."""
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
