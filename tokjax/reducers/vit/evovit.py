"""Evo-ViT: informative tokens go through the blocks, the others wait and come back.

Paper:  Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022 (arXiv 2108.01390).
Source: YifanXu74/Evo-ViT, `deit/evo_vit.py` (the DeiT models).
Kind:   prune and restore, training-free; static length, int(keep_rate * patches) between selection and return.
Needs:  the CLS row of the attention of every block from the one before the first selection on; without prefix tokens,
        the attention that a token receives.

Steps:
1. Global attention g of a token: what CLS pays to it, g <- (1 - tradeoff) g + tradeoff * attention from block to block;
   the block before the first selection sets it. The published sum over heads and the mean here order tokens alike.
2. Selection, before a block: tokens sorted by g; the first stay, the rest waits in `tokens.carry["evovit.rest"]`.
3. Return, after a block: the rest goes behind the others as it was. Between the two only g of those that stay moves.
4. Stage-wise (the default), a selection is kept for a whole stage; layer-wise, every block selects and gives back.

Where we follow the code against the text: the text updates waiting tokens by a representative one ("fast updating");
the DeiT code gives them back unchanged. The order after a return is that of g, not that of the image.
The models of the paper pool by the mean over all patches; with `restore_last=False` (the code's `prunecls`) nothing
returns behind the last block, which is enough for models that read CLS.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.staged import behind, ranked, select
from tokjax.signals import Signals, importance
from tokjax.token_map import Plan, apply, rows
from tokjax.tokens import Tokens

GLOBAL, REST = "evovit.global", "evovit.rest"


@dataclasses.dataclass(frozen=True)
class EvoViT:
    """Selection before a block, return behind it.

    Attributes:
        keep_rate: share of the patches that goes through a stage, in (0, 1]; the paper's 0.5.
        layers: first blocks of the stages; None: those at one and two thirds of the depth, 4 and 8 of 12.
        stage_wise: one selection for a stage; else one for every block from the first stage on (the code trains so for
            200 epochs, then stage-wise).
        tradeoff: of the attention of a block against what was gathered before.
        restore_last: whether the rest comes back behind the last block; None: not in models that read only CLS.
        layer: set by `hooks`.

    Raises:
        ValueError: a keep rate or tradeoff outside its range, or stages that are not ascending blocks.
    """

    keep_rate: float = 0.5
    layers: tuple[int, ...] | None = None
    stage_wise: bool = True
    tradeoff: float = 0.5
    restore_last: bool | None = None
    layer: int = 0

    def __post_init__(self):
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate}: must be in (0, 1]")
        if not 0 <= self.tradeoff <= 1:
            raise ValueError(f"tradeoff={self.tradeoff}: must be in [0, 1]")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        starts = self._starts(info.depth)
        patches = info.length - info.prefix
        if not starts or self.count(patches) == patches:
            return []
        if not self.stage_wise:
            starts = tuple(range(starts[0], info.depth))
        ends = {start - 1 for start in starts[1:]}
        if info.pooling != "cls" if self.restore_last is None else self.restore_last:
            ends.add(info.depth - 1)
        hooks = []
        for layer in range(max(starts[0] - 1, 0), info.depth):
            one = dataclasses.replace(self, layers=(starts[0],), layer=layer)
            if layer in starts:
                hooks.append(Hook("before_block", layer, one))
            if layer < starts[-1]:
                hooks.append(Hook("after_attention", layer, one, "gather"))
            if layer in ends:
                hooks.append(Hook("after_block", layer, one, "restore"))
        return hooks

    def _starts(self, depth: int) -> tuple[int, ...]:
        if self.layers is None:
            return tuple(sorted({max(depth // 3, 1), max(2 * depth // 3, 1)} & set(range(1, depth))))
        if any(not 1 <= layer < depth for layer in self.layers) or list(self.layers) != sorted({*self.layers}):
            raise ValueError(f"layers={self.layers}: must be ascending and lie in 1 to {depth - 1}")
        return self.layers

    def count(self, patches: int) -> int:
        """Patches that go through a stage."""
        return max(1, int(patches * self.keep_rate))

    def gather(self, tokens: Tokens, signals: Signals) -> Plan:
        """Step 1, between attention and MLP."""
        seen, before = importance(tokens, signals)[:, tokens.prefix :], tokens.carry.get(GLOBAL)
        first = self.layers is not None and self.layer < self.layers[0]
        if before is not None and not first:
            _check(before, tokens)
            seen = (1 - self.tradeoff) * before + self.tradeoff * seen
        return Plan(carry={GLOBAL: seen})

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        """Step 2, before a block."""
        n, p = tokens.length - tokens.prefix, tokens.prefix
        most = min(self.count(n), n)
        score = tokens.carry.get(GLOBAL)
        if score is None:
            raise ValueError(f'carry["{GLOBAL}"] is missing: the block before must gather it, as `hooks` arranges')
        _check(score, tokens)
        counts = None
        if tokens.valid is not None:
            table = np.array([min(self.count(k), k) for k in range(n + 1)], np.int32)
            counts = jnp.asarray(table)[tokens.count() - p]
        whole = jnp.pad(score, ((0, 0), (p, 0)))
        order = ranked(tokens, whole)
        stay = select(tokens, order[:, :most], counts)
        wait = order[:, most:]
        if counts is not None:  # every row waits behind its own count
            wait = behind(tokens, order, counts, n - most)
        alone = tokens.replace(prefix=0, carry={}, aux={})
        rest = apply(Plan(select(alone, wait), how="keep"), alone)
        through = rows(whole, order[:, :most])
        return Plan(stay, how="keep", carry={GLOBAL: through, REST: {"tokens": rest, "global": rows(whole, wait)}})

    def restore(self, tokens: Tokens, signals: Signals) -> Plan:
        """Step 3, behind a block."""
        rest = tokens.carry[REST]
        score = jnp.concatenate([tokens.carry[GLOBAL], rest["global"]], 1)
        return Plan(append=rest["tokens"], carry={GLOBAL: score, REST: None})


def _check(score: Float[Array, "B P"], tokens: Tokens) -> None:
    if score.shape[1] != tokens.length - tokens.prefix:
        raise ValueError(
            f'carry["{GLOBAL}"] is of {score.shape[1]} patches, here are {tokens.length - tokens.prefix}: '
            "no other reducer may change the tokens between the first selection and the last return"
        )
