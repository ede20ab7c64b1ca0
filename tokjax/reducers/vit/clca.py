"""CLCA: a cache of summaries of earlier blocks around any reducer, and a head that reads CLS at several depths.

Paper:  Rios et al., "Cross-Layer Cache Aggregation for Token Reduction in Ultra-Fine-Grained Image Recognition",
        ICASSP 2025 (arXiv 2501.00243).
Source: arkel23/CLCA, `models/{vit,evit,topk,tome}.py`; there the head is `ifa_head`, the cache `clc`, its carriers
        `clr`.
Kind:   a wrapper: what is inside reduces, the cache lets the sequence grow again; learned (head and carriers);
        static lengths.
Needs:  what the reducer inside needs.

Cross-layer cache: every block leaves the mean of its patch tokens, and the carriers (learned tokens at the end of the
sequence) as they are now. After a block that reduces, all that was cached is put behind the sequence, so that what
was removed comes back as a few tokens. Cross-layer aggregation: CLS after each of these blocks and after the last one,
without the final norm, runs through batch norm, a convolution over depth for each channel, batch norm, GELU and a
linear layer, in place of the model's own head.

Where we follow the code against the text:
- The cache also comes back after block L - 2, where nothing is reduced (`recover_at_last`).
- Behind a recovery the last tokens of the sequence are cached ones, and these are cached as carriers from then on; the
  mean stays one over the tokens that the reduction left, without those that came back.
- Carriers and what came back are reduced like patches (the published DPC-KNN alone sets them aside); only CLS, here
  the whole prefix, is not. Two reducers go by the places of the patches: a radial pattern leaves alone what has no
  place, and in a graph (GTP) it has no edges.
- Counts of the reducer inside are those of the published code: EViT and Top-K keep a share of the tokens at hand, ToMe
  (and what else has a number to remove: GTP) goes down to int(patches * keep_rate**(j+1)) patches at location j.

Where we decide:
- A carrier and its position vector are one parameter, drawn like a position vector; published training starts it as
  a copy of CLS.
- Where a reducer leaves out tokens between two recoveries, the mean is one over all that it left from then on.
- An empty cache (nothing was cached before the first reduction) brings nothing back; the published code fails.
- What came back counts in the mean that DynamicViT's predictor takes; the published code leaves it out when it prunes.
- While it learns (`learning`), batch norms go by the statistics of all rows of the batch, and the moving ones that
  come of it are in `aux` under "statistics", for the training step to write. On several devices each goes by its own
  rows, as in the published code.
- Without prefix tokens the mean over all tokens stands for CLS. Padded rows take means over valid tokens.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import schedules
from tokjax.hooks import Hook, Logits, ModelInfo, Reducer, reducing
from tokjax.reducers.vit.mergers import layer_norm, own_rngs
from tokjax.reducers.vit.staged import NOTING
from tokjax.signals import Signals
from tokjax.token_map import Plan, rows
from tokjax.tokens import Tokens, concat

ALONE = {
    "clca": "has a cache of its own",
    "evovit": "brings back itself what it sets aside, and nothing may change the tokens in between",
    "tomesd": "merges on a whole grid and gives back all that it merges",
}
Statistics = dict[str, Float[Array, "C"]]


class BatchNorm(nnx.Module):
    """Over all axes but the second; moving statistics get no gradient."""

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1):
        self.eps, self.momentum = eps, momentum
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: Float[Array, "B C *T"]) -> Float[Array, "B C *T"]:
        return self._normalised(x, *jax.lax.stop_gradient((self.mean[...], self.var[...])))

    def learn(self, x: Float[Array, "B C *T"]) -> tuple[Float[Array, "B C *T"], Statistics]:
        """By the statistics of this batch, with the moving ones behind it: of the variance the unbiased one moves."""
        axes, count = (0, *range(2, x.ndim)), x.size // x.shape[1]
        mean, var = x.mean(axes), x.var(axes)
        moving = {"mean": (self.mean[...], mean), "var": (self.var[...], var * count / max(count - 1, 1))}
        new = {name: old + self.momentum * (now - old) for name, (old, now) in moving.items()}
        return self._normalised(x, mean, var), jax.lax.stop_gradient(new)

    def _normalised(self, x: Array, mean: Array, var: Array) -> Array:
        shape = (-1,) + (1,) * (x.ndim - 2)
        x = (x - mean.reshape(shape)) * jax.lax.rsqrt(var.reshape(shape) + self.eps)
        return x * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)


class Head(nnx.Module):
    """A classifier of T vectors of C channels, taken at different depths."""

    def __init__(self, width: int, depths: int, classes: int, expand: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=2, out_axis=1, batch_axis=0)
        self.norm1, self.norm2 = BatchNorm(width), BatchNorm(width * expand)
        self.over_depth = nnx.Param(init(rngs.params(), (width, expand, depths)))
        self.bias = nnx.Param(jnp.zeros((width, expand)))
        self.out = nnx.Linear(width * expand, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, cls: Float[Array, "B C T"]) -> Float[Array, "B K"]:
        return self._classified(self.norm2(self._mixed(self.norm1(cls.astype(jnp.float32)))))

    def learn(self, cls: Float[Array, "B C T"]) -> tuple[Float[Array, "B K"], dict[str, Statistics]]:
        """By the statistics of this batch, with the moving ones of both norms behind it."""
        x, norm1 = self.norm1.learn(cls.astype(jnp.float32))
        x, norm2 = self.norm2.learn(self._mixed(x))
        return self._classified(x), {"norm1": norm1, "norm2": norm2}

    def _mixed(self, x: Float[Array, "B C T"]) -> Float[Array, "B C*k"]:
        mixed = jnp.einsum("bct,ckt->bck", x, self.over_depth[...], precision="highest") + self.bias[...]
        return mixed.reshape(x.shape[0], -1)

    def _classified(self, x: Float[Array, "B C*k"]) -> Float[Array, "B K"]:
        return self.out(jax.nn.gelu(x, approximate=False))


class OlderHead(nnx.Module):
    """The head of the published code with `expand=0`: one linear mixture of all depths, ReLU, layer norm, linear."""

    def __init__(self, width: int, depths: int, classes: int, *, rngs: nnx.Rngs):
        self.over_depth = nnx.Linear(depths, 1, dtype=jnp.float32, precision="highest", rngs=rngs)
        self.norm = layer_norm(width, 1e-5, rngs)
        self.out = nnx.Linear(width, classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, cls: Float[Array, "B C T"]) -> Float[Array, "B K"]:
        return self.out(self.norm(jax.nn.relu(self.over_depth(cls)[..., 0])))


def classifier(info: ModelInfo, depths: int, expand: int, rngs: nnx.Rngs) -> Head | OlderHead:
    if expand:
        return Head(info.width, depths, info.classes, expand, rngs=rngs)
    return OlderHead(info.width, depths, info.classes, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Cache:
    """What happens behind one block.

    Attributes:
        recover: whether what was cached is put behind the sequence.
        store: whether this block leaves something in the cache.
        behind: tokens at the end that came back, or carriers, and do not count as patches; of blocks that do not
            recover.
        gap: whether the mean of the patches is cached.
        carriers: tokens at the end that are cached.
        pool_cls: whether the mean is one over the prefix too.
    """

    recover: bool
    store: bool
    behind: int
    gap: bool
    carriers: int
    pool_cls: bool = False

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        cached, append, behind = tokens.carry.get("clca"), None, self.behind
        if self.recover:
            append = None if cached is None else Tokens(cached)
            tokens, behind = (tokens, 0) if append is None else (concat(tokens, append), append.length)
            cached = None
        if not self.store:
            return Plan(append=append, carry={"clca": None}) if self.recover else None
        parts = [] if cached is None else [cached]
        if self.gap:
            parts.append(mean(tokens, slice(0 if self.pool_cls else tokens.prefix, tokens.length - behind)))
        if self.carriers:
            parts.append(last(tokens, self.carriers))
        return Plan(append=append, carry={"clca": jnp.concatenate(parts, 1)})


def mean(tokens: Tokens, part: slice) -> Float[Array, "B 1 C"]:
    """Of the valid tokens among these; zero where there are none."""
    x = tokens.x[:, part].astype(jnp.float32)
    if tokens.valid is None:
        return x.mean(1, keepdims=True).astype(tokens.x.dtype)
    valid = tokens.valid[:, part, None]
    total = jnp.where(valid, x, 0).sum(1, keepdims=True)
    return (total / jnp.maximum(valid.sum(1, keepdims=True), 1)).astype(tokens.x.dtype)


def last(tokens: Tokens, number: int) -> Float[Array, "B number C"]:
    """The last valid tokens."""
    if tokens.valid is None:
        return tokens.x[:, -number:]
    place = jnp.argsort(~tokens.valid, axis=-1, stable=True)
    at = jnp.maximum(tokens.count()[:, None] - number + jnp.arange(number), 0)
    return rows(tokens.x, jnp.take_along_axis(place, at, 1))


class CLCA(nnx.Module):
    """A reducer with a cache around it, and the head.

    Args:
        info: of the model; a head needs its number of classes.
        reducer: registered name of what reduces; None: nothing does, the cache only adds tokens.
        keep_rate: of the reducer inside, if it has one; ToMe's counts follow from it.
        layers: where the reducer inside reduces and the cache comes back; None: three evenly spread blocks (the
            paper's 3, 6, 9 of 12), or those where the reducer inside reduces if its `settings` say how much.
        settings: of the reducer inside, beside or in place of keep_rate and layers.
        cache: whether there is a cache.
        gap: whether the mean of the patches is cached.
        pool_cls: whether this mean is one over CLS (the prefix) too.
        pool_clr: whether it is one over the carriers too, up to the first recovery (behind it they count as patches).
        num_clr: number of carriers; the paper's commands have 1.
        recover_at_last: whether the cache comes back after block L - 2 too.
        head: whether CLS at several depths is classified in place of the model's head; None: where there are classes.
        expand: channels of the head for every channel of the model; 0: the older head of the published code, a linear
            mixture of the depths without batch norms.
        learning: the form in which it trains: batch norms go by the batch, the reducer inside has its training form.
        seed: of the parameters.

    Raises:
        ValueError: a cache with nothing in it, carriers without a cache, a head for a model without classes, a reducer
            that takes no cache, or settings that it refuses.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        reducer: str | None = "evit",
        keep_rate: float = 0.7,
        layers: tuple[int, ...] | None = None,
        settings: Mapping[str, Any] | None = None,
        cache: bool = True,
        gap: bool = True,
        pool_cls: bool = False,
        pool_clr: bool = False,
        num_clr: int = 0,
        recover_at_last: bool = True,
        head: bool | None = None,
        expand: int = 2,
        learning: bool = False,
        seed: int = 0,
    ):
        if num_clr < 0 or (num_clr and not cache):
            raise ValueError(f"num_clr={num_clr}: must be at least 0, and 0 with cache=False")
        if cache and not gap and not num_clr:
            raise ValueError("gap=False, num_clr=0: leave nothing to cache; set one of them, or cache=False")
        head = info.classes > 0 if head is None else head
        if head and not info.classes:
            raise ValueError("head=True: needs a model with classes; this one gives features")
        if expand < 0:
            raise ValueError(f"expand={expand}: must be at least 0")
        if reducer in ALONE and cache:
            raise ValueError(f"reducer={reducer!r}: {ALONE[reducer]}; only cache=False goes with it")
        inner = None if reducer is None else inside(info, reducer, keep_rate, layers, settings or {})
        self.reduced = () if inner is None else reducing(inner.hooks(info))
        if learning and reducer is not None:  # the same blocks, though its training form may remove nothing there
            inner = inside(info, reducer, keep_rate, layers, settings or {}, learning)
        self.inner = inner
        self.layers = schedules.at_layers((self.reduced or None) if layers is None else layers, info.depth)
        self.cache, self.gap, self.num_clr, self.recover_at_last = cache, gap, num_clr, recover_at_last
        self.pool_cls, self.pool_clr, self.learning = pool_cls, pool_clr, learning
        self.depths = tuple(sorted({*self.layers, info.depth - 1}))  # where the head reads
        rngs = own_rngs(seed)
        if num_clr:
            self.clr = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, num_clr, info.width)))
        self.head = classifier(info, len(self.depths), expand, rngs) if head else None

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """Those of the reducer inside, and behind every block its cache."""
        hooks = [] if self.inner is None else self.inner.hooks(info)
        if self.num_clr:  # carriers are no patches, to no reducer
            hooks += [NOTING, Hook("input", 0, self, "carriers")]
        if self.cache:
            hooks += self._caches(info)
        return [*hooks, Hook("readout", 0, self, "readout")] if self.head is not None else hooks

    def _caches(self, info: ModelInfo) -> list[Hook]:
        recover = {*self.layers, max(info.depth - 2, 0)} if self.recover_at_last else set(self.layers)
        hooks, behind, cached = [], 0 if self.pool_clr else self.num_clr, 0
        for layer in range(max(recover) + 1):
            store, behind = layer < max(recover), 0 if layer in self.reduced else behind
            one = Cache(layer in recover, store, behind, self.gap, self.num_clr, self.pool_cls)
            hooks.append(Hook("after_block", layer, one))
            if layer in recover:
                behind, cached = cached, 0
            cached += store * (self.gap + self.num_clr)
        return hooks

    def carriers(self, tokens: Tokens, signals: Signals) -> Plan:
        """Step 1: carriers at the end of the sequence."""
        clr = self.clr[...].astype(tokens.x.dtype)
        return Plan(append=Tokens(jnp.broadcast_to(clr, (tokens.batch, *clr.shape[1:]))))

    def read(self, states: tuple[Tokens, ...]) -> Float[Array, "B C T"]:
        """CLS after every block that the head reads."""
        chosen = [states[layer] for layer in self.depths]
        return jnp.stack([s.x[:, 0] if s.prefix else mean(s, slice(None))[:, 0] for s in chosen], -1)

    def readout(self, states: tuple[Tokens, ...]) -> Logits:
        """Step 3: the head."""
        assert self.head is not None
        if self.learning and isinstance(self.head, Head):
            logits, statistics = self.head.learn(self.read(states))
            return Logits(logits, {"statistics": {"head": statistics}})
        return Logits(self.head(self.read(states)))


def inside(
    info: ModelInfo,
    name: str,
    keep_rate: float,
    layers: tuple[int, ...] | None,
    given: Mapping[str, Any],
    learning: bool = False,
) -> Reducer:
    """The reducer in the middle: a keep rate and the locations become the settings that it has.

    `learning`: in its training form.

    Raises:
        ValueError: settings that it refuses, or a keep rate that it has no use for.
    """
    from tokjax import reducers  # the registry knows this file

    settings, knob, where = dict(given), reducers.entry(name).knob.field, layers
    if knob not in given:
        where = schedules.at_layers(layers, info.depth)
        if knob in ("r", "propagated"):
            settings[knob], where = removed(info, keep_rate, where), None
        elif knob == "keep_rate":
            settings[knob] = keep_rate
        elif not given:
            raise ValueError(f"reducer={name!r}: has no keep_rate; give its settings")
        else:
            where = layers
    if where is not None and "layers" in reducers.settings_of(name):
        settings.setdefault("layers", where)
    if learning:
        settings |= reducers.entry(name).training
    return reducers.create(name, info, **settings)


def removed(info: ModelInfo, keep_rate: float, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that merge in every block so that int(patches * keep_rate**(j+1)) patches are left at location j."""
    patches, r = info.length - info.prefix, [0] * info.depth
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate={keep_rate}: must be in (0, 1]")
    left = patches
    for layer, target in zip(layers, schedules.kept_table(keep_rate, patches, len(layers)), strict=True):
        r[layer], left = left - target, target
    return tuple(r)
