"""DiffRate with given rates: prune and merge in one operation, with token counts that were searched for each block.

Paper:  Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023
        (arXiv 2305.17997).
Source: OpenGVLab/DiffRate, `DiffRate/merge.py`, `DiffRate/patch/{deit,mae,caformer}.py`, `compression_rate.json` (all
        of its rates lie beside this file).
Kind:   prune + hard merge, training-free once the rates are given; static length min(N, prune_kept, merge_kept).
Needs:  the CLS row of the attention (without prefix tokens, the attention that a token receives), and the features.
Cost:   a sort of N and a similarity of merged with kept tokens over C channels: no row of the attention but one.

Where we follow the code against the text:
- Tokens are matched by the residual stream, not by keys, and averaged without their sizes.
- Sizes are summed after those that move were scaled by their similarity; attention counts a token size times.
- The released lists are not monotone in places, so that the smallest count so far holds.

Where we decide:
- Sizes have a lower bound (`min_size`): a negative similarity can bring the published ones to zero and below, whose
  logarithm is NaN. Zero vectors are guarded too.
- Blocks that leave nothing out do nothing; the published code sorts the tokens there as well.
- Nothing merges into a prefix token, of which the published code knows CLS alone; at least one patch stays.
- The released rates serve other models too: as shares of the patches, interpolated over the depth. `strength` raises
  these shares to a power, which turns one searched table into a family from nothing (0) over the table itself (1) on.
- Padded rows (not in the published code) keep their own shares; explicit counts hold for each row as they are.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import input_patches, noted, noting, ranked
from tokjax.reducers.vit.tome import join
from tokjax.signals import Signals, importance
from tokjax.token_map import HardMap, Plan, rows
from tokjax.tokens import Tokens

Sizes = Literal["similarity", "count"]
Shares = tuple[float, float]  # of the patches that pruning and merging leave
DEIT = {192: "ViT-T-DeiT", 384: "ViT-S-DeiT", 768: "ViT-B-DeiT"}  # by width


@functools.cache
def released() -> Mapping[str, Mapping[str, Any]]:
    """The published rates by "model/target": kept tokens a block ("prune", "merge") and "gmacs" of the model."""
    return json.loads(Path(__file__).with_suffix(".json").read_text())["rates"]


def fitting(info: ModelInfo) -> str:
    """The released rates of the model that is most like this one, with its middle target."""
    if info.pooling == "cls" and info.depth <= 12:
        model = DEIT.get(info.width, "ViT-S-DeiT")
    else:
        model = "ViT-B-MAE" if info.depth <= 12 else "ViT-L-MAE" if info.depth <= 24 else "ViT-H-MAE"
    names = [name for name in released() if name.startswith(f"{model}/")]
    return names[len(names) // 2]


def shares(rates: str, depth: int, strength: float = 1.0) -> tuple[Shares, ...]:
    """Released rates as shares of the patches that are left in every block, for a model of any depth.

    Raises:
        ValueError: no rates of this name.
    """
    if rates not in released():
        raise ValueError(f"rates={rates!r}: must be one of {', '.join(released())}")
    entry = released()[rates]
    blocks = entry.get("stages", [None])[0]  # of a hierarchical model: those before it pools
    merge = np.array(entry["merge"][:blocks], float)
    prune = merge[:1].repeat(len(merge)) if entry["prune"] is None else np.array(entry["prune"][:blocks], float)
    prefix = entry["prune"] is not None
    patches = merge[0] - prefix
    left, table = patches, []
    for p, m in zip(prune - prefix, merge - prefix, strict=True):
        until = min(left, p)
        left = min(until, m)
        table.append((until / patches, left / patches))
    at = np.linspace(0, len(table) - 1, depth)
    columns = [np.interp(at, np.arange(len(table)), column) ** strength for column in np.transpose(table)]
    return tuple((float(until), float(left)) for until, left in zip(*columns, strict=True))


def candidates(patches: int, granularity: int = 4) -> Int[np.ndarray, "K"]:
    """The patch counts that the published search chooses from: all patches, then fewer by its granularity each."""
    return np.arange(patches, 0, -granularity)


def chances(logits: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """Probability of every candidate, in double precision."""
    chance = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return chance / chance.sum()


def expected(logits: Float[np.ndarray, "K"], patches: int, granularity: int = 4) -> float:
    """The expected candidate."""
    return float(candidates(patches, granularity) @ chances(logits))


def searched(logits: Float[np.ndarray, "K"], patches: int, granularity: int = 4) -> int:
    """Tokens that searched logits keep, class token included: the expected candidate, rounded up.

    Less a hair, since in single precision a whole number may come out above itself.
    """
    return int(np.ceil(expected(logits, patches, granularity) - 1e-4)) + 1


def counted(share: float, patches: int) -> int:
    """A share of the patches as a number, rounded half up, at least 1 of them."""
    return min(patches, max(1, int(patches * share + 0.5)))


def strengths(info: ModelInfo) -> list[float]:
    """Strengths from cheapest to dearest, one for each different layout of counts."""
    rates, patches = fitting(info), info.length - info.prefix
    layouts: dict[Any, float] = {}
    for strength in np.arange(401) / 50:
        layout = tuple(counted(s, patches) for pair in shares(rates, info.depth, strength) for s in pair)
        layouts.setdefault(layout, float(strength))
    return list(reversed(layouts.values()))


@dataclasses.dataclass(frozen=True)
class DiffRate:
    """Prunes and merges by CLS attention, between attention and MLP of every block.

    Attributes:
        rates: released rates by name, such as "ViT-S-DeiT/2.9" (`released()` has all); None: those of the published
            model that is most like this one, with its middle target.
        strength: power of the shares that the rates leave, at least 0; 1 gives the published counts, 0 does nothing.
        prune_kept: in place of rates, tokens that pruning leaves in every block, prefix included; None: it drops none.
        merge_kept: the same for merging, which follows; None: nothing merges.
        sizes: "similarity" scales the size of a token that moves by its similarity, as in the ViTs; "count" does not,
            as in CAFormer.
        min_size: lower bound of sizes; None: as published, not safe.
        shares: set by `hooks`.
        patches: at the input, set by `hooks`.

    Raises:
        ValueError: rates beside counts, an unknown name, a value out of range.
    """

    rates: str | None = None
    strength: float = 1.0
    prune_kept: int | tuple[int, ...] | None = None
    merge_kept: int | tuple[int, ...] | None = None
    sizes: Sizes = "similarity"
    min_size: float | None = 1e-6
    shares: Shares | None = None
    patches: int | None = None

    def __post_init__(self):
        given = self.prune_kept is not None or self.merge_kept is not None
        if given and (self.rates is not None or self.strength != 1):
            raise ValueError(f"rates={self.rates!r}, strength={self.strength}: do not go with prune_kept, merge_kept")
        if self.rates is not None and self.rates not in released():
            raise ValueError(f"rates={self.rates!r}: must be one of {', '.join(released())}")
        if not 0 <= self.strength < np.inf:
            raise ValueError(f"strength={self.strength}: must be at least 0")
        for name in ("prune_kept", "merge_kept"):
            kept = getattr(self, name)
            if any(k < 1 for k in (kept if isinstance(kept, tuple) else () if kept is None else (kept,))):
                raise ValueError(f"{name}={kept}: must be at least 1")
        if self.sizes not in get_args(Sizes):
            raise ValueError(f"sizes={self.sizes!r}: must be one of {', '.join(get_args(Sizes))}")
        if self.min_size is not None and not self.min_size > 0:
            raise ValueError(f"min_size={self.min_size}: must be above 0")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """One hook for every block that leaves something out; shares are of the patches noted at the input."""
        if self.prune_kept is not None or self.merge_kept is not None:
            return self._given(info)
        left, patches, hooks = 1.0, info.length - info.prefix, []
        for layer, pair in enumerate(shares(self.rates or fitting(info), info.depth, self.strength)):
            if pair[1] < left:
                one = dataclasses.replace(self, rates=None, strength=1.0, shares=pair, patches=patches)
                hooks.append(Hook("after_attention", layer, one))
                left = pair[1]
        return noting(hooks)

    def _given(self, info: ModelInfo) -> list[Hook]:
        def per_block(name: str) -> tuple[int, ...]:
            kept = getattr(self, name)
            kept = kept if isinstance(kept, tuple) else (info.length if kept is None else kept,) * info.depth
            if len(kept) != info.depth:
                raise ValueError(f"{name}={kept}: must have one number for each of {info.depth} blocks")
            if min(kept) <= info.prefix:
                raise ValueError(f"{name}={kept}: must be above {info.prefix}, the number of prefix tokens")
            return kept

        left, hooks = info.length, []
        for layer, (prune, merge) in enumerate(zip(per_block("prune_kept"), per_block("merge_kept"), strict=True)):
            if min(prune, merge) < left:
                one = dataclasses.replace(self, prune_kept=prune, merge_kept=merge)
                hooks.append(Hook("after_attention", layer, one))
                left = min(prune, merge)
        return hooks

    def counts(self, patches: int, prefix: int) -> tuple[int, int]:
        """Tokens behind the prefix that pruning and then merging leave, of so many at the input."""
        if self.shares is not None:
            until, left = (counted(share, patches) for share in self.shares)
            return until, left
        prune, merge = self.prune_kept, self.merge_kept
        if isinstance(prune, tuple) or isinstance(merge, tuple) or prune is merge is None:
            raise ValueError(
                f"prune_kept={prune}, merge_kept={merge}: a plan takes one number each; `hooks` spreads the rates"
            )
        until = max(1, prune - prefix) if prune is not None else np.iinfo(np.int32).max
        return until, until if merge is None else min(until, max(1, merge - prefix))

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p, batch = tokens.length, tokens.prefix, tokens.batch
        patches = n - p if self.patches is None else self.patches
        prefix = jnp.broadcast_to(jnp.arange(p), (batch, p))
        until, left = (min(count, n - p) for count in self.counts(patches, p))
        if tokens.valid is None:
            if left >= n - p:
                return None
            order = ranked(tokens, importance(tokens, signals))  # steps 1, 2: the most attended first
            keep, tail = jnp.concatenate([prefix, order[:, :left]], 1), order[:, left:until]  # 3: the rest is pruned
        else:
            table = np.array([(0, 0), *(self.counts(each, p) for each in range(1, patches + 1))], np.int64)
            table = np.minimum(table, n - p).astype(np.int32)
            most = int(np.diff(-table).max())  # that may merge
            if self.shares is None and left >= n - p:
                return None
            own = jnp.minimum(jnp.asarray(table)[input_patches(tokens)], tokens.count()[:, None] - p)
            until_, left_ = own[:, :1], own[:, 1:]
            order = ranked(tokens, importance(tokens, signals), left_[:, 0])
            keep = jnp.where(jnp.arange(left) < left_, order[:, :left], n)
            keep = jnp.concatenate([prefix, keep], 1)
            place = left_ + jnp.arange(most)
            tail = jnp.where(place < until_, rows(order, place, fill=n), n)
        if tail.shape[1] == 0:
            return Plan(HardMap(keep, tail, tail, n), how="keep", carry=noted(tokens))
        merge, similar = join(tokens.x, keep, tail, p)  # step 4: what was not pruned merges
        size = merge.replace(weight=similar) if self.sizes == "similarity" else merge
        return Plan(merge, size=size, how="mean", least=self.min_size, carry=noted(tokens))
