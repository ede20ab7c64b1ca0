"""tokjax: token reduction for transformers in JAX.

    model = tokjax.load("facebook/deit-small-patch16-224")
    fast = tokjax.reduce(model, "tome", r=13)
    logits, trace = fast(images, trace=True)

Importing it switches JAX's persistent compilation cache on, unless one is set or `TOKJAX_CACHE=0`. Underneath,
`tokjax.reducers.tome(r=13).plan(Tokens(...), Signals(...))` and `apply(plan, tokens)` work on anybody's arrays.
"""

from tokjax import reducers, relax
from tokjax.api import DualModel, Model, Trace, build, load, reduce, save
from tokjax.compilation import enable_cache
from tokjax.models.decoder import Prompts
from tokjax.models.t5 import Seq2Seq
from tokjax.signals import Context, Signals
from tokjax.token_map import HardMap, Plan, SoftMap, SpreadMap, apply, compose
from tokjax.tokens import Tokens

enable_cache()  # here, since JAX decides at its first compilation whether it keeps programs

__all__ = [
    "Context",
    "DualModel",
    "HardMap",
    "Model",
    "Plan",
    "Prompts",
    "Seq2Seq",
    "Signals",
    "SoftMap",
    "SpreadMap",
    "Tokens",
    "Trace",
    "apply",
    "build",
    "compose",
    "load",
    "reduce",
    "reducers",
    "relax",
    "save",
]
