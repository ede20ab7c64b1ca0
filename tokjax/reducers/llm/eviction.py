"""Eviction from a KV cache: once a decoder has read its prompt, every layer forgets most of it.

Papers: StreamingLLM, Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024;
        H2O, Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        NeurIPS 2023;
        SnapKV, Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024.
Source: EffiVLM-Bench/EffiVLM-Bench, `kv_cache_compression/kv_cache_utils.py`, which has all three at one budget.
Kind:   prune, training-free; static length. Reading costs what it did; the cache shrinks, and a step reads less.
Needs:  SnapKV the last rows of the attention, H2O all of them (in blocks, never as a map), the others nothing.

A prompt of n tokens keeps `int(n * budget)` of them in every layer: the last ones, its window, and others, which are
what the methods differ in. Counts come from each row's own tokens; a row of no more than `kept` stays whole, as in the
source, so that it does not depend on the rows beside it. What stays is rotated as it was, at its true position, and new
tokens go on behind the prompt. (StreamingLLM's own code numbers anew what is in the cache.)

With `bounded` the cache never has more than `kept` tokens and the new one, which is what H2O and StreamingLLM are for
in texts without an end; without, what is made stays (the source).

A call without a cache is what it was. Reducers that take tokens out between the attention of a block and its MLP come
behind these, which score the tokens that the attention had.
"""

import abc
from collections.abc import Callable
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import cache as kv
from tokjax.cache import Cache, Group
from tokjax.hooks import Hook, ModelInfo
from tokjax.signals import Signals, attention_rows, column_sum, last_slots
from tokjax.token_map import Plan
from tokjax.tokens import Tokens

Count = Callable[[int], int]  # of a row's number of tokens


@dataclasses.dataclass(frozen=True)
class Eviction(abc.ABC):
    """What all of them do, given how many of the last tokens stay and what the others are worth.

    Attributes:
        budget: share of each row's prompt that stays, at least a token.
        kept: so many tokens stay; None: by `budget`.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    budget: float = 0.5
    kept: int | None = None

    by_layer: ClassVar[bool] = False  # whether every layer chooses for itself

    def __post_init__(self):
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget}: must be in (0, 1]")
        if self.kept is not None and self.kept < 1:
            raise ValueError(f"kept={self.kept}: must be at least 1")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """What is noted while the prompt is read, and the eviction behind it.

        Raises:
            ValueError: a model without a cache.
        """
        if "after_prefill" not in info.sites:
            raise ValueError(f"{type(self).__name__}: needs a model with a KV cache, which only decoders have")
        if self.kept is None and self.budget == 1:
            return []
        return [*self.watching(info), Hook("after_prefill", 0, self, "evict")]

    def watching(self, info: ModelInfo) -> list[Hook]:
        """Hooks beside the eviction: what notes scores while the prompt is read, or counts in later steps."""
        return []

    def count(self, tokens: int) -> int:
        """Tokens that stay of a prompt."""
        return min(tokens, max(1, int(tokens * self.budget)) if self.kept is None else self.kept)

    @abc.abstractmethod
    def recent(self, tokens: int) -> int:
        """Of those that stay of a prompt, the ones that stay because they are the last."""

    def score(self, cache: Cache, group: int, tokens: Tokens) -> Float[Array, "B *K P"]:
        """What every token of the prompt is worth to a group, by head where heads choose for themselves, float32.

        Args:
            cache: right after the prompt.
            group: its number.
            tokens: behind the last block, with all that was noted.
        """
        return -places(cache.groups[group]).astype(jnp.float32)  # the first ones most

    def evict(self, cache: Cache, tokens: Tokens) -> Cache:
        """The cache after prefill with the tokens that stay, in slots for those of the longest row.

        Raises:
            ValueError: scores were noted of other tokens than those in the cache.
        """
        cache = kv.split(cache) if self.by_layer else cache
        groups = (self.shrunk(one, self.score(cache, g, tokens)) for g, one in enumerate(cache.groups))
        return cache.replace(groups=tuple(groups))

    def shrunk(self, group: Group, score: Float[Array, "B *K P"]) -> Group:
        """A group with the tokens that stay."""
        prompt = group.prompt
        best = ranked(group, score, self.recent)
        stays = jnp.argsort(best, axis=-1, stable=True) < _of_counts(self.count, group, best.ndim)

        def room(x: Array) -> Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, group.slots - prompt)])

        group = kv.evict(group, room(~stays))
        group = group.replace(score=room(jnp.broadcast_to(_headed(score, best.ndim), best.shape)))
        return self.settled(kv.compact(group, self.count(prompt)))

    def settled(self, group: Group) -> Group:
        """The group as steps find it."""
        return group.replace(score=None)


def places(group: Group) -> Int[Array, "B *K P"]:
    """The number of every prompt token in its row, in causal order; empty slots come last."""
    valid, order = group.valid[..., : group.prompt], group.order[..., : group.prompt]
    in_text = jnp.argsort(jnp.where(valid, order, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)
    return jnp.argsort(in_text, axis=-1, stable=True)


def ranked(group: Group, score: Float[Array, "B *K P"], recent: Count) -> Int[Array, "B *K P"]:
    """Slots of the prompt: the last `recent(n)` of n tokens, then by falling score, empty ones at the end.

    Of equal scores the lower slot comes first.
    """
    ndim = max(score.ndim, group.valid.ndim)
    valid, first = _headed(group.valid[..., : group.prompt], ndim), _window(group, recent, ndim)
    worth = jnp.where(valid, jnp.where(_headed(places(group), ndim) >= first, jnp.inf, _headed(score, ndim)), -jnp.inf)
    return jnp.argsort(-worth, axis=-1, stable=True)


def _window(group: Group, recent: Count, ndim: int) -> Int[Array, "B *K 1"]:
    """The place at which the window starts."""
    return _of_counts(lambda n: n - recent(n), group, ndim)


def _of_counts(count: Count, group: Group, ndim: int) -> Int[Array, "B *K 1"]:
    """A function of a row's number of prompt tokens, exact, as it is of integers in Python."""
    table = jnp.asarray([count(n) for n in range(group.prompt + 1)], jnp.int32)
    return _headed(table[group.valid[..., : group.prompt].sum(-1, keepdims=True)], ndim)


def _headed(x: Array, ndim: int) -> Array:
    """With an axis for heads behind the batch, if it has none."""
    return x if x.ndim == ndim else x[:, None]


def _layers(cache: Cache, group: int) -> list[int]:
    """The layers that read a group."""
    return [layer for layer, at in enumerate(cache.layers) if at is not None and at[0] == group]


@dataclasses.dataclass(frozen=True)
class RecencyCache(Eviction):
    """A control: the last tokens stay."""

    def recent(self, tokens: int) -> int:
        return self.count(tokens)


@dataclasses.dataclass(frozen=True)
class Windowed(Eviction):
    """Some of the last tokens stay whatever they are worth.

    Attributes:
        window: the last tokens that stay, or all that stay where those are fewer; None: by `window_rate`.
        window_rate: their share of those that stay, rounded down, at least one; the source has 0.1.
    """

    window: int | None = None
    window_rate: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.window_rate <= 1:
            raise ValueError(f"window_rate={self.window_rate}: must be in [0, 1]")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1")
        if self.window is not None and self.kept is not None and self.window > self.kept:
            raise ValueError(f"window={self.window}: must be at most kept={self.kept}")

    def recent(self, tokens: int) -> int:
        kept = self.count(tokens)
        return min(kept, max(1, int(kept * self.window_rate)) if self.window is None else self.window)


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Windowed):
    """The first tokens of a text, to which everything attends, and the last ones.

    Attributes:
        sinks: the first tokens that stay, the paper has 4; all others that stay are the last. None: the last ones are
            the window, all others the first (the source).
        bounded: whether new tokens take over the slots of the oldest ones that are no sinks; needs `kept`.
    """

    sinks: int | None = 4
    bounded: bool = False

    def __post_init__(self):
        super().__post_init__()
        _check_bounded(self.bounded, self.kept)
        if self.sinks is not None and self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: must be at least 0")
        if self.sinks is not None and self.kept is not None and self.sinks >= self.kept:
            raise ValueError(f"sinks={self.sinks}: must be below kept={self.kept}")

    def recent(self, tokens: int) -> int:
        if self.sinks is None:
            return super().recent(tokens)
        kept = self.count(tokens)
        return min(kept, max(1, kept - self.sinks))

    def settled(self, group: Group) -> Group:
        if not _overflows(self.bounded, self.kept, group):
            return group.replace(score=None)
        assert self.kept is not None
        first = jnp.arange(group.slots) < self.kept - self.recent(self.kept)  # prompts stand in order
        sinks = jnp.where(first & group.valid, jnp.inf, 0.0)
        return kv.bound(group.replace(score=sinks), self.kept + 1)


@dataclasses.dataclass(frozen=True)
class Scored(Windowed):
    """Every layer chooses by what its attention does.

    Attributes:
        per_head: whether every key head chooses for itself (the source's "head adaptive"), or all heads of a layer
            together.
    """

    per_head: bool = True

    by_layer: ClassVar[bool] = True

    def watching(self, info: ModelInfo) -> list[Hook]:
        return [Hook("after_attention", layer, self, "note") for layer in range(info.depth)]

    def note(self, tokens: Tokens, signals: Signals) -> Plan:
        """Keeps what the tokens get of a layer's attention until the cache is there."""
        seen = jax.lax.stop_gradient(self.seen(tokens, signals))
        return Plan(aux={"score": self.by_head(seen, signals.need("key").shape[2])})

    @abc.abstractmethod
    def seen(self, tokens: Tokens, signals: Signals) -> Float[Array, "B H N"]:
        """What every token gets of the attention that counts."""

    def by_head(self, seen: Float[Array, "B H N"], heads: int) -> Float[Array, "B *K N"]:
        """Mean over the query heads of every key head, or over all."""
        if not self.per_head:
            return seen.mean(1)
        return seen.reshape(seen.shape[0], heads, -1, seen.shape[-1]).mean(2)

    def score(self, cache: Cache, group: int, tokens: Tokens) -> Float[Array, "B *K P"]:
        name, prompt = type(self).__name__, cache.groups[group].prompt
        noted = [tokens.aux[f"{layer:02d}.after_attention.{name}"]["score"] for layer in _layers(cache, group)]
        if noted[0].shape[-1] != prompt:
            counts = f"noted {noted[0].shape[-1]} tokens where the cache has {prompt}"
            raise ValueError(f"{name}: {counts}; it must come before reducers that take tokens out of its layers")
        return sum(noted[1:], noted[0])


@dataclasses.dataclass(frozen=True)
class SnapKV(Scored):
    """What the last tokens of the prompt, the window, attend to, smoothed over neighbours.

    Attributes:
        kernel: neighbours that scores are averaged over, the token in their middle; the source has 5. Beyond the ends
            of what can be chosen they are 0.
    """

    kernel: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: must be an odd number of at least 1")

    def seen(self, tokens: Tokens, signals: Signals) -> Float[Array, "B H N"]:
        most = self.recent(tokens.length)
        rows = attention_rows(signals, last_slots(tokens, most))
        window = jnp.asarray([self.recent(n) for n in range(tokens.length + 1)])[tokens.count()]
        counted = jnp.arange(most) >= most - window[:, None]
        return jnp.einsum("bhqn,bq->bhn", rows, counted.astype(jnp.float32))

    def score(self, cache: Cache, group: int, tokens: Tokens) -> Float[Array, "B *K P"]:
        score, one = super().score(cache, group, tokens), cache.groups[group]
        ndim = max(score.ndim, one.valid.ndim)
        place = _headed(places(one), ndim)
        score = jnp.where(place < _window(one, self.recent, ndim), _headed(score, ndim), 0)
        in_text = jnp.take_along_axis(score, jnp.argsort(place, axis=-1, stable=True), -1)
        wide = jnp.pad(in_text, [(0, 0)] * (ndim - 1) + [(self.kernel // 2, self.kernel // 2)])
        shifted = [wide[..., i : i + score.shape[-1]] for i in range(self.kernel)]
        return jnp.take_along_axis(sum(shifted[1:], shifted[0]) / self.kernel, place, -1)


@dataclasses.dataclass(frozen=True)
class H2O(Scored):
    """What all tokens of the prompt have attended to: heavy hitters.

    Attributes:
        bounded: whether new tokens take over the slots of those that were attended to least, by the prompt and by what
            was made, but for the last ones, the window; needs `kept`. Every step then adds its attention, and a new
            token starts from nothing (FMInference/H2O, `h2o_hf/utils_real_drop/modify_llama.py`).
    """

    bounded: bool = False

    def __post_init__(self):
        super().__post_init__()
        _check_bounded(self.bounded, self.kept)

    def watching(self, info: ModelInfo) -> list[Hook]:
        return [*super().watching(info), *([Hook("decode_step", 0, self, "add")] if self.bounded else [])]

    def seen(self, tokens: Tokens, signals: Signals) -> Float[Array, "B H N"]:
        return column_sum(signals, tokens.valid)

    def settled(self, group: Group) -> Group:
        if not _overflows(self.bounded, self.kept, group):
            return group.replace(score=None)
        assert self.kept is not None
        return kv.bound(group, self.kept + 1, min(self.recent(self.kept) + 1, self.kept))

    def add(self, cache: Cache, weights: tuple[Float[Array, "B H S"] | None, ...]) -> Cache:
        """The scores of a bounded cache after a step, with the attention that the new token has paid."""

        def group(number: int, one: Group) -> Group:
            paid = [w for w in (weights[layer] for layer in _layers(cache, number)) if w is not None]
            if one.score is None:
                return one
            return one.replace(score=one.score + sum(self.by_head(w, one.keys[0].shape[1]) for w in paid))

        return cache.replace(groups=tuple(group(g, one) for g, one in enumerate(cache.groups)))


@dataclasses.dataclass(frozen=True)
class RandomCache(Windowed):
    """A control: of all but the last tokens, the window, any stay; every row, layer and head draws its own.

    Attributes:
        per_head: whether every key head draws for itself.
        seed: where the call has no key.
    """

    per_head: bool = True
    seed: int = 0

    by_layer: ClassVar[bool] = True

    def watching(self, info: ModelInfo) -> list[Hook]:
        return [Hook("input", 0, self, "note")]

    def note(self, tokens: Tokens, signals: Signals) -> Plan:
        """Keeps a draw of every row until the cache is there."""
        keys = signals.context.row_keys(tokens.batch, 0, self.seed)
        return Plan(aux={"seed": jax.vmap(jax.random.bits)(keys)})

    def score(self, cache: Cache, group: int, tokens: Tokens) -> Float[Array, "B *K P"]:
        one, layer, seeds = cache.groups[group], _layers(cache, group)[0], tokens.aux[f"00.input.{type(self).__name__}"]
        heads = (one.keys[0].shape[1],) if self.per_head or one.per_head else ()

        def draw(seed: Array) -> Array:  # number i of a head is for token i of the row
            return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), layer), (one.prompt, *heads)).T

        draws = jax.vmap(draw)(seeds["seed"])
        return jnp.take_along_axis(draws, _headed(places(one), draws.ndim), -1)


def _check_bounded(bounded: bool, kept: int | None) -> None:
    if bounded and kept is None:
        raise ValueError("bounded=True: needs kept, the tokens that the cache stays at")


def _overflows(bounded: bool, kept: int | None, group: Group) -> bool:
    """Whether a bounded group has slots for more than it may hold."""
    return bounded and kept is not None and kept + 1 < group.slots
