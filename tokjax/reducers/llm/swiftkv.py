"""SwiftKV: a prompt's tokens leave a decoder half-way, having left the keys and values of all later blocks behind.

Paper:  Qiao et al., "SwiftKV: Fast Prefill-Optimized Inference with Knowledge-Preserving Model Transformation", 2024.
Source: snowflakedb/ArcticTraining, `projects/swiftkv` (its LLaMA and its training, which has groups that share keys);
        snowflakedb/ArcticInference has the same without groups.
Kind:   depth; changes the model, whose new projections want distillation. Static length.
Needs:  nothing of the tokens: which logits are asked for decides.

Blocks from `layer` on make keys and values of the residual stream that enters the first of them, through one norm that
they share, for tokens that are made as for those that are read. So a prompt's tokens have nothing more to do there but
the last one, whose logits begin the text. Where logits are wanted everywhere (a call of the model, training) all tokens
run through all blocks, and the numbers are the same.

`tokjax.reduce` changes the model by `Model.share_keys`, which copies its own norm and projections, and leaves one that
has shared keys already (after distillation, or read from a file) as it is. `frozen` tells what does not train; the loss
is `tokjax.train.losses.swift_kv`. The published recipe: learning rate 2e-4, no weight decay, warm-up over 5 % of one
epoch of 1.5 M conversations, groups of 1.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from tokjax.hooks import Hook, ModelInfo
from tokjax.signals import Signals, last_slot
from tokjax.token_map import HardMap, Plan
from tokjax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class SwiftKV:
    """Prefill that ends at `layer` for all tokens but the last.

    Attributes:
        layer: K, of blocks that all tokens pass; a float up to 1 is a share of the model's. Published: 0.5 for LLaMA
            3.1, 0.75 for Qwen2.5. All of them: the model stays as it is.
        group: G, so many later blocks share keys and values; published: 1. The cache then has K + (L - K) / G buffers.
        shares: shared projections begin as the mean of those of their blocks; "reference" divides by G even where a
            last group has fewer blocks, as the published code does.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    layer: int | float = 0.5
    group: int = 1
    shares: Literal["mean", "reference"] = "mean"

    def __post_init__(self):
        # A config whose default is a share makes floats of numbers of blocks too.
        if self.layer > 1 and float(self.layer).is_integer():
            object.__setattr__(self, "layer", int(self.layer))
        if isinstance(self.layer, float) and not 0 <= self.layer <= 1:
            raise ValueError(f"layer={self.layer}: must be in [0, 1] as a share, or a number of blocks")
        if self.layer < 0:
            raise ValueError(f"layer={self.layer}: must be at least 0")
        if self.group < 1:
            raise ValueError(f"group={self.group}: must be at least 1")
        if self.shares not in ("mean", "reference"):
            raise ValueError(f"shares={self.shares!r}: must be one of mean, reference")

    def first(self, info: ModelInfo) -> int:
        """K for a model.

        Raises:
            ValueError: more than its blocks.
        """
        layer = round(self.layer * info.depth) if isinstance(self.layer, float) else self.layer
        if layer > info.depth:
            raise ValueError(f"layer={self.layer}: must be at most the {info.depth} blocks of the model")
        return layer

    def change(self, model: Any) -> Any:
        """The model that the hooks are for, see `tokjax.Model.share_keys`."""
        return model.share_keys(self.first(model.info), self.group, self.shares)

    def hooks(self, info: ModelInfo) -> list[Hook]:
        first = self.first(info)
        return [] if first == info.depth else [Hook("before_block", first, self)]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        if not signals.context.reading or tokens.length == 1:
            return None
        nobody = jnp.zeros((tokens.batch, 0), jnp.int32)
        return Plan(HardMap(last_slot(tokens)[:, None], nobody, nobody, tokens.length), how="keep")


def frozen(layer: int) -> tuple[str, ...]:
    """Expressions for `optimiser.frozen` that leave to train what distillation trains: the shared norm, and the
    projections to queries, keys and values from block `layer` on.
    """
    below = "|".join(map(str, range(layer)))
    others = "embedding|positions|(?:project_in|project_out|head|norm)/.*", r"blocks/\d+/(?!attn/(?:q|kv)/).*"
    return (*others, rf"blocks/(?:{below})/.*") if layer else others


def layers(info: ModelInfo) -> list[int]:
    """Every K of a model, from the cheapest."""
    return list(range(info.depth + 1))
