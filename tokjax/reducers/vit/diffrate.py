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
- Rates of one's own come from `diffrate_search`, as a JSON file for the very depth and number of patches.
- Padded rows (not in the published code) keep their own shares; explicit counts hold for each row as they are.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokjax.errors import UserError
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
        raise ValueError(f"rates={rates!r}: must be one of {', '.join(released())}, or the path of a .json file")
    entry = released()[rates]
    blocks = entry.get("stages", [None])[0]  # of a hierarchical model: those before it pools
    merge = np.array(entry["merge"][:blocks], float)
    prune = merge[:1].repeat(len(merge)) if entry["prune"] is None else np.array(entry["prune"][:blocks], float)
    prefix = entry["prune"] is not None
    table = np.array(falling(prune - prefix, merge - prefix, int(merge[0]) - prefix))
    at = np.linspace(0, len(table) - 1, depth)
    columns = [np.interp(at, np.arange(len(table)), column) ** strength for column in np.transpose(table)]
    return tuple((float(until), float(left)) for until, left in zip(*columns, strict=True))


def falling(prune: Float[np.ndarray, "L"], merge: Float[np.ndarray, "L"], patches: int) -> list[Shares]:
    """Patches that each block is told to leave as shares that fall: the smallest count so far holds."""
    table = []
    left = float(patches)
    for p, m in zip(prune.tolist(), merge.tolist(), strict=True):
        until = min(left, p)
        left = min(until, m)
        table.append((until / patches, left / patches))
    return table


class Table(TypedDict):
    """Rates of one model. Kept tokens have the prefix in them."""

    depth: int
    patches: int
    prefix: int
    prune_kept: list[int]  # of every block
    merge_kept: list[int]
    gmacs: NotRequired[float]  # of the model with them, by the published formula
    macs: NotRequired[float]  # the same as a share of the full model's
    target: NotRequired[float]  # the share that was asked for


def read_table(path: str | Path) -> Table:
    """Rates from a JSON file, as `diffrate_search` makes them.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        table = json.loads(Path(path).expanduser().read_text())
        counts = [table[name] for name in ("depth", "patches", "prefix")]
        lists = [table[name] for name in ("prune_kept", "merge_kept")]
        whole = all(type(n) is int for n in (*counts, *lists[0], *lists[1]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"rates={str(path)!r}: no table of rates can be read there: {error!r}") from error
    if not whole or any(len(kept) != table["depth"] for kept in lists):
        raise UserError(f"rates={str(path)!r}: needs one whole number for each block in prune_kept and merge_kept")
    if min(*lists[0], *lists[1]) <= table["prefix"]:
        raise UserError(f"rates={str(path)!r}: leaves no more than the prefix of {table['prefix']} in some block")
    return table


def of_table(rates: str, info: ModelInfo, strength: float) -> tuple[Shares, ...]:
    """The shares of a table in a file, which must be one for this model."""
    table, patches = read_table(rates), info.length - info.prefix
    for name, has, needs in (("depth", table["depth"], info.depth), ("patches", table["patches"], patches)):
        if has != needs:
            raise UserError(f"rates={rates!r}: is a table for {name}={has}; this model has {name}={needs}")
    prune, merge = (np.array(kept, float) - table["prefix"] for kept in (table["prune_kept"], table["merge_kept"]))
    return tuple((until**strength, left**strength) for until, left in falling(prune, merge, patches))


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
            model that is most like this one, with its middle target; or the path of a `.json` file (`read_table`).
        strength: power of the shares that the rates leave, at least 0; 1 gives the published counts, 0 does nothing.
        prune_kept: in place of rates, tokens that pruning leaves in every block, prefix included; None: it drops none.
        merge_kept: the same for merging, which follows; None: nothing merges.
        sizes: "similarity" scales the size of a token that moves by its similarity, as in the ViTs; "count" does not,
            as in CAFormer.
        min_size: lower bound of sizes; None: as published, not safe.
        shares: set by `hooks`.
        patches: at the input, set by `hooks`.

    Raises:
        ValueError: rates beside counts, an unknown name, a value out of range; a table that cannot be read or is one
            for another depth or number of patches.
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
        if self.rates is not None and self.from_file:
            read_table(self.rates)
        elif self.rates is not None:
            shares(self.rates, 1)
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

    @property
    def from_file(self) -> bool:
        return self.rates is not None and self.rates.endswith(".json")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """One hook for every block that leaves something out; shares are of the patches noted at the input."""
        if self.prune_kept is not None or self.merge_kept is not None:
            return self._given(info)
        left, patches, hooks = 1.0, info.length - info.prefix, []
        if self.rates is not None and self.from_file:
            pairs = of_table(self.rates, info, self.strength)
        else:
            pairs = shares(self.rates or fitting(info), info.depth, self.strength)
        for layer, pair in enumerate(pairs):
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
            keep, tail = parted(tokens, importance(tokens, signals), own, left, most)
        if tail.shape[1] == 0:
            return Plan(HardMap(keep, tail, tail, n), how="keep", carry=noted(tokens))
        merge, similar = join(tokens.x, keep, tail, p)  # step 4: what was not pruned merges
        size = merge.replace(weight=similar) if self.sizes == "similarity" else merge
        return Plan(merge, size=size, how="mean", least=self.min_size, carry=noted(tokens))


def parted(
    tokens: Tokens, score: Float[Array, "B N"], own: Int[Array, "B 2"], left: int, most: int
) -> tuple[Int[Array, "B M"], Int[Array, "B R"]]:
    """Who stays and who merges, where every row has counts of its own; N is nobody.

    Args:
        tokens: padded or not.
        score: the best stay, the next merge, the others are pruned.
        own: tokens behind the prefix that pruning and then merging leave in each row.
        left: slots behind the prefix for those that stay.
        most: slots for those that merge.
    """
    n, until_, left_ = tokens.length, own[:, :1], own[:, 1:]
    order = ranked(tokens, score, left_[:, 0])
    prefix = jnp.broadcast_to(jnp.arange(tokens.prefix), (tokens.batch, tokens.prefix))
    keep = jnp.where(jnp.arange(left) < left_, order[:, :left], n)
    place = left_ + jnp.arange(most)
    tail = jnp.where(place < until_, rows(order, place, fill=n), n)
    return jnp.concatenate([prefix, keep], 1), tail
