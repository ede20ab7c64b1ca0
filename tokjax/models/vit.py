"""A vision transformer that hands its tokens to hooks, and knows no method.

Architecture: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with the options of its descendants
(DeiT's distillation token, registers, LayerScale, q/k norm, MAE's mean pooling, CLIP's early norm, SigLIP's attention
pooling, DINOv3's rotary positions, SigLIP2's images of any aspect), named as in timm's `vision_transformer.py`.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Literal, get_args

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from tokjax import hooks as hk
from tokjax.models import layers
from tokjax.models.transformer import SITES, Blocks, Gelu, MlpKind, Output, Ran, check_blocks, mlp_macs
from tokjax.signals import Context
from tokjax.tokens import Tokens

Pooling = Literal["cls", "mean", "size_mean", "cls_mean", "map"]
Position = Literal["learned", "sincos", "rope", "naflex"]


class Patches(struct.PyTreeNode):
    """Images of any size and aspect, cut and padded to one number of patches: the input of SigLIP2's NaFlex models.

    Raises:
        ValueError: `check` does, at shapes that do not belong together.
    """

    patches: Float[Array, "B N P"]  # patch * patch * channels values each, in (row, column, channel) order
    valid: Bool[Array, "B N"]  # the first shape[0] * shape[1] of every row
    shape: Int[Array, "B 2"]  # patches down and across

    @classmethod
    def of(cls, images: Float[Array, "B height width channels"], patch_size: int) -> "Patches":
        """Images of one size, cut; pixels beyond whole patches are left out. Without padding."""
        b, height, width, channels = images.shape
        h, w, p = height // patch_size, width // patch_size, patch_size
        cut = images[:, : h * p, : w * p].reshape(b, h, p, w, p, channels).transpose(0, 1, 3, 2, 4, 5)
        shape = jnp.broadcast_to(jnp.array([h, w], jnp.int32), (b, 2))
        return cls(cut.reshape(b, h * w, -1), jnp.ones((b, h * w), bool), shape)

    def check(self, width: int) -> None:
        """`width`: values of a patch."""
        b, n = self.patches.shape[:2]
        if self.patches.ndim != 3 or self.patches.shape[2] != width:
            raise ValueError(f"patches has shape {self.patches.shape}: must be (batch, patches, {width})")
        if self.valid.shape != (b, n) or self.shape.shape != (b, 2):
            raise ValueError(
                f"valid has shape {self.valid.shape}, shape has {self.shape.shape}: must be {(b, n)} and {(b, 2)}"
            )


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides a ViT's parameters and numbers.

    Raises:
        ValueError: fields that do not fit together; the message names the field, its value and what is allowed.
    """

    image_size: tuple[int, int] = (224, 224)  # height, width in pixels; those beyond whole patches are not looked at
    patch_size: int = 16
    channels: int = 3
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0  # hidden width int(width * mlp_ratio)
    mlp: MlpKind = "plain"  # "swiglu": silu of one half of fc1 times the other (DINOv2 giant, DINOv3 S+, H+, 7B)
    num_classes: int = 1000  # 0: no head, the pooled features come out
    head_bias: bool = True  # CLIP's projection has none
    class_token: bool = True
    distilled: bool = False  # DeiT's distillation token and second head; evaluation takes the mean of both heads
    registers: int = 0
    pooling: Pooling = "cls"  # cls_mean: CLS beside the mean weighted by size, twice the width (DINOv2's classifiers)
    norm_eps: float = 1e-6
    gelu: Gelu = "exact"
    layer_scale: float | None = None  # initial value; None: no LayerScale
    qk_norm: bool = False
    qkv_bias: bool = True
    key_bias: bool = True  # False: queries and values alone have a bias (DINOv3)
    patch_bias: bool = True
    position: Position = "learned"  # rope: 2-D rotary, no table; naflex: a square table, resized for every image
    rope_base: float = 100.0  # of position="rope"
    position_prefix: bool = True  # the position table has rows for CLS and DIST (registers never have one)
    pre_norm: bool = False  # CLIP's norm before the blocks
    fc_norm: bool = False  # a norm after pooling instead of before it
    drop_path: float = 0.0  # of the last block, rising linearly from 0
    dtype: str = "float32"  # of activations; parameters stay float32
    scan: bool = False  # blocks stored stacked, long equal runs scanned
    attention: Literal["xla", "cudnn"] = "xla"

    def __post_init__(self):
        object.__setattr__(self, "image_size", tuple(self.image_size))
        for name in ("patch_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if len(self.image_size) != 2 or min(self.image_size) < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size}: must be (height, width), at least patch_size={self.patch_size} each"
            )
        check_blocks(self)
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"width={self.width}: must be a multiple of 4 for position='sincos'")
        if self.position == "rope" and self.width // self.heads % 4:
            raise ValueError(f"heads={self.heads}: must leave a multiple of 4 channels each for position='rope'")
        if self.position == "naflex" and (self.prefix or self.grid[0] != self.grid[1]):
            raise ValueError("position='naflex': needs a square image_size and no class_token, distilled or registers")
        for name, kind in (("pooling", Pooling), ("position", Position)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if self.pooling in ("cls", "cls_mean") and not self.class_token:
            raise ValueError(f"pooling={self.pooling!r}: needs class_token=True")
        if self.pooling == "cls_mean" and self.fc_norm:
            raise ValueError("pooling='cls_mean': needs fc_norm=False")
        if self.distilled and not self.class_token:
            raise ValueError("distilled=True: needs class_token=True")

    causal = False  # of the blocks' attention

    @property
    def rope(self) -> float | None:
        """Base of the rotary frequencies, None without them."""
        return self.rope_base if self.position == "rope" else None

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
    def pooled_width(self) -> int:
        """Channels of the pooled features, which the head reads."""
        return self.width * (1 + (self.pooling == "cls_mean"))

    @property
    def info(self) -> hk.ModelInfo:
        return hk.ModelInfo(
            self.depth,
            self.width,
            self.heads,
            self.prefix + self.num_patches,
            self.prefix,
            None if self.position == "naflex" else self.grid,
            self.pooling,
            SITES,
            self.num_classes,
            self.patch_size**2 * self.channels,
            mlp_macs(self),
        )

    def example(self, batch: int) -> Any:
        """Shapes and types of the input, for tracing."""
        if self.position != "naflex":
            return jax.ShapeDtypeStruct((batch, *self.image_size, self.channels), jnp.float32)
        n, width = self.num_patches, self.patch_size**2 * self.channels
        shapes: Any = ((batch, n, width), jnp.float32), ((batch, n), jnp.bool_), ((batch, 2), jnp.int32)
        return Patches(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))  # type: ignore[arg-type]

    def check(self, images: Any) -> None:
        """Refuses inputs of another shape; nothing is computed.

        Raises:
            ValueError: names the shape and the one that is allowed.
        """
        if self.position == "naflex":
            if not isinstance(images, Patches):
                raise ValueError(f"images is {type(images).__name__}: a naflex model takes Patches, see its preprocess")
            return images.check(self.patch_size**2 * self.channels)
        expected = (*self.image_size, self.channels)
        shape = getattr(images, "shape", None)
        if not isinstance(shape, tuple) or len(shape) != 4 or shape[1:] != expected:
            raise ValueError(f"images has shape {shape}: must be (batch, {', '.join(map(str, expected))})")
        return None


PRESETS: dict[str, dict[str, Any]] = {
    "ti": {"width": 192, "depth": 12, "heads": 3},
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
    "so400m": {"width": 1152, "depth": 27, "heads": 16, "mlp_ratio": 4304 / 1152},
    "h": {"width": 1280, "depth": 32, "heads": 16},
    "g": {"width": 1536, "depth": 40, "heads": 24, "mlp_ratio": 4096 / 1536, "mlp": "swiglu"},
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


class ViT(Blocks):
    """An encoder of images as `cfg` describes it, with or without a head.

    Attributes:
        patch_embed: patches to tokens; `cls_token`, `dist_token` and `reg_token` are put before them, where `cfg` has
            them, and `pos_embed` is added, unless positions are rotary.
        blocks: the transformer, in a list or stacked (`cfg.scan`).
        norm: before pooling; with `cfg.fc_norm` there is `fc_norm` behind it instead.
        head: on what was pooled; `head_dist` on the distillation token.
    """

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
        elif cfg.position != "rope":
            self.pos_embed = nnx.Param(normal(rngs.params(), (1, rows, c)))
        if cfg.pre_norm:
            self.norm_pre = layers.layer_norm(c, cfg.norm_eps, rngs)
        self._make_blocks(cfg, rngs)
        if cfg.fc_norm:
            self.fc_norm = layers.layer_norm(c, cfg.norm_eps, rngs)
        else:
            self.norm = layers.layer_norm(c, cfg.norm_eps, rngs)
        if cfg.pooling == "map":
            self.attn_pool = layers.AttentionPool(cfg, rngs=rngs)
        if cfg.num_classes:

            def head(width: int) -> nnx.Linear:
                zeros = nnx.initializers.zeros
                return layers.linear(width, cfg.num_classes, bias=cfg.head_bias, dtype=cfg.dtype, rngs=rngs, init=zeros)

            self.head = head(cfg.pooled_width)
            if cfg.distilled:
                self.head_dist = head(c)

    def __call__(
        self,
        images: Float[Array, "B height width channels"] | Patches,
        hooks: Sequence[hk.Hook] = (),
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> Output:
        """Encodes and classifies normalised images.

        Args:
            images: any float dtype, already normalised; `Patches` for a naflex model.
            hooks: where reducers come in.
            key: PRNG key, for stochastic depth and for reducers that draw.
            train: whether stochastic depth is on.
            trace: whether to follow every input token through all blocks.
            states: whether to give the tokens after every block.
            context: what reducers shall know beside; its grid and key are the call's own.

        Raises:
            ValueError: images of another size, or hooks that this model would never call.
        """
        self.cfg.check(images)
        hk.check(hooks, self.cfg.info)
        tokens = self.embed(images)
        context = (context or Context()).replace(grid=self.cfg.info.grid, key=key)
        tokens = tokens.traced() if trace else tokens
        return self.encode(tokens, hooks, context, key=key if train else None, states=states)

    def embed(self, images: Float[Array, "B height width channels"] | Patches) -> Tokens:
        """Patches, with prefix tokens and positions, as tokens.

        With rotary and flexible positions, `position [B,N,2]` holds the row and column of every patch; with rotary ones
        -1 for prefix tokens, which are not rotated. A merged token is rotated as its anchor; one that is made of many
        without an anchor (a fused token) has -1, as CLS.
        """
        cfg = self.cfg
        if isinstance(images, Patches):
            x = self.patch_embed(images.patches.astype(cfg.dtype))
            table = self.pos_embed[...].reshape(*cfg.grid, cfg.width)
            index, across = jnp.arange(x.shape[1]), jnp.maximum(images.shape[:, 1:], 1)
            place = jnp.stack([index // across, index % across], -1).astype(jnp.int32)
            return Tokens(x + flexible_positions(table, images).astype(x.dtype), position=place, valid=images.valid)
        b = images.shape[0]
        x = self.patch_embed(Patches.of(images, cfg.patch_size).patches.astype(cfg.dtype))
        first = [getattr(self, name)[...] for name in ("cls_token", "dist_token") if hasattr(self, name)]
        behind = [self.reg_token[...]] if cfg.registers else []

        def put_before(parts, x):
            parts = [jnp.broadcast_to(part.astype(x.dtype), (b, *part.shape[1:])) for part in parts]
            return jnp.concatenate([*parts, x], 1)

        if cfg.position == "rope":
            x = put_before([*first, *behind], x)
        elif cfg.position_prefix:
            x = put_before(first, x) + self.pos_embed[...].astype(x.dtype)
            n = len(first)
            x = jnp.concatenate([x[:, :n], put_before(behind, x[:, n:])], 1) if behind else x
        else:
            x = put_before([*first, *behind], x + self.pos_embed[...].astype(x.dtype))
        if cfg.pre_norm:
            x = self.norm_pre(x).astype(x.dtype)
        return Tokens(x, position=self._positions(b) if cfg.position == "rope" else None, prefix=cfg.prefix)

    def _positions(self, batch: int) -> Int[Array, "B N 2"]:
        cfg = self.cfg
        patches = np.stack(np.divmod(np.arange(cfg.num_patches), cfg.grid[1]), -1)
        every = np.concatenate([np.full((cfg.prefix, 2), -1), patches]).astype(np.int32)
        return jnp.broadcast_to(every, (batch, *every.shape))

    def encode(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook] = (),
        context: Context | None = None,
        *,
        key: Array | None = None,
        states: bool = False,
    ) -> Output:
        """Runs blocks and head on embedded tokens; traces if `tokens.origin` is filled. `key`: stochastic depth."""
        ran = self._run(self.cfg, tokens, hooks, context or Context(grid=self.cfg.info.grid), key, states)
        return self.readout(ran)

    def stretch(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook],
        context: Context,
        span: tuple[int, int],
        opening: bool = False,
    ) -> Tokens:
        """Runs some blocks only, for programs that are cut where the number of tokens is looked at.

        `opening`: these are the tokens of the input, which makes no difference here.
        """
        return self._run(self.cfg, tokens, hooks, context, span=span).tokens

    def start(self, images: Float[Array, "B height width channels"] | Patches) -> Tokens:
        """What the first stretch runs on."""
        return self.embed(images)

    def finish(self, tokens: Tokens, inputs: Any, hooks: Sequence[hk.Hook], context: Context) -> Float[Array, "B K"]:
        """Logits of what the last stretch left of these inputs."""
        return self.readout(Ran(tokens, None, None, None)).logits

    def readout(self, ran: Ran) -> Output:
        """Final norm, pooling and head on what the blocks left.

        Raises:
            ValueError: a `readout` hook gave features of another width than the head reads.
        """
        cfg, tokens, pooled = self.cfg, ran.tokens, ran.pooled
        features = tokens.x if cfg.fc_norm else self.norm(tokens.x).astype(tokens.x.dtype)
        if pooled is None:
            last = tokens.replace(x=features)
            pooled = self.attn_pool(last) if cfg.pooling == "map" else layers.pool(last, cfg.pooling)
        elif cfg.num_classes and pooled.shape[1:] != (cfg.pooled_width,):
            raise ValueError(
                f"a readout hook gave features of shape {pooled.shape}: must be (batch, {cfg.pooled_width}), the head "
                f"reads for pooling={cfg.pooling!r}"
            )
        if cfg.fc_norm:
            pooled = self.fc_norm(pooled).astype(tokens.x.dtype)
        heads: tuple[Array, ...] = ()
        if cfg.num_classes:
            heads = (self.head(pooled).astype(jnp.float32),)
        if cfg.num_classes and cfg.distilled:
            heads += (self.head_dist(features[:, 1]).astype(jnp.float32),)
        if ran.logits is not None:
            heads = (ran.logits.astype(jnp.float32),)
        logits = sum(heads[1:], heads[0]) / len(heads) if heads else pooled
        return Output(logits, heads, pooled, features, tokens, ran.trace, ran.states)


def flexible_positions(table: Float[Array, "h w C"], images: Patches) -> Float[Array, "B N C"]:
    """The position table resized to the grid of every image: bilinear, anti-aliased (transformers `siglip2`).

    As a product of the weights of rows and of columns, so that grids of any aspect run in one program. Padding gets
    the vector of the first patch.
    """
    n = images.patches.shape[1]
    index, valid = jnp.arange(n), images.valid
    down, across = jnp.maximum(images.shape, 1).astype(jnp.int32).T
    row, column = index // across[:, None], index % across[:, None]

    def weights(old: int, new: Int[Array, "B"], place: Int[Array, "B N"]) -> Float[Array, "B N old"]:
        scale = old / new[:, None].astype(jnp.float32)
        centre = (jnp.where(valid, place, 0) + 0.5) * scale - 0.5
        wide = jnp.maximum(scale, 1.0)[..., None]
        weight = jnp.maximum(1 - jnp.abs(jnp.arange(old) - centre[..., None]) / wide, 0)
        return weight / weight.sum(-1, keepdims=True)

    rows, columns = weights(table.shape[0], down, row), weights(table.shape[1], across, column)
    pairs = (rows[..., :, None] * columns[..., None, :]).reshape(*rows.shape[:2], -1)
    return jnp.einsum("bnk,kc->bnc", pairs, table.astype(jnp.float32).reshape(-1, table.shape[-1]), precision="highest")


def sincos(grid: tuple[int, int], width: int) -> Float[np.ndarray, "P C"]:
    """Fixed 2-D sine-cosine positions (MAE, He et al. 2022, `util/pos_embed.py`): column half, then row half."""
    frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(math.prod(grid)), grid[1])

    def half(position):
        angle = position[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    return np.concatenate([half(columns), half(rows)], 1).astype(np.float32)
