"""TokenWeave: a decoder split over devices by heads, whose tokens go in two parts, so that what is sent hides.

Paper:  Gond, Kwatra, Ramjee, "TokenWeave: Efficient Compute-Communication Overlap for Distributed LLM Inference",
        MLSys 2026 (arXiv 2505.11329).
Source: microsoft/tokenweave, `vllm/v1/worker/gpu_model_runner.py` (the split), `csrc/tokenweave_fused_kernels.cu` (sums
        and norms), `docs/AddTokenWeave.md` (the order of a block).
Kind:   none of reduction: no token leaves and no value changes but by the order of sums.
Static: the split, by the number of tokens with their padding.

Every device has some heads and a share of the MLP, so that what attention and MLP give are partial sums. In place of
adding them up everywhere (two all-reduces a block) each device adds up those of its own tokens, adds the residual,
which lives there alone, norms, and sends the result to all: a reduce-scatter, the norm of every token once, an
all-gather, of as many bytes together. Two parts of the tokens do this without regard to each other, so that a compiler
that schedules for latency can send those of one while the other's products run:

    products   attention 1          attention 2          MLP 1                MLP 2
    sent       MLP 2 (block before) attention 1          attention 2          MLP 1

Only keys and values pass from the first part to the second: attention is causal, and of a text that is cut the second
part sees the first. There are no streams to be told: the program has two chains of products and one order of messages,
and the compiler does the rest. XLA's for TPU (v5e, 2 x 2) sends what it gathers of one part during the products of the
other, and waits for the sums; that for CPU does everything in turn, so that nothing is gained there. What several GPUs
make of it has not been measured.

Where we decide: the published code fuses sum and norm in one kernel over NVLink; here they are three operations. Its
batches are flat; ours are padded, so that rows of N slots are cut, padding included. Where texts are few and two parts
are not worth it, there is one, with the same sums.

    fast = model.woven(jax.make_mesh((4,), ("model",)))     # the same logits, `generate` too
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from tokjax import cache as kv
from tokjax import hooks as hk
from tokjax.cache import Cache, Kept
from tokjax.models import layers
from tokjax.models.decoder import Decoder, DecoderConfig, Inside, by_head, rms, rotate, turns, visible_pairs
from tokjax.models.transformer import LayerTrace, skeleton
from tokjax.signals import Context
from tokjax.tokens import Tokens

MULTIPLE = 256  # tokens of a tile, of which the published split makes no more than the whole batch has


@dataclasses.dataclass(frozen=True)
class Split:
    """Which tokens of a batch of texts go first. Texts without a token in a part are left out of its lengths."""

    size: int  # tokens of the first part
    total: int  # of both, filled up to a multiple
    first_queries: Int[np.ndarray, "R1"]  # new tokens of every text in the first part
    first_keys: Int[np.ndarray, "R1"]  # that they attend to, those before included
    second_queries: Int[np.ndarray, "R2"]
    second_keys: Int[np.ndarray, "R2"]


def split(
    new: Sequence[int], computed: Sequence[int] | None = None, *, multiple: int = MULTIPLE, offset: int = 0
) -> Split:
    """Cuts a batch of texts, one behind the other, in two parts (`vllm/v1/worker/gpu_model_runner.py`).

    Args:
        new: tokens of every text that are to be computed.
        computed: those that are already; None: none.
        multiple: of tokens, to which the batch is filled up before it is halved.
        offset: tokens that the first part has more. The authors measured 256 for LLaMA-70B on eight GPUs at 8,192 and
            16,384 tokens, 0 at 1,024, 2,048, 4,096, 32,768 and 65,536.

    Returns:
        The split; nothing is in the second part where `size` reaches all tokens.

    Raises:
        ValueError: a number out of range.
    """
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: must be at least 1")
    counts = np.asarray(new)
    done = np.zeros_like(counts) if computed is None else np.asarray(computed)
    if counts.shape != done.shape or (counts < 1).any() or (done < 0).any():
        raise ValueError(f"new={counts}, computed={done}: must be as many numbers, at least 1 and at least 0")
    total = -(-int(counts.sum()) // multiple) * multiple
    size = total // 2 + offset
    if size < 1:
        raise ValueError(f"offset={offset}: must leave at least one of {total // 2} tokens in the first part")
    first = np.clip(size - (np.cumsum(counts) - counts), 0, counts)
    second, keys = counts - first, done + counts
    one, two = first > 0, second > 0
    return Split(size, total, first[one], (keys - second)[one], second[two], keys[two])


def reduce_norm(
    partial: Float[Array, "B n C"],
    residual: Float[Array, "B m C"],
    axis: str,
    add: Callable[[Array, Array], Array],
    norm: Callable[[Array], Array],
) -> tuple[Float[Array, "B m C"], Float[Array, "B n C"]]:
    """Adds partial sums of W devices to the residual, each those of its own n/W tokens, and norms them for all.

    Args:
        partial: this device's summand, for all tokens.
        residual: of the tokens of this device: m = ceil(n / W) of them, the last device's filled up with zeros.
        axis: of the mesh, mapped.
        add: from the residual and the sum to the residual.
        norm: what the next branch runs on.

    Returns:
        The residual of this device's tokens, and their norm, of all tokens on all devices.
    """
    n = partial.shape[1]
    filled = jnp.pad(partial, ((0, 0), (0, residual.shape[1] * jax.lax.axis_size(axis) - n), (0, 0)))
    added = jax.lax.psum_scatter(filled, axis, scatter_dimension=1, tiled=True)
    residual = add(residual, added)
    return residual, jax.lax.all_gather(norm(residual), axis, axis=1, tiled=True)[:, :n]


def fused_reduce_norm(
    partial: Float[Array, "n C"], residual: Float[Array, "m C"], weight: Float[Array, "C"], eps: float, axis: str
) -> tuple[Float[Array, "m C"], Float[Array, "n C"]]:
    """`reduce_norm` with a plain sum and RMSNorm in float32 (`csrc/tokenweave_fused_kernels.cu`), without a batch."""
    residual, normed = reduce_norm(partial[None], residual[None], axis, jnp.add, lambda x: rms(x, weight, eps))
    return residual[0], normed[0]


def own(x: Float[Array, "B n C"], axis: str) -> Float[Array, "B m C"]:
    """Of all tokens those of this device, m = ceil(n / W), filled up with zeros."""
    devices = jax.lax.axis_size(axis)
    m = -(-x.shape[1] // devices)
    x = jnp.pad(x, ((0, 0), (0, m * devices - x.shape[1]), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(x, m * jax.lax.axis_index(axis), m, axis=1)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rectangle of a batch: of the rows from `top` to before `bottom` the tokens from `left` to before `right`."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def count(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


@dataclasses.dataclass(frozen=True)
class Weave:
    """How a decoder is woven; static.

    Attributes:
        mesh: of the devices. Rows are split over its axis "data" where it has one.
        axis: over which heads and MLP are split.
        least: tokens of a batch (its share on one device of "data") that are worth two parts; 1024 as published.
        multiple, offset: see `split`.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    mesh: Mesh
    axis: str = "model"
    least: int = 1024
    multiple: int = MULTIPLE
    offset: int = 0

    def __post_init__(self):
        if self.axis not in self.mesh.axis_names:
            raise ValueError(f"axis={self.axis!r}: must be one of the mesh's, {', '.join(self.mesh.axis_names)}")
        for name in ("least", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def rows(self) -> str | None:
        """The axis over which rows are split."""
        return "data" if "data" in self.mesh.axis_names else None

    def parts(self, batch: int, length: int) -> list[list[Piece]]:
        """The one or two parts of a batch, each of whole rows and perhaps a piece of one."""
        total = batch * length
        size = total
        if total >= self.least:
            size = min(total, split([length] * batch, multiple=self.multiple, offset=self.offset).size)
        row, place = divmod(size, length)
        below = row + (place > 0)
        both = (
            (Piece(0, row, 0, length), Piece(row, below, 0, place)),
            (Piece(row, below, place, length), Piece(below, batch, 0, length)),
        )
        pieces = [[piece for piece in part if piece.count] for part in both]
        return [part for part in pieces if part]

    def of_device(self, cfg: DecoderConfig) -> DecoderConfig:
        """The decoder that one device has.

        Raises:
            ValueError: what does not divide into as many parts as there are devices.
        """
        count = self.mesh.shape[self.axis]
        for name in ("heads", "kv_heads", "hidden"):
            if getattr(cfg, name) % count:
                raise ValueError(f"{name}={getattr(cfg, name)}: must be a multiple of the {count} devices of the mesh")
        if cfg.kv_layers is not None:
            raise ValueError(f"kv_layers={cfg.kv_layers}: must be None in a woven decoder")
        parts = {name: getattr(cfg, name) // count for name in ("heads", "kv_heads", "hidden")}
        return dataclasses.replace(cfg, **parts)

    def spec(self, path: tuple[Any, ...], x: Any) -> PartitionSpec:
        """Where a parameter lies: split by columns if it leads to heads and MLP, by rows if it leads back."""
        layer, name = _names(path)
        if layer in ("q", "kv", "fc1"):
            return PartitionSpec(*[None] * (x.ndim - 1), self.axis)
        if layer in ("proj", "fc2") and name == "kernel":
            return PartitionSpec(*[None] * (x.ndim - 2), self.axis, None)
        return PartitionSpec()


class WovenDecoder(Decoder):
    """A decoder with heads and MLP over the devices; embedding, norms and head are on every one of them.

    Keys and values, gates and values of an MLP stand apart in its parameters ([C, 2, K D]), so that every device's
    share of both is a slice. No hook may look at its blocks, where no device has all heads: reduce before, by handing
    over `Tokens`, which must stand in the order of the text. `after_prefill` hooks work on a cache that is split by
    heads.
    """

    def __init__(self, decoder: Decoder, how: Weave):
        cfg, self.weave = decoder.cfg, how
        how.of_device(cfg)
        self.cfg = cfg
        graph, state = nnx.split(decoder)
        params = jax.tree.map_with_path(lambda path, x: _apart(cfg, path, x), nnx.to_pure_dict(state))
        placed = jax.tree.map_with_path(
            lambda path, x: jax.device_put(x, NamedSharding(how.mesh, how.spec(path, x))), params
        )
        whole = nnx.merge(graph, placed)
        for name in placed:
            setattr(self, name, getattr(whole, name))

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
        hk.check(hooks, self.cfg.info)
        if others := sorted({hook.where for hook in hooks} - {"after_prefill"}):
            raise ValueError(f"hooks at {', '.join(others)}: a woven decoder takes those at after_prefill alone")
        if states or tokens.origin is not None:
            raise ValueError("states and traces: a woven decoder has none")
        if isinstance(inputs, Tokens) and inputs.order is not None:
            raise ValueError("inputs.order: must be None in a woven decoder, whose tokens stand in order")
        how = self.weave
        rows = PartitionSpec(how.rows)
        heads = PartitionSpec(how.rows, None, how.axis)

        def run(params: PyTree, tokens: Tokens) -> tuple[Array, list[tuple[Array, Array]]]:
            return _blocks(self._local(params), how, tokens)

        params = nnx.to_pure_dict(nnx.state(self))
        mapped = self._mapped(run, (self._specs(params), rows), (rows, heads))
        x, pairs = mapped(params, tokens.replace(carry={}, aux={}))
        kept: list[Kept | None] = [Kept(tokens, key, value) for key, value in pairs] if cached else []
        return tokens.replace(x=x), kept, [], []

    def step(
        self,
        cache: Cache,
        x: Float[Array, "B 1 C"],
        hooks: Sequence[hk.Hook] = (),
        blocks: Sequence[Any] | None = None,
    ) -> tuple[Float[Array, "B 1 C"], Cache]:
        """As `Decoder.step`; with so few tokens, sums are those of all devices, two a block."""
        self.cfg.check_cache(cache, len(x))
        if any(hook.where in ("decode_step", "depth") for hook in hooks):
            raise ValueError("hooks at decode_step and depth: a woven decoder takes none")
        params, rows = nnx.to_pure_dict(nnx.state(self)), PartitionSpec(self.weave.rows)
        specs = kv.specs(cache, self.weave.rows, self.weave.axis)

        def run(params: PyTree, cache: Cache, x: Array) -> tuple[Array, Cache]:
            local = self._local(params)
            summed = local._unstacked()
            for block in summed:
                block.attn.proj, block.mlp.fc2 = (
                    Summed(part, self.weave.axis) for part in (block.attn.proj, block.mlp.fc2)
                )
            return local.step(cache, x, (), summed)

        return self._mapped(run, (self._specs(params), specs, rows), (rows, specs))(params, cache, x)

    def _mapped(self, run: Any, inputs: Any, outputs: Any) -> Any:
        return jax.shard_map(run, mesh=self.weave.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    def _specs(self, params: PyTree) -> PyTree:
        return jax.tree.map_with_path(self.weave.spec, params)

    def _local(self, params: PyTree) -> Decoder:
        """The decoder of this device; what leads back from heads and MLP gives partial sums."""
        graph = nnx.split(skeleton(Decoder, self.weave.of_device(self.cfg)))[0]
        first = jax.lax.axis_index(self.weave.axis) == 0

        def one(path: tuple[Any, ...], x: Array) -> Array:
            if _names(path) in (("proj", "bias"), ("fc2", "bias")):  # counts once
                return jnp.where(first, x, 0)
            return x.reshape(*x.shape[:-2], -1) if _paired(self.cfg, path) else x

        return nnx.merge(graph, jax.tree.map_with_path(one, params))


class Summed(nnx.Module):
    """A layer whose partial sums are added up over the devices."""

    def __init__(self, inner: Any, axis: str):
        self.inner, self.axis = inner, axis

    def __call__(self, x: Array) -> Array:
        return jax.lax.psum(self.inner(x), self.axis)


def _names(path: tuple[Any, ...]) -> tuple[Any, Any]:
    """Of a parameter: that of its layer, and its own."""
    *_, layer, name = (None, *(getattr(key, "key", key) for key in path))
    return layer, name


def _paired(cfg: DecoderConfig, path: tuple[Any, ...]) -> bool:
    """Whether the last axis of a parameter has two things, one behind the other."""
    layer, _ = _names(path)
    return layer == "kv" or (layer == "fc1" and cfg.feed in layers.GATED)


def _apart(cfg: DecoderConfig, path: tuple[Any, ...], x: Array) -> Array:
    return x.reshape(*x.shape[:-1], 2, -1) if _paired(cfg, path) else x


def _blocks(decoder: Decoder, how: Weave, tokens: Tokens) -> tuple[Array, list[tuple[Array, Array]]]:
    """All blocks on one device: features [B, N, C] behind them, and keys and values [B, N, K, D] of every one."""
    cfg, axis = decoder.cfg, how.axis
    batch, length, width = tokens.x.shape
    assert tokens.position is not None

    def flat(x: Array) -> Array:
        return x.reshape(1, batch * length, *x.shape[2:])

    parts = how.parts(batch, length)
    ends = itertools.accumulate((sum(piece.count for piece in part) for part in parts), initial=0)
    spans = list(itertools.starmap(slice, itertools.pairwise(ends)))
    turn = by_head(turns(cfg, flat(tokens.position)))
    turned = [None if turn is None else tuple(part[:, span] for part in turn) for span in spans]
    blocks = decoder._unstacked()
    # What a block's end norms is what the next one runs on; the final norm is the decoder's, behind all blocks.
    after: list[Callable[[Array], Array]] = [
        *(functools.partial(block._enter, block.norm1) for block in blocks[1:]),
        lambda x: x,
    ]
    # 1. The residual lives where it is added to; what the first block runs on needs nothing sent.
    residual = [own(flat(tokens.x)[:, span], axis) for span in spans]
    x = [blocks[0]._enter(blocks[0].norm1, flat(tokens.x)[:, span]) for span in spans]
    pairs, sent = [], None
    for block, window, norm in zip(blocks, cfg.windows, after, strict=True):
        keys: list[tuple[Array, Array, Array]] = []
        # 2. Attention of both parts, the second behind the keys and values of the first.
        for i, part in enumerate(parts):
            key, value = block.attn.pairs(x[i])
            keys.append((rotate(key, turned[i]), value, key))
            known = [jnp.concatenate(each, 1)[0] for each in zip(*keys, strict=True)]
            query = rotate(block.attn.queries(x[i]), turned[i])[0]
            partial = _behind(_attend(block, part, query, known, tokens, window), sent)
            add, enter = functools.partial(block.added, "1"), functools.partial(block._enter, block.norm2)
            residual[i], x[i] = reduce_norm(partial, residual[i], axis, add, enter)
            sent = x[i]
        key, value, unrotated = (each.reshape(batch, length, *each.shape[1:]) for each in known)
        pairs.append((unrotated if cfg.rotate == "read" else key, value))
        # 3. The MLP of both.
        for i in range(len(parts)):
            partial, add = _behind(block.mlp(x[i]), sent), functools.partial(block.added, "2")
            residual[i], x[i] = reduce_norm(partial, residual[i], axis, add, norm)
            sent = x[i]
    return jnp.concatenate(x, 1).reshape(batch, length, width), pairs


def _behind(partial: Float[Array, "1 n C"], sent: Float[Array, "1 m C"] | None) -> Float[Array, "1 n C"]:
    """Partial sums that wait for what was sent before them, plus a zero that only the running program knows to be one.

    Otherwise compilers make one message of the sums of both parts, for which both must wait; an optimization barrier,
    of whose second result nothing is made, does not last until then.
    """
    if sent is None:
        return partial
    one = sent[:, :1, :1]
    return partial + 0 * jnp.where(jnp.isfinite(one), one, 0).astype(partial.dtype)


def _attend(
    block: Any,
    part: Sequence[Piece],
    query: Float[Array, "n H D"],
    known: Sequence[Float[Array, "m K D"]],
    tokens: Tokens,
    window: int | None,
) -> Float[Array, "1 n C"]:
    """The attention's partial sums of one part, given keys and values of all tokens up to its end."""
    cfg, length, outs, start = block.cfg, tokens.length, [], 0
    for piece in part:
        asks = _cut(tokens, piece, piece.left)
        seen = asks if piece.left == 0 else _cut(tokens, piece, 0)
        shape = piece.bottom - piece.top, piece.right
        begin, end = piece.top * length, (piece.bottom - 1) * length + piece.right
        key, value, _ = (each[begin:end].reshape(*shape, *each.shape[1:]) for each in known)
        bias, causal = seen.attention_bias(), piece.left == 0
        signals = Inside(
            query[start : start + piece.count].reshape(shape[0], -1, *query.shape[1:]),
            key,
            value,
            None if bias is None else bias[:, None, None],
            rule=dataclasses.replace(cfg.rule, causal=causal),
            pair_bias=visible_pairs(asks, seen, causal, window),
            there=asks.valid,
        )
        outs.append(block.attn(signals).reshape(1, piece.count, -1))
        start += piece.count
    return jnp.concatenate(outs, 1)


def _cut(tokens: Tokens, piece: Piece, left: int) -> Tokens:
    """The tokens of a piece, its rows from `left` on."""
    return jax.tree.map(lambda x: x[piece.top : piece.bottom, left : piece.right], tokens)
