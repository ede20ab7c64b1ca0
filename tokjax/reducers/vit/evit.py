"""EViT: keep the tokens that CLS attends to, fuse the others into one.

Paper:  Liang et al., "Not All Patches Are What You Need", ICLR 2022 (arXiv 2202.07800).
Source: youweiliang/evit, `evit.py`, `helpers.py:complement_idx`.
Kind:   prune and fuse, training-free; static length prefix + ceil(keep_rate * tokens now) + 1.
Needs:  the CLS row of the attention; without prefix tokens, the attention that a token receives.

Where we follow the code: the fused token is the sum of the others times their CLS attention, not divided by its
sum; it is a normal token afterwards (no size, counted and dropped like any other). Gradients flow through the
attention into it.
"""

import dataclasses

import jax.numpy as jnp

from tokjax.reducers.vit.staged import Staged, ranked, select
from tokjax.signals import Signals, cls_attention, column_mean
from tokjax.token_map import HardMap, Plan
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class EViT(Staged):
    """Pruning by CLS attention with a fused token, between attention and MLP; settings as of `Staged`.

    The paper keeps 0.9 to 0.5. The fused token of one location counts among the tokens of the next.
    """

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        n, p = tokens.length, tokens.prefix
        k = self.count(n - p)
        if k >= n - p:
            return None
        attention = cls_attention(signals) if p else column_mean(signals, tokens.valid)
        counts = None if tokens.valid is None else self.row_counts(tokens)
        order = ranked(tokens, attention, counts)
        fused = jnp.full((tokens.batch, 1), n)  # a slot that only moved tokens fill
        keep = select(tokens, jnp.concatenate([order[:, :k], fused], 1), counts).keep
        if counts is None:
            others = jnp.sort(order[:, k:], -1)
            into = jnp.full_like(others, p + k)
        else:  # every row fuses behind its own count; rows that keep all fuse nothing
            rank, counts = jnp.argsort(order, -1), counts[:, None]
            inside = (rank >= counts) & (rank < tokens.count()[:, None] - p)
            others = jnp.argsort(~inside, axis=-1, stable=True)[:, : n - p - k] + p
            into = jnp.where(jnp.take_along_axis(inside, others - p, 1), p + counts, k + p + 1)
        share = jnp.take_along_axis(attention, others, 1)
        return Plan(HardMap(keep, others, into, n, weight=share), how="sum")
