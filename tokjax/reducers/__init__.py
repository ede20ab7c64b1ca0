"""The registry: every reducer by name, with what a user and the tests must know of it.

`tokjax.reducers.tome(r=13)` makes one; its `plan(tokens, signals)` with `tokjax.apply(plan, tokens)` needs no model
of ours. Adding a method is one file beside these and one entry here.

MTO (Masked Token Optimization, ECCV 2024) is left out: there is no published code, nor equations that would decide what
it computes, and it removes no token at inference.
"""

from collections.abc import Callable, Mapping
import dataclasses
import difflib
import inspect
import math
from typing import Any, Literal

from tokjax import schedules
from tokjax.hooks import ModelInfo, Reducer
from tokjax.reducers.chain import Chain, levels
from tokjax.reducers.diffusion.tomesd import ToMeSD
from tokjax.reducers.diffusion.tomesd import rates as merge_rates
from tokjax.reducers.llm.byte_baselines import BoundaryPooling, ByteFixed, ByteRandom, ConvPooling
from tokjax.reducers.llm.eviction import H2O, RandomCache, RecencyCache, SnapKV, StreamingLLM
from tokjax.reducers.llm.fastv import FastV
from tokjax.reducers.llm.fastv import rates as fastv_rates
from tokjax.reducers.llm.mrt5 import MrT5
from tokjax.reducers.llm.prompt_merging import PromptMerging
from tokjax.reducers.llm.prompt_merging import rates as pair_rates
from tokjax.reducers.llm.skipdecode import SkipDecode, speedups
from tokjax.reducers.llm.swiftkv import SwiftKV
from tokjax.reducers.llm.swiftkv import layers as swiftkv_layers
from tokjax.reducers.vit.aclip import AClip, super_patch
from tokjax.reducers.vit.ats import ATS
from tokjax.reducers.vit.clca import CLCA
from tokjax.reducers.vit.controls import AvgPool, Random, Strided
from tokjax.reducers.vit.diffrate import DiffRate, strengths
from tokjax.reducers.vit.diffrate_search import DiffRateSearch, targets
from tokjax.reducers.vit.dpcknn import DPCKNN
from tokjax.reducers.vit.dynamicvit import DynamicViT
from tokjax.reducers.vit.evit import EViT
from tokjax.reducers.vit.evovit import EvoViT
from tokjax.reducers.vit.gtp import GTP
from tokjax.reducers.vit.heuristic import Heuristic
from tokjax.reducers.vit.kmedoids import KMedoids
from tokjax.reducers.vit.patchmerger import PatchMerger
from tokjax.reducers.vit.pitome import PiToMe, lengths
from tokjax.reducers.vit.scored import Scored
from tokjax.reducers.vit.sinkhorn import Sinkhorn
from tokjax.reducers.vit.sit import SiT
from tokjax.reducers.vit.token_transforming import TokenTransforming
from tokjax.reducers.vit.tokenlearner import TokenLearner
from tokjax.reducers.vit.tome import ToMe
from tokjax.reducers.vit.topk import TopK

Law = Literal[
    "batch",  # a row does not depend on the rows beside it
    "jit",  # eager, jitted and mapped over a further axis, it gives the same
    "padding",  # a padded row gives what the row alone gives
    "size",  # sizes are positive, and add up where they are conserved
    "prefix",  # prefix tokens stay as they are
    "unmerge",  # the map, its matrix and its un-merging agree; reducing undoes un-merging
    "origin",  # positions and kinds follow the anchor, the traced origin follows the map
    "finite",  # no NaN from valid input
    "gradient",  # nor in gradients
    "bf16",  # plans are made in float32, features keep their dtype
    "shapes",  # lengths are static, or have a valid mask, as declared
    "identity",  # neutral settings do nothing
    "knob",  # the knob's values go from cheapest to dearest
    "model",  # it runs inside a model, and tokens become fewer
    "collective",  # no collective under shard_map over the batch
    "automatic",  # nor under automatic sharding
    "lowering",  # it lowers for TPU and CUDA, with a symbolic batch
]


Phase = Literal["call", "prefill", "decode"]


def _finer(cheap: Any, dear: Any, locations: int) -> list[Any]:
    """Between two rates, fifteen more: those that keep as many at the first location part at the later ones."""
    if not isinstance(cheap, float):
        return []
    return [cheap + (dear - cheap) * step / 16 for step in range(1, 16)]


def _one_more_in_some(cheap: Any, dear: Any, locations: int) -> list[Any]:
    """Between two neighbouring numbers of tokens to remove, one more in the first blocks only."""
    return [(cheap,) * more + (dear,) * (locations - more) for more in range(locations - 1, 0, -1)]


@dataclasses.dataclass(frozen=True)
class Knob:
    """The one setting that turns a reducer's cost, with its values from cheapest to dearest.

    Attributes:
        field: of the reducer.
        range: what may be given, in words.
        values: those to search, for a model.
        between: finer settings between two neighbours and the number of blocks that reduce, in the same order.
        learned: whether the cost follows the knob by training only, so that nothing can be solved before.
    """

    field: str
    range: str
    values: Callable[[ModelInfo], list[Any]]
    between: Callable[[Any, Any, int], list[Any]] = _finer
    learned: bool = False


def _rates(info: ModelInfo) -> list[float]:
    patches = info.length - info.prefix
    rates = ((k, k / patches) for k in range(1, patches + 1))
    # Some products round up over k, and their ceiling with them: a hair less keeps k tokens.
    return [rate if schedules.kept(rate, patches) == k else math.nextafter(rate, 0) for k, rate in rates]


def _removed(info: ModelInfo) -> list[int]:
    return list(range((info.length - info.prefix) // 2, -1, -1))


def _merging_rates(info: ModelInfo) -> list[float]:
    """One rate for every course of lengths that some rate gives."""
    courses = {lengths(k / 400, info.length - info.prefix, info.depth): k / 400 for k in range(200, 401)}
    return list(courses.values())


def _all_but_one(info: ModelInfo) -> list[int]:
    return list(range(info.length - info.prefix - 1, -1, -1))


def _tabled_rates(info: ModelInfo) -> list[float]:
    patches = info.length - info.prefix
    rates = ((k, k / patches) for k in range(1, patches + 1))
    # Some products round down below k, and their floor with them: a hair more keeps k tokens.
    return [rate if schedules.kept_table(rate, patches, 1) == (k,) else math.nextafter(rate, 1) for k, rate in rates]


def _ring_rates(info: ModelInfo) -> list[float]:
    """One rate for every pattern that some rate gives."""
    patterns = {Heuristic(rate).radii(info): rate for rate in _tabled_rates(info)}
    return sorted(patterns.values())


def _masking_rates(info: ModelInfo) -> list[float]:
    sides = (1, 1) if info.grid is None else super_patch(info.grid, AClip.pool)
    total = (info.length - info.prefix) // (sides[0] * sides[1])
    rates = ((k, k / total) for k in range(total))
    return [rate if int(total * rate) == k else math.nextafter(rate, 1) for k, rate in rates]


def _slots(info: ModelInfo) -> list[int]:
    return list(range(1, info.length - info.prefix + 1))


KEEP_RATE = Knob("keep_rate", "(0, 1], lower is cheaper", _rates)
TABLED_RATE = Knob("keep_rate", "(0, 1], to the power of the location, lower is cheaper", _tabled_rates)
MERGING_RATE = Knob("keep_rate", "[0.5, 1], lower is cheaper", _merging_rates)
STRENGTH = Knob("strength", "at least 0, higher is cheaper", strengths)
RINGS = Knob("keep_rate", TABLED_RATE.range, _ring_rates)
REMOVED_BUT_ONE = Knob("r", "0 to all patches but one, higher is cheaper", _all_but_one, _one_more_in_some)
PROPAGATED = Knob("propagated", "0 to all patches but one, higher is cheaper", _all_but_one)


def _deleted(info: ModelInfo) -> list[float]:
    patches = info.length - info.prefix
    return [gone / patches for gone in range(patches - 1, -1, -1)]


def _budgets(info: ModelInfo) -> list[float]:
    rates = ((k, k / info.length) for k in range(1, info.length + 1))
    return [rate if int(info.length * rate) == k else math.nextafter(rate, 1) for k, rate in rates]


def _strides(info: ModelInfo) -> list[int]:
    return list(range(info.length - info.prefix, 0, -1))


BUDGET = Knob("budget", "(0, 1], of the prompt's tokens in the cache, lower is cheaper", _budgets)
CAPACITY = Knob("capacity", "1 to all tokens, lower is cheaper", _slots)
REMOVED = Knob("r", "0 to half of the patches, higher is cheaper", _removed, _one_more_in_some)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered reducer.

    Attributes:
        kind: what its map is.
        paper: authors, year, place.
        needs: signals that its plan reads.
        length: "static", or "dynamic" where it depends on the data.
        padding: whether it obeys the law of padding.
        knob: what `tokjax.budget.solve` turns.
        control: whether it is a baseline that looks at no content.
        conserves: whether sizes are tracked and add up to what they were.
        neutral: settings with which it does nothing.
        guided: whether it reduces only what the context guides it to, as in training; a model alone stays as it is.
        text: whether it is made for texts, so that comparisons on images leave it out.
        phase: what it makes cheaper, and of what `tokjax.budget.solve` counts the cost: a call, or what only a decoder
            with a cache has: reading a prompt ("prefill"), or going on behind it ("decode").
        learned: whether it has parameters; it is made with the `ModelInfo` of its model as the first argument.
        training: settings that it has while it learns (masks in place of pruning), with the same parameters.
        losses: names of the terms that it then adds to the loss, see `tokjax.hooks.losses`.
        over_heads: whether its plan reads sums over all heads of attention. Where heads are split over devices these
            are what a reducer sends, and all that it sends.
        example: settings for the contract tests, where the defaults would not reduce 17 tokens.
        exempt: laws of the contract tests that do not hold, with the reason.
    """

    make: Callable[..., Reducer]
    kind: str
    paper: str
    needs: tuple[str, ...]
    knob: Knob
    neutral: Mapping[str, Any]
    length: Literal["static", "dynamic"] = "static"
    padding: bool = True
    control: bool = False
    conserves: bool = False
    guided: bool = False
    text: bool = False
    phase: Phase = "call"
    learned: bool = False
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    losses: tuple[str, ...] = ()
    over_heads: bool = False
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exempt: Mapping[Law, str] = dataclasses.field(default_factory=dict)

    @property
    def decoder(self) -> bool:
        """Whether it needs a decoder with a cache: laws of plans and models of images leave it out."""
        return self.phase != "call"


REGISTRY: dict[str, Entry] = {
    "tome": Entry(
        make=ToMe,
        kind="merge",
        paper="Bolya et al., Token Merging, ICLR 2023",
        needs=("keys",),
        knob=REMOVED,
        neutral={"r": 0},
        conserves=True,
        over_heads=True,
        example={"r": 4},
    ),
    "pitome": Entry(
        make=PiToMe,
        kind="merge",
        paper="Tran et al., PiToMe, NeurIPS 2024",
        needs=("keys",),
        knob=MERGING_RATE,
        neutral={"keep_rate": 1.0},
        conserves=True,
        over_heads=True,
        example={"keep_rate": 0.75, "matching": "ordered"},
    ),
    "gtp": Entry(
        make=GTP,
        kind="propagate",
        paper="Xu et al., GTP-ViT, WACV 2024",
        needs=("all attention rows", "patch grid"),
        knob=PROPAGATED,
        neutral={"propagated": 0},
        over_heads=True,
        example={"propagated": 4, "neighbours": 3},
    ),
    "token_transforming_ours": Entry(
        make=TokenTransforming,
        kind="merge, many to many",
        paper="our construction, after the idea of Zeng et al., Token Transforming, 2025",
        needs=("keys", "CLS attention"),
        knob=REMOVED_BUT_ONE,
        neutral={"r": 0},
        conserves=True,
        over_heads=True,
        example={"r": 4},
    ),
    "chain": Entry(
        make=Chain,
        kind="several",
        paper="combination of others",
        needs=("what its parts need",),
        knob=Knob("level", "[0, 1], the knobs of all parts from cheapest to dearest", levels),
        neutral={"parts": ("topk", "tome"), "level": 1.0},
        over_heads=True,
        example={"parts": ("topk", ("tome", {"r": 3}))},
    ),
    "scored": Entry(
        make=Scored,
        kind="merge or prune",
        paper="any score with any matcher",
        needs=("CLS attention or keys", "keys"),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0},
        conserves=True,
        over_heads=True,
    ),
    "tomesd": Entry(
        make=ToMeSD,
        kind="merge + un-merge",
        paper="Bolya & Hoffman, Token Merging for Fast Stable Diffusion, CVPRW 2023",
        needs=("features", "a grid"),
        knob=Knob("merge_rate", "[0, 1), higher is cheaper; with merge_mlp=True the MLP is cheaper too", merge_rates),
        neutral={"merge_rate": 0.0},
        padding=False,
        example={"merge_mlp": True},
    ),
    "topk": Entry(
        make=TopK,
        kind="prune",
        paper="Liang et al., EViT without fusion, ICLR 2022",
        needs=("CLS attention",),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0},
        over_heads=True,
    ),
    "evit": Entry(
        make=EViT,
        kind="prune + fuse",
        paper="Liang et al., EViT, ICLR 2022",
        needs=("CLS attention",),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0},
        over_heads=True,
        exempt={"unmerge": "the fused token is a weighted sum, so that un-merging gives a copy of it, not of a mean"},
    ),
    "ats": Entry(
        make=ATS,
        kind="prune, sampled",
        paper="Fayyaz et al., Adaptive Token Sampling, ECCV 2022",
        needs=("CLS attention", "values"),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        length="dynamic",
        over_heads=True,
    ),
    "evovit": Entry(
        make=EvoViT,
        kind="prune + restore",
        paper="Xu et al., Evo-ViT, AAAI 2022",
        needs=("CLS attention",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        over_heads=True,
    ),
    "diffrate": Entry(
        make=DiffRate,
        kind="prune + merge",
        paper="Chen et al., DiffRate, ICCV 2023",
        needs=("CLS attention",),
        knob=STRENGTH,
        neutral={"strength": 0.0},
        over_heads=True,
    ),
    "diffrate_search": Entry(
        make=DiffRateSearch,
        kind="prune + merge, its rates learned",
        paper="Chen et al., DiffRate, ICCV 2023",
        needs=("CLS attention",),
        knob=Knob("target", "(0, 1], of the MACs, the target of training, lower is cheaper", targets, learned=True),
        neutral={"target": 1.0},
        length="dynamic",
        learned=True,
        training={"masked": True},
        losses=("flops",),
        over_heads=True,
        example={"target": 0.9},
        exempt={"knob": "the cost comes to the target by training; before it, all targets cost the same"},
    ),
    "sit": Entry(
        make=SiT,
        kind="soft merge",
        paper="Zong et al., Self-slimmed Vision Transformer, ECCV 2022",
        needs=("features",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        learned=True,
        example={"keep_rate": 0.5},
    ),
    "patchmerger": Entry(
        make=PatchMerger,
        kind="soft merge",
        paper="Renggli et al., Learning to Merge Tokens, 2022",
        needs=("features",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        learned=True,
        example={"keep_rate": 0.5},
    ),
    "sinkhorn": Entry(
        make=Sinkhorn,
        kind="soft merge",
        paper="Haurum et al., Which Tokens to Use?, ICCVW 2023",
        needs=("features",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        learned=True,
        example={"keep_rate": 0.5},
    ),
    "tokenlearner": Entry(
        make=TokenLearner,
        kind="soft merge",
        paper="Ryoo et al., TokenLearner, NeurIPS 2021",
        needs=("features",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        learned=True,
        example={"keep_rate": 0.5},
    ),
    "dynamicvit": Entry(
        make=DynamicViT,
        kind="prune",
        paper="Rao et al., DynamicViT, NeurIPS 2021",
        needs=("features",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        learned=True,
        training={"masked": True},
        losses=("ratio",),
    ),
    "dpcknn": Entry(
        make=DPCKNN,
        kind="merge",
        paper="Zeng et al., TCFormer, CVPR 2022",
        needs=("features",),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
    ),
    "kmedoids": Entry(
        make=KMedoids,
        kind="prune by clusters",
        paper="Haurum et al., Which Tokens to Use?, ICCVW 2023",
        needs=("features", "all attention rows"),
        knob=TABLED_RATE,
        neutral={"keep_rate": 1.0},
        padding=False,
        over_heads=True,
    ),
    "heuristic": Entry(
        make=Heuristic,
        kind="prune",
        paper="Haurum et al., Which Tokens to Use?, ICCVW 2023",
        needs=("grid",),
        knob=RINGS,
        neutral={"keep_rate": 1.0},
        padding=False,
        control=True,
    ),
    "a_clip": Entry(
        make=AClip,
        kind="prune, in training only",
        paper="Yang et al., Attentive Mask CLIP, ICCV 2023",
        needs=("a teacher's CLS attention", "boxes of two views", "a grid"),
        knob=Knob("keep_rate", "[0, 1], lower is cheaper", _masking_rates),
        neutral={"keep_rate": 1.0},
        padding=False,
        guided=True,
        example={"keep_rate": 0.25},
        exempt={"model": "nothing is removed without a teacher's attention, which a model alone does not have"},
    ),
    "clca": Entry(
        make=CLCA,
        kind="cache around a reducer",
        paper="Rios et al., Cross-Layer Cache Aggregation, ICASSP 2025",
        needs=("what the reducer inside needs",),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0, "cache": False, "num_clr": 0, "head": False},
        learned=True,
        training={"learning": True},
        over_heads=True,
        example={"keep_rate": 0.5, "num_clr": 1},
        exempt={
            "unmerge": "EViT inside fuses to a weighted sum, so that un-merging gives a copy of it, not of a mean",
            "knob": "what is cached comes back, so that at a high keep rate there are more tokens than at the input",
            "model": "sequences grow again behind every reduction",
        },
    ),
    "mrt5": Entry(
        make=MrT5,
        kind="prune",
        paper="Kallini et al., MrT5, ICLR 2025",
        needs=("features",),
        text=True,
        knob=CAPACITY,
        neutral={"threshold": -31.0, "capacity": None},
        length="dynamic",
        learned=True,
        training={"hard": False},
        losses=("gate",),
        example={"capacity": 6},
    ),
    "byte_random": Entry(
        make=ByteRandom,
        kind="prune",
        paper="Kallini et al., MrT5, ICLR 2025, control",
        needs=("PRNG key",),
        text=True,
        knob=Knob("rate", "[0, 1), higher is cheaper", _deleted),
        neutral={"rate": 0.0, "spread": 0.0},
        length="dynamic",
        control=True,
        training={"hard": False},
    ),
    "byte_fixed": Entry(
        make=ByteFixed,
        kind="prune",
        paper="Kallini et al., MrT5, ICLR 2025, baseline",
        needs=("ids of the bytes",),
        text=True,
        knob=Knob("amount", "[0, 1), higher is cheaper", _deleted),
        neutral={"amount": 0.0},
        length="dynamic",
        guided=True,
        training={"hard": False},
        exempt={
            "knob": "how much goes depends on the text, so that every token has a slot; a batch tells its cost",
            "model": "nothing is deleted in a model of images, which has no ids",
        },
    ),
    "boundary_pooling": Entry(
        make=BoundaryPooling,
        kind="merge",
        paper="Nawrot et al., Dynamic Token Pooling, ACL 2023",
        needs=("features", "PRNG key"),
        text=True,
        knob=CAPACITY,
        neutral={"prior": 1.0},
        length="dynamic",
        learned=True,
        training={"soft": True},
        losses=("boundary",),
        example={"capacity": 6},
    ),
    "conv_pooling": Entry(
        make=ConvPooling,
        kind="merge",
        paper="Kallini et al., MrT5, ICLR 2025, baseline",
        needs=("features",),
        text=True,
        knob=Knob("stride", "1 to all tokens, higher is cheaper", _strides),
        neutral={"stride": 1},
        learned=True,
        example={"stride": 2},
    ),
    "fastv": Entry(
        make=FastV,
        kind="prune",
        paper="Chen et al., FastV, ECCV 2024",
        needs=("the last token's attention",),
        text=True,
        knob=Knob("keep_rate", "[0, 1]", fastv_rates),
        neutral={"keep_rate": 1.0},
        over_heads=True,
    ),
    "prompt_merging": Entry(
        make=PromptMerging,
        kind="merge",
        paper="the library's own, after Bolya et al., ICLR 2023",
        needs=("keys",),
        text=True,
        knob=Knob("keep_rate", "[0.5, 1], lower is cheaper", pair_rates),
        neutral={"keep_rate": 1.0},
        conserves=True,
        over_heads=True,
    ),
    "swiftkv": Entry(
        make=SwiftKV,
        kind="depth",
        paper="Qiao et al., SwiftKV, 2024",
        needs=(),
        text=True,
        phase="prefill",
        knob=Knob("layer", "0 to all blocks, lower is cheaper", swiftkv_layers),
        neutral={"layer": 1.0},
    ),
    "skipdecode": Entry(
        make=SkipDecode,
        kind="depth",
        paper="Del Corro et al., SkipDecode, 2023",
        needs=("columns of the batch",),
        text=True,
        phase="decode",
        knob=Knob("speedup", "at least 1, higher is cheaper", speedups, lambda *_: []),
        neutral={"speedup": 1.0},
    ),
    "snapkv": Entry(
        make=SnapKV,
        kind="prune, in the cache",
        paper="Li et al., SnapKV, NeurIPS 2024",
        needs=("the last attention rows",),
        text=True,
        phase="decode",
        knob=BUDGET,
        neutral={"budget": 1.0},
    ),
    "h2o": Entry(
        make=H2O,
        kind="prune, in the cache",
        paper="Zhang et al., H2O, NeurIPS 2023",
        needs=("all attention rows",),
        text=True,
        phase="decode",
        knob=BUDGET,
        neutral={"budget": 1.0},
    ),
    "streaming_llm": Entry(
        make=StreamingLLM,
        kind="prune, in the cache",
        paper="Xiao et al., StreamingLLM, ICLR 2024",
        needs=(),
        text=True,
        phase="decode",
        knob=BUDGET,
        neutral={"budget": 1.0},
    ),
    "random_cache": Entry(
        make=RandomCache,
        kind="prune, in the cache",
        paper="control",
        needs=("PRNG key",),
        text=True,
        phase="decode",
        knob=BUDGET,
        neutral={"budget": 1.0},
        control=True,
    ),
    "recency_cache": Entry(
        make=RecencyCache,
        kind="prune, in the cache",
        paper="control",
        needs=(),
        text=True,
        phase="decode",
        knob=BUDGET,
        neutral={"budget": 1.0},
        control=True,
    ),
    "random": Entry(
        make=Random,
        kind="prune",
        paper="control",
        needs=("PRNG key",),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0},
        control=True,
    ),
    "strided": Entry(
        make=Strided,
        kind="prune",
        paper="control",
        needs=(),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0},
        control=True,
    ),
    "avgpool": Entry(
        make=AvgPool,
        kind="pool",
        paper="control",
        needs=(),
        knob=KEEP_RATE,
        neutral={"keep_rate": 1.0},
        control=True,
    ),
}


def entry(name: str) -> Entry:
    """The registered reducer of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in REGISTRY:
        close = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"reducer={name!r}: must be one of {', '.join(sorted(REGISTRY))}{hint}")
    return REGISTRY[name]


def settings_of(name: str) -> list[str]:
    """The settings that a registered reducer takes."""
    registered = entry(name)
    make: Any = registered.make
    known = list(inspect.signature(make.__init__ if inspect.isclass(make) else make).parameters)
    return known[inspect.isclass(make) + registered.learned :]


def create(name: str, info: ModelInfo | None = None, /, **settings: Any) -> Reducer:
    """Makes a reducer by name; lists in the settings become tuples.

    Args:
        name: a registered reducer.
        info: of the model that it will reduce; needed by those that learn, whose parameters depend on it.
        **settings: of the reducer.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or no info where it is needed.
    """
    registered, known = entry(name), settings_of(name)
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{setting}={settings[setting]!r}: {name} has the settings {', '.join(known)}")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if not registered.learned:
        return registered.make(**settings)
    if info is None:
        raise ValueError(f"info=None: {name} has parameters of its own, so that it needs the info of its model")
    return registered.make(info, **settings)


def name_of(reducer: Reducer) -> str:
    """The registered name of a reducer, its class name where it has none."""
    for name, registered in REGISTRY.items():
        if registered.make is type(reducer):
            return name
    return type(reducer).__name__


def __getattr__(name: str) -> Callable[..., Reducer]:
    if name in REGISTRY:
        return REGISTRY[name].make
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
