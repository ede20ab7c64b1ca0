"""Multiply-accumulates (MACs) of a function, counted from its jaxpr, and the closed form for vision transformers.

The papers on token reduction print multiply-accumulates, call them FLOPs, and count matrix products only: patch
embedding, q/k/v, q k^T, A v, output projection, MLP, classifier. Biases, softmax, norms, activations, residuals,
sorting, top-k, gather and scatter are not counted. `count` follows this convention and counts the very function
that runs, so it needs no formula for a new model; what a reducer adds (similarities, predictors, merges by matrix)
stands in a column of its own, because the published figures leave it out.

XLA's own `compiled.cost_analysis()` cannot serve: it counts a scan body once whatever its length, adds element-wise
operations to the products, and knows nothing of a `top_k`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, Literal

import jax
from jax.extend import core
import numpy as np

# A scope is a path component of the name stack, bare or inside transforms: "jvp(reducer.tome)/vmap()".
_REDUCER_SCOPE = re.compile(r"(?:^|[/(])reducer\.")

# Real work that is no matrix product with a count of its own: named in the notes rather than silently left out.
_UNCOUNTED = {
    *("cholesky", "eig", "eigh", "svd", "lu", "qr", "householder_product", "triangular_solve", "tridiagonal_solve"),
    *("geqrf", "geqp3", "ormqr", "tridiagonal", "schur", "hessenberg", "fft"),
    *("scaled_dot", "scaled_matmul_wrapper", "ffi_call", "pure_callback", "io_callback"),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one call, for the whole batch of the arguments (figures per image: use a batch of 1).

    Attributes:
        model: of the model proper.
        reducer: of everything under a `jax.named_scope("reducer.<name>")`.
        by_primitive: both together, by the name of the primitive.
        notes: what the numbers leave open (loops of unknown length, branches of different cost, opaque kernels);
            empty when they are exact.
    """

    model: int
    reducer: int
    by_primitive: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.model + self.reducer

    def __add__(self, other: "Cost") -> "Cost":
        """Of both calls."""
        counted = dict(Counter(self.by_primitive) + Counter(other.by_primitive))
        notes = tuple(sorted({*self.notes, *other.notes}))
        return Cost(self.model + other.model, self.reducer + other.reducer, counted, notes)

    def __mul__(self, times: int) -> "Cost":
        """Of so many calls."""
        counted = {name: times * macs for name, macs in self.by_primitive.items()}
        return Cost(times * self.model, times * self.reducer, counted, self.notes)


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Counts the multiply-accumulates of `fn(*args, **kwargs)` without running it.

    Loops count times their length, nested calls (jit, remat, custom derivatives, shard_map, Pallas kernels over
    their grid) count in full, and what no output depends on does not count, as it is never computed under `jit`.
    A `cond` counts its most expensive branch; a `while_loop` whose length only the data tell counts its body once;
    both are said in the notes. Padding of a convolution counts (as everybody does), the zeros between the pixels of
    a transposed one do not. Under `shard_map` the work of all shards is added up, replicas are not.

    Args:
        fn: a function of arrays that JAX can trace, jitted or not; what is static is closed over.
        *args: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
        **kwargs: the same.
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs).jaxpr
    tally, _ = _walk(jaxpr, [True] * len(jaxpr.outvars), inside=False)
    return Cost(tally.model, tally.reducer, dict(sorted(tally.by_primitive.items())), tuple(sorted(tally.notes)))


def vit_macs(
    tokens_attention: Sequence[int],
    tokens_mlp: Sequence[int],
    *,
    width: int,
    patch: int,
    num_patches: int,
    classes: int = 1000,
    mlp_ratio: float = 4.0,
    channels: int = 3,
    convention: Literal["standard", "diffrate"] = "standard",
) -> int:
    """Multiply-accumulates of a plain vision transformer on one image, from its token counts.

    With N_a tokens in the attention and N_m in the MLP, a block of width C and hidden width F costs
    4 N_a C^2 + 2 N_a^2 C (q, k, v, output projection; scores and weighted values) plus 2 N_m C F. The patch
    embedding costs P * channels * patch^2 * C, the classifier C * classes, once. This is what the published figures
    of DeiT (4.6 G for S), EViT, DynamicViT and ToMe follow. The released code of DiffRate counts the patch
    embedding for P + 1 positions, as if the class token were a patch: `convention="diffrate"`.

    Args:
        tokens_attention: tokens in the attention of every block, special tokens included.
        tokens_mlp: tokens in its MLP; fewer where a reducer sits between the two.
        width: C.
        patch: side of a patch in pixels.
        num_patches: P.
        classes: outputs of the classifier; 0: none.
        mlp_ratio: F = int(C * mlp_ratio).
        channels: of the image.
        convention: "standard" or "diffrate".

    Raises:
        ValueError: the two lists differ in length, a number is negative, or the convention is unknown.
    """
    if len(tokens_attention) != len(tokens_mlp):
        raise ValueError(
            "tokens_attention and tokens_mlp need one entry per block each, "
            f"got {len(tokens_attention)} and {len(tokens_mlp)}"
        )
    if convention not in ("standard", "diffrate"):
        raise ValueError(f'convention must be "standard" or "diffrate", got {convention!r}')
    attention, mlp = [int(n) for n in tokens_attention], [int(n) for n in tokens_mlp]
    sizes = {"width": width, "patch": patch, "num_patches": num_patches, "classes": classes, "channels": channels}
    lists = {"tokens_attention": min(attention, default=0), "tokens_mlp": min(mlp, default=0), "mlp_ratio": mlp_ratio}
    for name, value in {**sizes, **lists}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    c, positions = int(width), int(num_patches) + (convention == "diffrate")
    hidden = int(c * mlp_ratio)
    blocks = sum(4 * n * c * c + 2 * n * n * c for n in attention) + sum(2 * n * c * hidden for n in mlp)
    return blocks + positions * int(channels) * int(patch) ** 2 * c + c * int(classes)


class _Tally:
    """Running sums, and the notes."""

    def __init__(self) -> None:
        self.model = self.reducer = 0
        self.by_primitive: Counter[str] = Counter()
        self.notes: set[str] = set()

    @property
    def macs(self) -> tuple[int, int]:
        return self.model, self.reducer

    def product(self, name: str, macs: int, inside: bool) -> None:
        if inside:
            self.reducer += macs
        else:
            self.model += macs
        self.by_primitive[name] += macs

    def add(self, other: "_Tally", times: int = 1) -> None:
        if times == 0:
            return
        self.model += times * other.model
        self.reducer += times * other.reducer
        for name, macs in other.by_primitive.items():
            self.by_primitive[name] += times * macs
        self.notes |= other.notes


# Every function below takes which outputs are used and answers which inputs that needs, so that dead code, which XLA
# never runs, is not counted either, through calls and loops alike.


def _walk(jaxpr: core.Jaxpr, used: Sequence[bool], inside: bool) -> tuple[_Tally, list[bool]]:
    tally = _Tally()
    live = {v for v, need in zip(jaxpr.outvars, used, strict=True) if need and not isinstance(v, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if any(outs) or eqn.effects:
            needs = _equation(eqn, outs, inside, tally)
            live.update(
                v for v, need in zip(eqn.invars, needs, strict=True) if need and not isinstance(v, core.Literal)
            )
    return tally, [v in live for v in jaxpr.invars]


def _equation(eqn: Any, used: list[bool], inside: bool, tally: _Tally) -> list[bool]:
    name, everything = eqn.primitive.name, [True] * len(eqn.invars)
    bodies = list(_inner(eqn.params))
    if name in _PRODUCTS or bodies:
        # The stack of an inner jaxpr starts afresh, so what holds for the call holds for its body.
        inside = inside or _REDUCER_SCOPE.search(str(eqn.source_info.name_stack)) is not None
    if name in _PRODUCTS:
        tally.product(name, _PRODUCTS[name](eqn), inside)
        return everything
    if name in _UNCOUNTED:
        tally.notes.add(f"{name}: not a matrix product, its work is not counted")
        return everything
    if name in _STRUCTURES:
        return _STRUCTURES[name](eqn, used, inside, tally)
    if len(bodies) == 1 and len(bodies[0].invars) == len(eqn.invars) and len(bodies[0].outvars) == len(used):
        inner, needs = _walk(bodies[0], used, inside)
        tally.add(inner)
        return needs
    for body in bodies:
        inner, _ = _walk(body, [True] * len(body.outvars), inside)
        tally.add(inner)
        if any(inner.macs):
            tally.notes.add(f"{name}: unknown structure, each function inside it is counted once")
    return everything


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.ClosedJaxpr, core.Jaxpr)):
                yield _open(item)


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _carried(
    body: core.Jaxpr, consts: int, carry: list[bool], rest: list[bool], inside: bool
) -> tuple[_Tally, list[bool], list[bool]]:
    """A loop body: what is needed of its carry grows until it feeds itself."""
    while True:
        tally, needs = _walk(body, carry + rest, inside)
        grown = [a or b for a, b in zip(carry, needs[consts : consts + len(carry)], strict=True)]
        if grown == carry:
            return tally, needs, carry
        carry = grown


def _scan(eqn: Any, used: list[bool], inside: bool, tally: _Tally) -> list[bool]:
    # Which are constants, carry and slices is told by the ranks, as the parameters' names differ between JAX versions.
    whole: Any = _open(eqn.params["jaxpr"])
    sliced = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, whole.invars, strict=True))
    stacked = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.outvars, whole.outvars, strict=True))
    carry = len(eqn.outvars) - stacked
    consts = len(eqn.invars) - carry - sliced
    body, needs, carried = _carried(whole, consts, used[:carry], used[carry:], inside)
    tally.add(body, int(eqn.params["length"]))
    return needs[:consts] + carried + needs[consts + carry :]


def _while(eqn: Any, used: list[bool], inside: bool, tally: _Tally) -> list[bool]:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, tested = _walk(_open(eqn.params["cond_jaxpr"]), [True], inside)
    carry = [a or b for a, b in zip(used, tested[of_cond:], strict=True)]
    body, needs, carry = _carried(_open(eqn.params["body_jaxpr"]), of_body, carry, [], inside)
    trips = _trip_count(eqn)
    if trips is None and any((*body.macs, *test.macs)):
        tally.notes.add("while: the number of iterations depends on the data, its body is counted once")
    tally.add(body, 1 if trips is None else trips)
    tally.add(test, 1 if trips is None else trips + 1)
    return tested[:of_cond] + needs[:of_body] + carry


def _cond(eqn: Any, used: list[bool], inside: bool, tally: _Tally) -> list[bool]:
    branches, needs = zip(*(_walk(_open(b), used, inside) for b in eqn.params["branches"]), strict=True)
    if len({b.macs for b in branches}) > 1:
        tally.notes.add("cond: branches of different cost, the most expensive one is counted")
    tally.add(max(branches, key=lambda b: sum(b.macs)))
    return [True, *map(any, zip(*needs, strict=True))]


def _shard_map(eqn: Any, used: list[bool], inside: bool, tally: _Tally) -> list[bool]:
    shard, needs = _walk(_open(eqn.params["jaxpr"]), used, inside)
    axes = set()
    for spec in (*eqn.params["in_specs"], *eqn.params["out_specs"]):
        for entry in spec:
            axes |= {entry} if isinstance(entry, str) else set(entry or ())
    tally.add(shard, math.prod(eqn.params["mesh"].shape[axis] for axis in axes))
    return needs


def _pallas_call(eqn: Any, used: list[bool], inside: bool, tally: _Tally) -> list[bool]:
    body = _open(eqn.params["jaxpr"])  # it writes to references: its outputs say nothing of what is used
    cell, _ = _walk(body, [True] * len(body.outvars), inside)
    grid = [n if isinstance(n, int) else None for n in eqn.params["grid_mapping"].grid]
    if None in grid:
        tally.notes.add("pallas_call: a grid that depends on the data, unknown sides are counted as 1")
    tally.add(cell, math.prod(n for n in grid if n is not None))
    return [True] * len(eqn.invars)


_STRUCTURES: dict[str, Callable[[Any, list[bool], bool, _Tally], list[bool]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
}


def _trip_count(eqn: Any) -> int | None:
    """Iterations of `for i in range(literal, literal, literal)` written as a while loop; None for any other loop."""
    cond, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    if len(cond.eqns) != 1 or cond.eqns[0].outvars != cond.outvars:
        return None
    # Of a value in the condition: the literal it holds throughout the loop, or its place in the carry if it changes.
    init, before, after = eqn.invars[of_cond + of_body :], body.invars[of_body:], body.outvars

    def resolve(atom: Any) -> tuple[int | None, int | None]:
        if isinstance(atom, core.Literal):
            return _integer(atom), None
        if atom not in cond.invars:
            return None, None
        place = cond.invars.index(atom)
        if place < of_cond:
            return _integer(eqn.invars[place]), None
        place -= of_cond
        return (_integer(init[place]), None) if after[place] is before[place] else (None, place)

    compare = cond.eqns[0].primitive.name
    (left, counter), (right, other) = map(resolve, cond.eqns[0].invars)
    if counter is None:  # literal < i: turn it round
        left, counter, right, other = right, other, left, counter
        compare = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(compare, compare)
    if counter is None or right is None or compare not in ("lt", "le", "gt", "ge"):
        return None
    start, step = _integer(init[counter]), _step(body, before[counter], after[counter])
    upwards = compare in ("lt", "le")
    if start is None or step is None or (step > 0) != upwards or step == 0:
        return None
    stop = right + (0 if compare in ("lt", "gt") else 1 if upwards else -1)
    return len(range(start, stop, step))


def _step(body: core.Jaxpr, before: Any, after: Any) -> int | None:
    for eqn in body.eqns:
        if after in eqn.outvars and eqn.primitive.name in ("add", "sub"):
            a, b = eqn.invars
            if a is before:
                return _integer(b, sign=1 if eqn.primitive.name == "add" else -1)
            if b is before and eqn.primitive.name == "add":
                return _integer(a)
    return None


def _integer(atom: Any, sign: int = 1) -> int | None:
    if not isinstance(atom, core.Literal) or np.shape(atom.val) or np.asarray(atom.val).dtype.kind not in "iu":
        return None
    return sign * int(atom.val)


def _dot_general(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return _size(eqn.outvars[0]) * math.prod(int(eqn.invars[0].aval.shape[i]) for i in contracted)


def _ragged_dot_general(eqn: Any) -> int:
    """Every row of the left side meets one group of the right side only."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return _size(eqn.invars[0]) * math.prod(int(n) for i, n in enumerate(eqn.invars[1].aval.shape) if i not in shared)


def _conv_general_dilated(eqn: Any) -> int:
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    image, kernel, out = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    features = int(kernel[numbers.rhs_spec[1]])  # per group already
    macs = features * int(out[numbers.out_spec[0]]) * int(out[numbers.out_spec[1]])
    for axis, (stride, spread, gap, (low, _)) in enumerate(
        zip(params["window_strides"], params["lhs_dilation"], params["rhs_dilation"], params["padding"], strict=True)
    ):
        places, taps = int(out[numbers.out_spec[2 + axis]]), int(kernel[numbers.rhs_spec[2 + axis]])
        if spread == 1:
            macs *= places * taps
            continue
        # A transposed convolution: only the pairs of a place and a tap that meet a pixel, not a zero in between.
        at = np.arange(places)[:, None] * stride + np.arange(taps) * gap - low
        pixels = int(image[numbers.lhs_spec[2 + axis]])
        macs *= int(((at % spread == 0) & (at >= 0) & (at <= (pixels - 1) * spread)).sum())
    return macs


def _fused_attention(products: int) -> Callable[[Any], int]:
    """cuDNN's attention: one opaque kernel of that many products of T x S x D for every head."""

    def macs(eqn: Any) -> int:
        query, key = (v.aval.shape for v in eqn.invars[:2])
        heads_first = eqn.params["layout"] == 1  # [B, H, N, D] instead of [B, N, H, D]
        return products * math.prod(map(int, query)) * int(key[2 if heads_first else 1])

    return macs


def _size(atom: Any) -> int:
    return math.prod(map(int, atom.aval.shape))


_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv_general_dilated,
    "dot_product_attention_fwd_wrapper": _fused_attention(2),  # scores, weighted values
    "dot_product_attention_bwd_wrapper": _fused_attention(5),  # scores again; gradients of the scores, q, k and v
}
