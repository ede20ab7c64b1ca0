"""Top-K: keep the tokens that CLS attends to, drop the others.

Paper:  the baseline of Liang et al., "EViT", ICLR 2022 (no fusion), and of Haurum et al., "Which Tokens to Use?",
        ICCVW 2023.
Source: youweiliang/evit, `evit.py` without `fuse_token`; JoakimHaurum/TokenReduction, `models/topk.py`.
Kind:   prune, training-free; static length prefix + ceil(keep_rate * patches now).
Needs:  the CLS row of the attention; without prefix tokens, the attention that a token receives.

Where we decide: counts follow EViT's code (of the tokens that are left); `kept` gives the benchmark's tables, whose
code has 196 patches hard-coded. A count of all tokens does nothing (the benchmark's code fails there).
"""

import dataclasses

from tokjax.reducers.vit.staged import Staged, ranked, select
from tokjax.signals import Signals, importance
from tokjax.token_map import Plan
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class TopK(Staged):
    """Pruning by CLS attention, between attention and MLP; settings as of `Staged`. The paper keeps 0.9 to 0.5."""

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        patches = tokens.length - tokens.prefix
        k = self.count(patches)
        if k >= patches:
            return None
        counts = None if tokens.valid is None else self.row_counts(tokens)
        order = ranked(tokens, importance(tokens, signals), counts)
        return Plan(select(tokens, order[:, :k], counts), how="keep")
