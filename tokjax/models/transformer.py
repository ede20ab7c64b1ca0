"""Transformer blocks with hooks, and the stack of them that the encoders share. No block knows a method."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol, get_args

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import hooks as hk
from tokjax.models import layers
from tokjax.signals import AttentionRule, Context, Queries, Signals, select
from tokjax.tokens import MASKED, Tokens

Gelu = Literal["exact", "tanh", "quick"]
MlpKind = Literal["plain", "swiglu"]
SITES = frozenset(get_args(hk.Where)) - hk.CROSS - {"before_llm", "after_prefill", "decode_step", "depth"}
Drop = tuple[float | Array, Array]  # a rate, and one key or one a row


class StackConfig(Protocol):
    """The fields of a config that a stack of blocks reads, whatever its blocks are."""

    @property
    def depth(self) -> int: ...
    @property
    def drop_path(self) -> float: ...
    @property
    def scan(self) -> bool: ...


class BlockConfig(StackConfig, Protocol):
    """The fields of a model's config that its blocks read."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def mlp(self) -> MlpKind: ...
    @property
    def gelu(self) -> Gelu: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def layer_scale(self) -> float | None: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def key_bias(self) -> bool: ...
    @property
    def causal(self) -> bool: ...
    @property
    def rope(self) -> float | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def attention(self) -> Literal["xla", "cudnn"]: ...


class LayerTrace(struct.PyTreeNode):
    """What one block did to the tokens."""

    origin: Int[Array, "B N0"]  # slot of every input token after the block, N if dropped
    size: Float[Array, "B N"] | None
    tokens: Int[Array, "B"]  # valid tokens that entered the MLP
    length: int = struct.field(pytree_node=False)  # their number with empty slots: what is paid for
    slots: int = struct.field(pytree_node=False)  # after the block; an origin of this many was dropped


class Output(struct.PyTreeNode):
    """What an encoder gives. `logits` is the pooled features where the model has no head."""

    logits: Float[Array, "B K"]
    head_logits: tuple[Float[Array, "B K"], ...]  # of each head: CLS, and DIST in distilled models
    pooled: Float[Array, "B C"]  # 2C with pooling="cls_mean"
    features: Float[Array, "B N C"]  # tokens after the final norm
    tokens: Tokens  # after the last block
    trace: tuple[LayerTrace, ...] | None
    states: tuple[Tokens, ...] | None = None  # after every block, where they were asked for


class Attention(nnx.Module):
    """Self-attention in two steps, so that hooks may look at and change what lies between them.

    `signals` makes queries, keys and values with the biases of the tokens that travel; the call attends as the signals'
    rule says and projects.
    """

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        c, d = cfg.width, cfg.width // cfg.heads
        self.heads, self.implementation, self.causal, self.rope = cfg.heads, cfg.attention, cfg.causal, cfg.rope
        whole = cfg.qkv_bias and cfg.key_bias
        self.qkv = layers.linear(c, 3 * c, bias=whole, dtype=cfg.dtype, rngs=rngs)
        self.keyless = cfg.qkv_bias and not cfg.key_bias
        if self.keyless:
            self.qv_bias = nnx.Param(jnp.zeros(2 * c, jnp.float32))
        self.proj = layers.linear(c, c, bias=True, dtype=cfg.dtype, rngs=rngs)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = (layers.layer_norm(d, cfg.norm_eps, rngs) for _ in range(2))
        self.qk_norm = cfg.qk_norm

    def signals(self, x: Float[Array, "B N C"], tokens: Tokens, context: Context) -> Signals:
        """What attention works on.

        Args:
            x: normalised features of the tokens.
            tokens: their sizes, positions, masks and gates.
            context: what lies outside of the block.
        """
        bias = None
        if self.keyless:
            q_bias, v_bias = jnp.split(self.qv_bias[...], 2)
            bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        q, k, v = layers.by_heads(self.qkv, x, 3, self.heads, bias)
        if self.qk_norm:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        if self.rope is not None:
            assert tokens.position is not None and context.grid is not None
            q, k = layers.rope_2d((q, k), tokens.position, context.grid, self.rope)
        on_keys = tokens.attention_bias()
        on_keys = None if on_keys is None else on_keys[:, None, None]
        # By true position where there is one: reducers may change the order.
        ordered = self.causal and tokens.position is not None
        pairs = pair_mask(tokens.position if ordered else None, tokens.segment)
        rule = AttentionRule(scale=q.shape[-1] ** -0.5, causal=self.causal and not ordered)
        return Signals(q, k, v, on_keys, context=context, rule=rule, pair_bias=pairs)

    def __call__(self, signals: Signals) -> Float[Array, "B N C"]:
        out = layers.attention(signals, self.implementation)
        return self.proj(out.reshape(*out.shape[:2], -1))


def pair_mask(
    position: Int[Array, "B N"] | None, segment: Int[Array, "B N"] | None
) -> Callable[[Queries], Float[Array, "B 1 Q N"]] | None:
    """The causal mask of tokens that do not stand in order, and that of rows which hold several sequences."""
    if position is None and segment is None:
        return None

    def bias(queries: Queries) -> Array:
        seen = jnp.bool_(True)
        if position is not None:
            seen = select(position, queries, 1)[..., None] >= position[:, None]
        if segment is not None:
            seen &= select(segment, queries, 1)[..., None] == segment[:, None]
        return jnp.where(seen, 0.0, MASKED)[:, None]

    return bias


class Block(nnx.Module):
    """A pre-norm transformer block: attention, then MLP, each on a residual branch, with the sites for hooks."""

    norm1: Any
    norm2: Any
    attn: Any
    mlp: Any

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        c, eps = cfg.width, cfg.norm_eps
        self.norm1, self.norm2 = layers.layer_norm(c, eps, rngs), layers.layer_norm(c, eps, rngs)
        self.attn = Attention(cfg, rngs=rngs)
        activation = "swiglu" if cfg.mlp == "swiglu" else cfg.gelu
        self.mlp = layers.Mlp(c, int(c * cfg.mlp_ratio), activation, dtype=cfg.dtype, rngs=rngs)
        self.scaled = cfg.layer_scale is not None
        if cfg.layer_scale is not None:
            self.ls1, self.ls2 = layers.LayerScale(c, cfg.layer_scale), layers.LayerScale(c, cfg.layer_scale)

    def __call__(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook] = (),
        layer: int = 0,
        context: Context | None = None,
        drop: Drop | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Attention and MLP with their hooks; also the tokens that the MLP ran on."""
        return self.run(tokens, hooks, layer, context, drop)[:2]

    def run(
        self,
        tokens: Tokens,
        hooks: Sequence[hk.Hook] = (),
        layer: int = 0,
        context: Context | None = None,
        drop: Drop | None = None,
    ) -> tuple[Tokens, Tokens, tuple[Tokens, Signals]]:
        """The same, and what the attention ran on: its tokens and their signals."""
        outside = Signals(context=context or Context())
        tokens, _ = hk.reduce(hooks, "before_block", layer, tokens, outside)
        inside = [outside]  # the signals of this block's attention, once it has run on all tokens
        attended: list[tuple[Tokens, Signals]] = []

        def attend(part: Tokens) -> Array:
            signals = self.attn.signals(part.x, part, outside.context)
            signals = hk.attend(hooks, layer, part, signals)
            attended.append((part, signals))
            if part.length == tokens.length:
                inside[0] = signals
            return self._attend(signals, drop)

        def branch(where: hk.Where, tokens: Tokens, norm, run, scale: str, salt: int) -> Tokens:
            y, after = hk.around(hooks, where, layer, tokens.replace(x=self._enter(norm, tokens.x)), outside, run)
            y = getattr(self, scale)(y) if self.scaled else y
            y = y if drop is None else self._dropped(y, (drop[0], layers.fold_in(drop[1], salt)))
            return after.replace(x=self._leave(norm, tokens.x + y))

        tokens = branch("around_attention", tokens, self.norm1, attend, "ls1", 0)
        tokens, signals = hk.reduce(hooks, "after_attention", layer, tokens, inside[0], then="after_block")
        tokens = self._between(tokens, hooks, layer, outside.context, drop, branch)
        entered: list[Tokens] = []

        def mlp(part: Tokens) -> Array:
            entered.append(part)
            return self._feed(part.x, drop)

        tokens = branch("around_mlp", tokens, self.norm2, mlp, "ls2", 1)
        return hk.reduce(hooks, "after_block", layer, tokens, signals)[0], entered[0], attended[0]

    # What blocks of other kinds do in another way.

    def _enter(self, norm, x: Array) -> Array:
        """What a branch runs on."""
        return norm(x)

    def _leave(self, norm, x: Array) -> Array:
        """The residual stream with a branch added."""
        return x

    def _attend(self, signals: Signals, drop: Drop | None) -> Array:
        return self.attn(signals)

    def _feed(self, x: Array, drop: Drop | None) -> Array:
        return self.mlp(x)

    def _dropped(self, y: Array, drop: Drop) -> Array:
        """A branch before it is added."""
        return layers.drop_path(y, *drop)

    def _between(self, tokens: Tokens, hooks, layer: int, context: Context, drop: Drop | None, branch) -> Tokens:
        """What stands between attention and MLP: in a decoder that reads an encoder, `branch` of that."""
        return tokens


class Ran(struct.PyTreeNode):
    """What a stack of blocks leaves behind."""

    tokens: Tokens
    pooled: Float[Array, "B C"] | None  # of a `readout` hook
    trace: tuple[LayerTrace, ...] | None
    states: tuple[Tokens, ...] | None
    logits: Float[Array, "B K"] | None = None  # of a `readout` hook that is a classifier of its own


class Blocks(nnx.Module):
    """A model with `blocks`, unrolled, or stored stacked and scanned where no hook stands in a long run."""

    depths: ClassVar[tuple[str, ...]] = ("depth",)  # fields of the config that count blocks

    blocks: Any
    cfg: Any

    def deepen(self, cfg: Any) -> None:
        """See `skeleton`."""
        deepen(self, cfg)

    def _make_blocks(self, cfg: Any, rngs: nnx.Rngs, kind: Callable[..., Block] = Block) -> None:
        blocks = [kind(cfg, rngs=rngs) for _ in range(cfg.depth)]
        self.blocks = _stacked(blocks) if cfg.scan else nnx.List(blocks)

    def _run(
        self,
        cfg: StackConfig,
        tokens: Tokens,
        hooks: Sequence[hk.Hook],
        context: Context,
        key: Array | None = None,
        keep_states: bool = False,
        span: tuple[int, int] | None = None,
    ) -> Ran:
        """All blocks, or those of `span`; traces if `tokens.origin` is filled. `key`: what drops branches."""
        first, last = span or (0, cfg.depth)
        if first == 0:
            tokens, _ = hk.reduce(hooks, "input", 0, tokens, Signals(context=context))
        keep, traced = keep_states or bool(hk.at(hooks, "readout")), tokens.origin is not None
        states: list[Tokens] = []
        traces: list[LayerTrace] = []
        for at, end, block in self._runs(cfg, hooks, first, last, whole=not keep and not traced):
            context = self._shared(context, tokens)
            if block is None:
                tokens = self._scan(cfg, tokens, at, end, context, key)
                continue
            tokens, entered = block(tokens, hooks, at, context, self._drop(cfg, at, key))
            if keep:
                states.append(tokens)
            if tokens.origin is not None:
                traces.append(LayerTrace(tokens.origin, tokens.size, entered.count(), entered.length, tokens.length))
        pooled, logits, tokens = hk.readout(hooks, tuple(states), tokens)
        kept = tuple(states) if keep_states else None
        return Ran(tokens, pooled, tuple(traces) if traced else None, kept, logits)

    def _runs(
        self, cfg: StackConfig, hooks: Sequence[hk.Hook], first: int, depth: int, whole: bool
    ) -> Iterator[tuple[int, int, Block | None]]:
        """(first, last, block) in order; a run of at least four hook-free stacked blocks has None for the block."""
        hooked = {hook.layer for hook in hooks if hook.where not in ("input", "readout")}
        while first < depth:
            last = first + 1
            if cfg.scan and whole and first not in hooked:
                while last < depth and last not in hooked:
                    last += 1
            if last - first >= 4:
                yield first, last, None
            else:
                for layer in range(first, last):
                    yield layer, layer + 1, self._block(cfg, layer)
            first = last

    def _block(self, cfg: StackConfig, layer: int) -> Block:
        if not cfg.scan:
            return self.blocks[layer]
        graphdef, state = nnx.split(self.blocks)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))

    def _scan(self, cfg: StackConfig, tokens: Tokens, first: int, last: int, context: Context, key) -> Tokens:
        graphdef, state = nnx.split(self.blocks)
        params = jax.tree.map(lambda leaf: leaf[first:last], state)

        def body(x, step):  # without hooks nothing but the features changes
            layer, params = step
            block, drop = nnx.merge(graphdef, params), self._drop(cfg, layer, key)
            return block(tokens.replace(x=x), context=context, drop=drop)[0].x, None

        return tokens.replace(x=jax.lax.scan(body, tokens.x, (jnp.arange(first, last), params))[0])

    def _shared(self, context: Context, tokens: Tokens) -> Context:
        """The context of the next block, with what several blocks share."""
        return context

    def _drop(self, cfg: StackConfig, layer: int | Array, key: Array | None) -> Drop | None:
        """Rate and key of what a block drops: branches, with a rate that rises from block to block."""
        if key is None or not cfg.drop_path:
            return None
        return cfg.drop_path * layer / max(cfg.depth - 1, 1), layers.fold_in(key, layer)


def _stacked(blocks: list[Block]) -> Block:
    """Equal blocks as one, whose parameters have a leading L axis."""
    graphdef, _ = nnx.split(blocks[0])
    states = [nnx.split(block)[1] for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def skeleton(kind: Any, cfg: Any) -> Any:
    """The module of a config with shapes for parameters, at once whatever its depth: its blocks are all alike."""
    shallow = getattr(cfg, "shallow", {})  # what else must change for a config of one block
    plain = dataclasses.replace(cfg, **dict.fromkeys(kind.depths, 1), scan=False, **shallow)
    module = nnx.eval_shape(lambda: kind(plain, rngs=nnx.Rngs(0)))
    module.deepen(cfg)
    return module


def deepen(module: Blocks, cfg: Any) -> None:
    """Gives a module of shapes that has one block those of `cfg`."""
    graphdef, state = nnx.split(module.blocks[0])
    if cfg.scan:
        deep = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((cfg.depth, *leaf.shape), leaf.dtype), state)
        module.blocks = nnx.merge(graphdef, deep)
    else:
        params = nnx.to_pure_dict(state)  # of its own for every block
        module.blocks = nnx.List([nnx.merge(graphdef, params) for _ in range(cfg.depth)])
    module.cfg = cfg


def mlp_macs(cfg: BlockConfig) -> int:
    """Multiply-accumulates of a block's MLP for one token; a gated one has three products in place of two."""
    return (3 if cfg.mlp == "swiglu" else 2) * cfg.width * int(cfg.width * cfg.mlp_ratio)


def check_blocks(cfg: BlockConfig) -> None:
    """Refuses fields of blocks that do not fit together.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    for name in ("width", "depth", "heads"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)}: must be at least 1")
    if cfg.width % cfg.heads:
        raise ValueError(f"heads={cfg.heads}: must divide width={cfg.width}")
    if not math.isfinite(cfg.mlp_ratio) or int(cfg.width * cfg.mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={cfg.mlp_ratio}: must give at least one hidden channel for width={cfg.width}")
    if not 0 < cfg.norm_eps < math.inf:
        raise ValueError(f"norm_eps={cfg.norm_eps}: must be above 0 and finite")
    for name, kind in (("gelu", Gelu), ("mlp", MlpKind)):
        if getattr(cfg, name) not in get_args(kind):
            raise ValueError(f"{name}={getattr(cfg, name)!r}: must be one of {', '.join(get_args(kind))}")
    if cfg.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={cfg.dtype!r}: must be one of float32, bfloat16, float16")
    if not 0 <= cfg.drop_path < 1:
        raise ValueError(f"drop_path={cfg.drop_path}: must be in [0, 1)")
