"""DiffRate's search: how many tokens every block prunes and merges, learned by gradient under a target of MACs.

Paper:  Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023
        (arXiv 2305.17997).
Source: OpenGVLab/DiffRate, `DiffRate/ddp.py`, `DiffRate/merge.py`, `DiffRate/patch/{deit,mae}.py`, `engine.py`.
Kind:   prune + hard merge; what learns is one softmax over candidate counts for each block and operation, while the
        network stays as it is. Length unchanged while it learns, dynamic with what was learned.
Needs:  the CLS row of the attention (without prefix tokens, the attention that a token receives), and the features.

A count is the expected candidate, rounded up with a straight-through gradient. Learning (`masked=True`), the sequence
keeps its length: tokens are sorted by importance, a mask ends it at the count, and the gradient of the mask is that of
the probability that a place is kept. Attention is the policy softmax from the first mask on. `aux` of the hook at the
input has the term `loss/flops` = weight * (F - target)^2, F itself (`macs`) and the tokens that each block leaves
(`kept`).

Published recipe: cross-entropy + `loss/flops`, frozen network, AdamW of learning rate 0.01 without weight decay, 3
epochs of ImageNet at batch 1024, cosine to 0.001, DeiT's augmentation, stochastic depth 0.1.

With what was learned (`masked=False`) the counts are still arrays, so that jit knows no lengths: every block has N
slots, of which the empty ones are invalid, and is as slow as without reduction. `table` writes the counts down for
`diffrate`, which keeps the same tokens at their real cost: `diffrate` with `rates="rates.json"`.

Where we follow the code against the text:
- F has one patch embedding too many (`tokjax.bench.flops.vit_macs`, convention "diffrate"), and leaves out what the
  reduction itself costs.
- The smallest count so far holds; its gradient goes to both counts of the block, none to the tokens that came in.
- Sizes are at least 1 while it learns, so that merged tokens weigh a little more than they will without masks.

Where we decide:
- The published term is in G multiply-adds, for DeiTs. With the target as a share (`target`), F is counted in units of
  which the full model has 4.6, which are the G of DeiT-S, so that the weight of 5 means the same to any model.
- A sum a hair above a whole number is not rounded up; blocks that are not compressed are left alone altogether.
- Padded rows (not in the published code) keep their own shares, and read the probabilities at the same share.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from tokjax.errors import UserError
from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.diffrate import Table, parted
from tokjax.reducers.vit.staged import input_patches, noted, noting, ranked
from tokjax.reducers.vit.tome import join
from tokjax.relax import expected_count, kept_probability, ste_ceil, straight_through
from tokjax.signals import Signals, importance
from tokjax.token_map import HardMap, Plan, rows
from tokjax.tokens import Tokens
from tokjax.writing import write_whole

SLACK = 1e-4  # in single precision a whole number may come out above itself
DEIT_S = 4.6  # G multiply-adds
SHARE = 0.63  # of them that the published target of 2.9 leaves
G = 1e9


def candidates(patches: int, granularity: int = 4) -> Int[np.ndarray, "K"]:
    """The patch counts to choose from: all patches, then fewer by the granularity each."""
    return np.arange(patches, 0, -granularity)


def targets(info: ModelInfo) -> list[float]:
    """Shares of the full model's multiply-accumulates that can be learned, in steps of a hundredth."""
    lowest = DiffRateSearch(info, target=1.0).lowest
    return [share / 100 for share in range(1, 101) if share / 100 >= lowest]


def kept_mask(
    kept: Float[Array, "#B 1"],
    last: Int[Array, "#B 1"],
    probability: Float[Array, "#B N"],
) -> Float[Array, "B N"]:
    """Zeros at the places from `kept` to `last` of a sorted sequence, ones elsewhere; the gradient of the probability.

    A sequence that is shorter already is left as it is, without gradient.
    """
    place = jnp.arange(probability.shape[-1])
    mask = straight_through((place < kept) | (place >= last), probability)
    return jnp.where(kept < last, mask, 1.0)


def least(own: Float[Array, ""], prune: Float[Array, ""], merge: Float[Array, ""]) -> Float[Array, ""]:
    """The smallest of three counts, whose gradient goes to the latter two, in full to each."""
    return straight_through(jnp.minimum(own, jnp.minimum(prune, merge)), prune + merge)


def merged(tokens: Tokens, order: Int[Array, "B N"], left: Int[Array, "B 1"], until: Int[Array, "B 1"]) -> Plan:
    """Sorts, and adds the tokens at the places from `left` to `until` to the most similar ones before them.

    They stay in the sequence, their size scaled by the similarity and at least 1, as it is counted where they go.

    Args:
        tokens: with their sizes.
        order: of all tokens, the prefix first.
        left: places, the prefix included, that take tokens in.
        until: places behind which none is looked at.
    """
    n = tokens.length
    place = jnp.arange(n)
    tail = (place >= left) & (place < until)
    merge, similar = join(tokens.x, jnp.where(place < left, order, n), jnp.where(tail, order, n), tokens.prefix)
    size = rows(tokens.sizes(), merge.moved, fill=1)
    weight = jnp.where(size * similar >= 1, similar, 1 / size)
    sizes = HardMap(
        jnp.where(tail, n, order),
        jnp.concatenate([merge.moved, merge.moved], 1),
        jnp.concatenate([merge.into, jnp.where(tail, place, n)], 1),
        n,
        jnp.concatenate([weight, weight], 1),
    )
    return Plan(HardMap(order, merge.moved, merge.into, n), size=sizes, how="mean")


class Rate(nnx.Module):
    """One block that is compressed: the logits of its two counts."""

    def __init__(self, layer: int, patches: int, granularity: int, min_size: float | None):
        self.layer, self.patches, self.granularity, self.min_size = layer, patches, granularity, min_size
        number = len(candidates(patches, granularity))
        self.prune, self.merge = (nnx.Param(jnp.zeros(number, jnp.float32)) for _ in range(2))

    @property
    def candidates(self) -> Int[np.ndarray, "K"]:
        return candidates(self.patches, self.granularity)

    def kept(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Patches that pruning and merging are told to keep: whole numbers, with a gradient."""
        prune, merge = (expected_count(logits[...], self.candidates) for logits in (self.prune, self.merge))
        return ste_ceil(prune, SLACK), ste_ceil(merge, SLACK)

    def counts(self, tokens: Tokens, now: Int[Array, "B"]) -> Int[Array, "B 2"]:
        """Patches that pruning and then merging leave in each row, of those that it has now."""
        patches = input_patches(tokens)[:, None]
        kept = jax.lax.stop_gradient(jnp.stack(self.kept())).astype(jnp.int32)
        own = jnp.maximum((2 * patches * kept + self.patches) // (2 * self.patches), jnp.minimum(patches, 1))
        until = jnp.minimum(own[:, :1], now[:, None])
        return jnp.concatenate([until, jnp.minimum(until, own[:, 1:])], 1)

    def plan(self, tokens: Tokens, signals: Signals) -> Plan:
        """With what was learned; every slot that it empties is invalid."""
        patches = tokens.length - tokens.prefix
        own = self.counts(tokens, tokens.count() - tokens.prefix)
        keep, tail = parted(tokens, importance(tokens, signals), own, patches, patches)
        merge, similar = join(tokens.x, keep, tail, tokens.prefix)
        size = merge.replace(weight=similar)
        there = keep < tokens.length
        return Plan(merge, size=size, how="mean", least=self.min_size, valid=there, carry=noted(tokens))

    def mask(self, tokens: Tokens, signals: Signals) -> Plan:
        """While it learns."""
        n, p, batch = tokens.length, tokens.prefix, tokens.batch
        inside = jnp.ones((batch, n), bool) if tokens.valid is None else tokens.valid
        gate = inside.astype(jnp.float32) if tokens.gate is None else tokens.gate
        there = inside & (gate > 0.5)
        now = there.sum(1, dtype=jnp.int32) - p
        # 1: the most attended first, masked ones behind them.
        order = ranked(tokens, jnp.where(there, importance(tokens, signals), -1))
        order = jnp.concatenate([jnp.broadcast_to(jnp.arange(p), (batch, p)), order], 1)
        gate = rows(gate, order)
        # 2: pruning ends the sequence at one count, merging at another.
        own = p + self.counts(tokens, now)
        until, left, last = own[:, :1], own[:, 1:], p + now[:, None]
        prune, merge = (self.probability(logits[...], tokens) for logits in (self.prune, self.merge))
        gate = gate * kept_mask(until, last, prune) * kept_mask(left, until, merge)
        # 3: what lies between the two counts merges.
        return merged(tokens, order, left, until).replace(gate=gate, carry=noted(tokens))

    def probability(self, logits: Float[Array, "K"], tokens: Tokens) -> Float[Array, "#B N"]:
        """That each place of the sorted sequence is kept; a row with fewer patches reads it at the same share."""
        p, patches = tokens.prefix, tokens.length - tokens.prefix
        kept = kept_probability(logits, self.candidates, self.patches)
        if tokens.valid is None and patches == self.patches:
            kept = kept[None]
        else:
            at = jnp.arange(patches) * self.patches // jnp.maximum(input_patches(tokens), 1)[:, None]
            kept = kept[jnp.minimum(at, self.patches - 1)]
        return jnp.concatenate([jnp.ones((len(kept), p)), kept], 1)


class DiffRateSearch(nnx.Module):
    """Prunes and merges by CLS attention, in counts that learn.

    Args:
        info: of the model.
        target: share of the full model's multiply-accumulates F, in (0, 1]; at 1 there is nothing to learn.
        gmacs: the same in 10^9 multiply-accumulates, in place of `target`; None for both: target = 0.63.
        weight: of the term `loss/flops`; see the module on its scale.
        granularity: step between the candidate counts.
        protected: blocks that are not compressed; None: the first, and the last too where the head does not read CLS.
        min_size: lower bound of sizes, with what was learned; None: as published, not safe.
        chord: whether the gradient towards dropped tokens is bounded, see `tokjax.relax.policy_softmax`; the published
            one is not, and where attention is sharp a few images outweigh all others and the target by far.
        masked: whether to mask instead of to drop, for learning.

    Raises:
        ValueError: a value out of range, or a target that no counts reach.
    """

    def __init__(
        self,
        info: ModelInfo,
        target: float | None = None,
        gmacs: float | None = None,
        weight: float = 5.0,
        granularity: int = 4,
        protected: tuple[int, ...] | None = None,
        min_size: float | None = 1e-6,
        chord: bool = False,
        masked: bool = False,
    ):
        if target is not None and gmacs is not None:
            raise ValueError(f"target={target}, gmacs={gmacs}: give one of the two")
        if not granularity >= 1:
            raise ValueError(f"granularity={granularity}: must be at least 1")
        if not 0 < weight < np.inf:
            raise ValueError(f"weight={weight}: must be above 0 and finite")
        if min_size is not None and not min_size > 0:
            raise ValueError(f"min_size={min_size}: must be above 0")
        if protected is None:
            protected = (0,) if info.pooling == "cls" else (0, info.depth - 1)
        if not all(0 <= layer < info.depth for layer in protected):
            raise ValueError(f"protected={protected}: must be blocks of 0 to {info.depth - 1}")
        self.info, self.weight, self.chord, self.masked = info, weight, chord, masked
        full = float(self.flops([None] * info.depth)[0])
        share = SHARE if target is None else target
        goal = share if gmacs is None else gmacs * G / full
        self.unit = G if gmacs is not None else full / DEIT_S
        self.wanted = goal * full / self.unit
        open_ = tuple(layer for layer in range(info.depth) if layer not in protected)
        patches = info.length - info.prefix
        fewest = (int(candidates(patches, granularity)[-1]) + info.prefix,) * 2
        self.lowest = self.flops([fewest if layer in open_ else None for layer in range(info.depth)])[0] / full
        if not self.lowest <= goal <= 1:
            name, value, scale = ("target", share, 1.0) if gmacs is None else ("gmacs", gmacs, full / G)
            raise ValueError(
                f"{name}={value}: must be in {self.lowest * scale:.4g} to {scale:.4g}, from the fewest tokens in all "
                f"blocks but protected={protected} to the full model"
            )
        learning = () if goal == 1 else open_
        self.stages = nnx.List([Rate(layer, patches, granularity, min_size) for layer in learning])

    def hooks(self, info: ModelInfo) -> list[Hook]:
        if info.depth != self.info.depth:
            raise ValueError(f"depth={info.depth}: these rates were made for depth={self.info.depth}")
        if not self.masked:
            return noting([Hook("after_attention", stage.layer, stage) for stage in self.stages])
        hooks = noting([Hook("after_attention", stage.layer, stage, "mask") for stage in self.stages])
        hooks += [Hook("attend", layer, self, "attend") for layer in range(info.depth)] if hooks else []
        return [*hooks, Hook("input", 0, self, "cost")]

    def attend(self, tokens: Tokens, signals: Signals) -> Signals:
        """The policy softmax of the masks so far; the same attention as ever before the first of them."""
        if tokens.gate is None:
            return signals
        rule = dataclasses.replace(signals.rule, normaliser="policy", chord=self.chord)
        return signals.replace(policy=tokens.gate, rule=rule)

    def flops(self, counts: list[Any]) -> tuple[Any, list[Any]]:
        """F of one image for the (pruning, merging) counts of every block, and the tokens that it leaves.

        Counts have the prefix in them; None: the block is not compressed.
        """
        c: int = self.info.width
        n: Any = self.info.length
        total, left = float(n * c * self.info.patch + c * self.info.classes), []
        for pair in counts:
            total = total + 4 * n * c**2 + 2 * n**2 * c
            if pair is not None:
                traced = any(isinstance(value, jax.Array) for value in (n, *pair))
                n = least(jnp.float32(n), *pair) if traced else min(n, *pair)
            total = total + n * self.info.mlp_macs
            left.append(n)
        return total, left

    def cost(self, tokens: Tokens, signals: Signals) -> Plan:
        """The term of the loss, with what it is made of."""
        kept = {stage.layer: stage.kept() for stage in self.stages}
        prefix = self.info.prefix
        pairs = [tuple(k + prefix for k in kept[i]) if i in kept else None for i in range(self.info.depth)]
        macs, left = self.flops(pairs)
        loss = self.weight * (macs / self.unit - self.wanted) ** 2
        notes = {"loss/flops": loss, "macs": macs, "kept": jnp.stack([jnp.float32(n) for n in left])}
        return Plan(aux=jax.tree.map(jnp.float32, notes))

    def table(self, params: Any = None) -> Table:
        """The counts of every block, for `diffrate`; those of `params` (as in `Model.params["reducers"][index]`).

        Raises:
            UserError: logits that are not finite.
        """
        here = self if params is None else nnx.merge(nnx.split(self)[0], params)
        p, patches, depth = self.info.prefix, self.info.length - self.info.prefix, self.info.depth
        kept: dict[str, list[int]] = {name: [patches + p] * depth for name in ("prune", "merge")}
        for stage in here.stages:
            for name, counts in kept.items():
                counts[stage.layer] = p + searched(getattr(stage, name)[...], stage.candidates, f"{stage.layer}.{name}")
        macs, _ = self.flops(list(zip(kept["prune"], kept["merge"], strict=True)))
        full, _ = self.flops([None] * depth)
        return {
            "depth": depth,
            "patches": patches,
            "prefix": p,
            "prune_kept": kept["prune"],
            "merge_kept": kept["merge"],
            "gmacs": macs / G,
            "macs": macs / full,
            "target": self.wanted * self.unit / full,
        }

    def settled(self, params: Any) -> tuple[str, dict[str, Any]]:
        """Registered name and settings that do the same with static lengths.

        Raises:
            UserError: logits that are not finite.
        """
        table = self.table(params)
        return "diffrate", {name: tuple(table[name]) for name in ("prune_kept", "merge_kept")}

    def write_table(self, path: str | Path, params: Any = None) -> None:
        """Writes `table` as JSON, which `diffrate` reads."""
        text = json.dumps(self.table(params), indent=1)
        write_whole(Path(path), lambda staged: Path(staged).write_text(text))


def searched(logits: Float[Array, "K"], counts: Int[np.ndarray, "K"], name: str = "logits") -> int:
    """The patches that logits keep, in double precision: the expected candidate, rounded up less a hair.

    Raises:
        UserError: logits that are not finite.
    """
    values = np.asarray(logits, np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"{name}: {(~np.isfinite(values)).sum()} of its {len(values)} logits are not finite")
    chance = np.exp(values - values.max())
    return int(np.ceil(counts @ (chance / chance.sum()) - SLACK))
