"""What the contract tests share: drawn tokens, a walk through a reducer's hooks, and maps as plain matrices.

There is no model in the walk. The features of a token are its query, key and value side by side, so that whatever
moves the features moves the signals too, at every site and layer, and a gradient of the features is one of all three.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

from flax import nnx, struct
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from tokjax import cache as kv
from tokjax import hooks as hk
from tokjax import token_map
from tokjax.models import vit
from tokjax.reducers import REGISTRY, Entry, create
from tokjax.signals import AttentionRule, Context, Signals
from tokjax.tokens import Tokens

HEADS, WIDTH, DEPTH, BATCH, GRID = 2, 4, 4, 4, (4, 4)
CHANNELS = 3 * HEADS * WIDTH
TEXT = 3
SHAPES = ((17, 1), (16, 0), (18, 2))  # tokens, of them prefix: an odd and two even lengths, all on a 4 x 4 grid
ALONE = (12, 1)  # a row that stands in 17 slots, without its padding


# Reducers that meet tokens which others made, by the names under which the laws of padding know them.
COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "topk, dpcknn": ("chain", {"parts": (("topk", {"layers": (0,)}), ("dpcknn", {"layers": (1, 2)}))}),
    "topk, ats": ("chain", {"parts": (("topk", {"layers": (0,)}), ("ats", {"layers": (1, 2)}))}),
    "ats, dpcknn": ("chain", {"parts": (("ats", {"layers": (0,)}), ("dpcknn", {"layers": (1, 2)}))}),
    "topk, diffrate": ("chain", {"parts": (("topk", {"layers": (0,)}), ("diffrate", {"strength": 2.0}))}),
    "clca of dpcknn": ("clca", {"reducer": "dpcknn", "num_clr": 1}),
    "clca of ats": ("clca", {"reducer": "ats", "num_clr": 1}),
}


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those compiler options that this XLA has."""

    def has(name: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={name: options[name]})()
        except RuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if has(name)}


# The programs are tiny and run once or a hundred times: compiling is all that costs. These make it eight times cheaper.
QUICK = _known(
    {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
)

# What only a decoder with a cache does has laws of its own: on caches at the end of the contract, in `reducers/llm`.
LAWFUL = sorted(name for name, registered in REGISTRY.items() if not registered.decoder)

Fields = Literal["bare", "sized", "padded"]  # features only; with sizes, gates and kinds; with a valid mask as well
Shape = tuple[int, int]


class Step(struct.PyTreeNode):
    """One plan with the tokens before and after it."""

    before: Tokens
    plan: token_map.Plan
    after: Tokens
    twin: token_map.Plan | None = None  # of bf16 tokens: the plan of the same values in float32


class Walk(struct.PyTreeNode):
    """What a method's hooks made of the tokens."""

    tokens: Tokens
    steps: tuple[Step, ...]
    pooled: Any = None  # of a readout


def info(shape: Shape, depth: int = DEPTH) -> hk.ModelInfo:
    length, prefix = shape
    return hk.ModelInfo(depth, CHANNELS, HEADS, length, prefix, GRID, "cls" if prefix else "mean", classes=5)


def entry(name: str) -> Entry:
    """The registered reducer of this name, or the one that combines others."""
    return REGISTRY[COMBINED[name][0] if name in COMBINED else name]


def made(name: str, at: hk.ModelInfo, **settings: Any) -> hk.Reducer:
    name, example = COMBINED.get(name, (name, entry(name).example))
    with jax.ensure_compile_time_eval():  # parameters are drawn once, not by every program
        return create(name, at, **{**example, **settings})


def signals(tokens: Tokens, context: Context) -> Signals:
    b, n, _ = tokens.x.shape
    q, k, v = jnp.moveaxis(tokens.x.reshape(b, n, 3, HEADS, WIDTH), 2, 0)
    bias = tokens.attention_bias()
    bias = None if bias is None else bias[:, None, None]
    return Signals(q, k, v, bias, context=context, rule=AttentionRule(scale=WIDTH**-0.5))


def walk(hooks: list[hk.Hook], tokens: Tokens, context: Context, *, plans: int | None = 2, entered=None) -> Walk:
    """Runs the hooks in the order of a transformer whose blocks leave the tokens as they are.

    Args:
        hooks: of one method.
        tokens: at the input.
        context: of every site.
        plans: stop behind the layer that made the last of so many maps; None: run all layers.
        entered: a list that takes the number of tokens entering every MLP.
    """
    steps: list[Step] = []
    outside = Signals(context=context)
    readout = hk.at(hooks, "readout", 0)
    states = []

    def twin(hook: hk.Hook, tokens: Tokens, given: Signals) -> token_map.Plan | None:
        if tokens.x.dtype != jnp.bfloat16:
            return None
        return hook(*jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (tokens, given)))

    def reduce(where: hk.Where, layer: int, tokens: Tokens, given: Signals) -> tuple[Tokens, Signals]:
        for hook in hk.at(hooks, where, layer):
            plan = hook(tokens, given)
            if plan is not None:
                before, tokens = tokens, token_map.apply(plan, tokens)
                steps.append(Step(before, plan, tokens, twin(hook, before, given)))
                given = hk.follow(given, plan, before, tokens)
        return tokens, given

    def around(where: hk.Where, layer: int, tokens: Tokens, run: Callable[[Tokens], Any]) -> Tokens:
        for hook in hk.at(hooks, where, layer):
            plan = hook(tokens, outside)
            if plan is not None:
                steps.append(Step(tokens, plan, token_map.apply(plan, tokens), twin(hook, tokens, outside)))
        y, after = hk.around(hooks, where, layer, tokens, outside, run)
        return after.replace(x=y)

    def count(part: Tokens) -> Any:
        if entered is not None:
            entered.append(part.length)
        return part.x

    tokens, _ = reduce("input", 0, tokens, outside)
    for layer in range(DEPTH):
        tokens, _ = reduce("before_block", layer, tokens, outside)
        tokens = around("around_attention", layer, tokens, lambda part: part.x)
        inside = hk.attend(hooks, layer, tokens, signals(tokens, context))
        tokens, inside = reduce("after_attention", layer, tokens, inside)
        tokens = around("around_mlp", layer, tokens, count)
        tokens, _ = reduce("after_block", layer, tokens, inside)
        states.append(tokens)
        if plans is not None and not readout and sum(step.plan.map is not None for step in steps) >= plans:
            break
    tokens, _ = reduce("before_llm", 0, tokens, outside)
    return Walk(tokens, tuple(steps), readout[0](tuple(states)) if readout else None)


def hooks_of(name: str, shape: Shape, **settings: Any) -> list[hk.Hook]:
    """The hooks of a registered reducer, all at sites that the walk and the tiny ViT have.

    Raises:
        ValueError: there are others.
    """
    reducer = made(name, info(shape), **settings)
    if shape == ALONE and entry(name).learned:  # a padded row and the row alone meet the same parameters
        beside = made(name, info(SHAPES[0]), **settings)
        if _shapes(beside) != _shapes(reducer):
            reducer = beside
    hooks = reducer.hooks(info(shape))
    for hook in hooks:
        if hook.where not in vit.SITES | {"before_llm"}:
            raise ValueError(f"{name} hooks in at {hook.where!r}: teach the walk of the contract tests this site")
    return hooks


def _shapes(module: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(nnx.state(module))]


def cases(name: str) -> list[tuple[Shape, Fields]]:
    """Every case is a program to compile, so that there are few."""
    if REGISTRY[name].padding:
        return [(SHAPES[0], "bare"), *((shape, "sized") for shape in SHAPES[1:]), *((s, "padded") for s in SHAPES)]
    return [(SHAPES[0], "bare"), *((shape, "sized") for shape in SHAPES)]


@functools.cache
def walker(name: str) -> Callable[[Tokens, Context], Walk]:
    """The walk of a reducer as a function that can be jitted, mapped, sharded and exported.

    Tokens and context hold numpy arrays (also the key's raw words), which cost no compilation to slice and join.
    """

    def run(tokens: Tokens, context: Context, plans: int | None = 2) -> Walk:
        tokens, context = jax.tree.map(jnp.asarray, (tokens, context))
        keys = jax.random.wrap_key_data(context.key)
        return walk(hooks_of(name, (tokens.length, tokens.prefix)), tokens, context.replace(key=keys), plans=plans)

    return run


@functools.cache
def program(name: str) -> Callable[[Tokens, Context], Walk]:
    """The same, compiled once a shape."""
    compiled = jax.jit(walker(name), compiler_options=QUICK)
    return lambda tokens, context: jax.tree.map(np.asarray, compiled(tokens, context))


@functools.cache
def cacher(name: str, **settings: Any) -> Callable[[Tokens, Context], kv.Cache]:
    """What a reducer of caches leaves of one that all layers fill with the tokens; as `walker`."""

    def run(tokens: Tokens, context: Context) -> kv.Cache:
        tokens, context = jax.tree.map(jnp.asarray, (tokens, context))
        context = context.replace(key=jax.random.wrap_key_data(context.key))
        reducer = made(name, info((tokens.length, tokens.prefix)), **settings)
        hooks, inside = reducer.hooks(info((tokens.length, tokens.prefix))), signals(tokens, context)
        inside = inside.replace(rule=dataclasses.replace(inside.rule, causal=True))
        noted, _ = hk.reduce(hooks, "input", 0, tokens, Signals(context=context))
        for layer in range(DEPTH):
            noted, _ = hk.reduce(hooks, "after_attention", layer, noted, inside)
        kept = [kv.Kept(tokens, inside.key, inside.value)] * DEPTH
        cache = kv.fill(kept, tokens.position.max(1) + 1, tokens.length, 2, "write")
        for hook in hk.at(hooks, "after_prefill"):
            cache = hook(cache, noted)
        return cache

    return run


@functools.cache
def cached(name: str, **settings: Any) -> Callable[[Tokens, Context], kv.Cache]:
    """The same, compiled once a shape."""
    compiled = jax.jit(cacher(name, **settings), compiler_options=QUICK)
    return lambda tokens, context: jax.tree.map(np.asarray, compiled(tokens, context))


STYLES = ("normal", "ties", "copies", "axes", "small", "large")
SAFE = ("normal", "axes")  # no ties that only rounding decides: what two programs must agree on


def features(rng: np.random.Generator, style: str, shape: tuple[int, ...]) -> np.ndarray:
    """Tokens [B,N,C] that a plan may meet: anything, few values, few different tokens, exact ties, extreme values."""
    x = rng.normal(size=shape)
    if style == "ties":
        x = rng.integers(-1, 2, shape) / 2
    elif style == "copies":
        x = np.take_along_axis(x, rng.integers(0, 3, shape[:2])[..., None], 1)
    elif style == "axes":  # every head the same multiple of a unit vector: all sums and products are exact
        axis = np.eye(WIDTH)[rng.integers(0, WIDTH, shape[:2])] * 2.0 ** rng.integers(-1, 2, (*shape[:2], 1))
        x = np.tile(axis, shape[2] // WIDTH)
    elif style == "small":
        x = x * 1e-4
    elif style == "large":
        x = x * 1e4
    return x.astype(np.float32)


def context_of(rng: np.random.Generator, shape: Shape, batch: int = BATCH) -> Context:
    n, prefix = shape
    rows, columns = GRID
    frames = np.maximum(np.arange(n) - prefix, 0) // columns % rows  # every row of patches is a frame
    return Context(
        grid=GRID,
        key=rng.integers(0, 2**32, (batch, 2), np.uint32),
        text=rng.normal(size=(batch, TEXT, CHANNELS)).astype(np.float32),
        text_valid=np.ones((batch, TEXT), bool),
        frames=np.tile(frames.astype(np.int32), (batch, 1)),
        ids=rng.integers(0, 100, (batch, n)).astype(np.int32),
        image_sizes=np.full((batch, 2), 64, np.int32),
        relevance=rng.random((batch, *GRID), np.float32),
        boxes=np.tile(np.array([[9, 7, 30, 41], [4, 0, 50, 64]], np.int32), (batch, 1, 1)),
    )


def batch_of(x: np.ndarray, shape: Shape, **fields: Any) -> Tokens:
    """Traced tokens at their places."""
    place = np.tile(np.arange(shape[0], dtype=np.int32), (len(x), 1))
    return Tokens(x, position=place, origin=place, prefix=shape[1], **fields)


def moved(plan: token_map.Plan, tokens: Tokens) -> Any:
    """The features that a plan moves."""
    return tokens.x if plan.x is None else plan.x


def unit_fields(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Sizes, gates and kinds that say nothing."""
    return {"size": np.ones(shape, np.float32), "key_bias": np.zeros(shape, np.float32), "kind": np.zeros(shape, int)}


@dataclasses.dataclass(frozen=True)
class Draw:
    """The recipe of a batch; equal recipes give equal batches.

    Attributes:
        shape: tokens, and of them prefix.
        fields: what travels with the features.
        seed: of all values and keys.
        style: of the features.
        counts: patches that are valid in each row of a padded batch, scattered; None: all.
    """

    shape: Shape = SHAPES[0]
    fields: Fields = "bare"
    seed: int = 0
    style: str = "normal"
    counts: tuple[int, ...] | None = None

    @functools.cached_property
    def args(self) -> tuple[Tokens, Context]:
        rng = np.random.default_rng(self.seed)
        n, prefix = self.shape
        x, context = features(rng, self.style, (BATCH, n, CHANNELS)), context_of(rng, self.shape)
        if self.fields == "bare":
            return batch_of(x, self.shape), context
        size = np.where(np.arange(n) < prefix, 1, rng.integers(1, 5, (BATCH, n))).astype(np.float32)
        gate = -rng.random((BATCH, n)).astype(np.float32)
        kind = rng.integers(0, 3, (BATCH, n)).astype(np.int32)
        tokens = batch_of(x, self.shape, size=size, key_bias=gate, kind=kind)
        if self.fields == "sized":
            return tokens, context
        valid = np.ones((BATCH, n), bool)
        for row, count in enumerate(self.counts or ()):
            valid[row, prefix + rng.permutation(n - prefix)[count:]] = False
        return tokens.replace(valid=valid), context

    @property
    def tokens(self) -> Tokens:
        return self.args[0]


def valid_of(tokens: Tokens) -> np.ndarray:
    return np.ones(tokens.x.shape[:2], bool) if tokens.valid is None else np.asarray(tokens.valid)


def sizes_of(tokens: Tokens) -> np.ndarray:
    """Sizes in double precision, zero where there is nothing valid."""
    size = np.ones(tokens.x.shape[:2]) if tokens.size is None else np.asarray(tokens.size, np.float64)
    return np.where(valid_of(tokens), size, 0)


@st.composite
def draws(draw, cases: list[tuple[Shape, Fields]], styles: tuple[str, ...] = STYLES):
    """Batches of these cases: hypothesis draws the case, the values, the padding and the keys."""
    shape, fields = draw(st.sampled_from(cases))
    patches = st.integers(0, shape[0] - shape[1])
    counts = draw(st.tuples(*[patches] * BATCH)) if fields == "padded" else None
    return Draw(shape, fields, draw(st.integers(0, 2**31 - 1)), draw(st.sampled_from(styles)), counts)


def take(tree: Any, rows: Any) -> Any:
    """The chosen rows of everything that has a batch axis."""
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def membership(map: token_map.TokenMap) -> np.ndarray:
    """Who went where [B,M,N], made from the indices alone; a token that is listed twice counts twice."""
    if isinstance(map, token_map.SoftMap):
        return np.asarray(map.weights, np.float64)
    if isinstance(map, token_map.SpreadMap):
        return _spread(map)
    return _listed(map, np.ones(map.moved.shape))


def matrix(map: token_map.TokenMap) -> np.ndarray:
    """The linear map [B,M,N], with the weights of moved tokens."""
    if not isinstance(map, token_map.HardMap) or map.weight is None:
        return membership(map)
    return _listed(map, np.asarray(map.weight, np.float64))


def _listed(map: token_map.HardMap, weight: np.ndarray) -> np.ndarray:
    keep, moved, into = (np.asarray(a) for a in (map.keep, map.moved, map.into))
    (batch, m), n = keep.shape, map.num_in
    out = np.zeros((batch, m + 1, n + 1))  # the sentinels have a row and a column of their own
    row = np.arange(batch)[:, None]
    np.add.at(out, (row, np.broadcast_to(np.arange(m), keep.shape), keep), 1)
    np.add.at(out, (row, into, moved), weight)
    return out[:, :m, :n]


def _spread(map: token_map.SpreadMap) -> np.ndarray:
    (batch, m), n = map.keep.shape, map.num_in
    out, row, slot = np.zeros((batch, m, n + 1)), np.arange(batch)[:, None, None], np.arange(m)[None, :, None]
    np.add.at(out, (row, slot, np.asarray(map.keep)[:, :, None]), 1)
    np.add.at(out, (row, slot, np.asarray(map.moved)[:, None]), np.asarray(map.share, np.float64))
    return out[:, :, :n]


def applied(plan: token_map.Plan, x: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and filled slots by the definition, in double precision: what `apply` must give."""
    assert plan.map is not None
    w, n = matrix(plan.map), plan.map.num_in
    if plan.how == "keep":
        anchor = np.asarray(plan.map.anchor)
        chosen = np.take_along_axis(x, np.minimum(anchor, n - 1)[..., None], 1)
        return np.where((anchor < n)[..., None], chosen, 0), anchor < n
    if plan.how == "sum":
        return w @ x, (w != 0).any(-1)
    weighted = w * size[:, None] if plan.how == "size" else w
    mass = weighted.sum(-1)
    return weighted @ x / np.where(mass == 0, 1, mass)[..., None], mass > 0
