"""How many tokens leave where: plain functions from a method's settings to one static number a block."""

from collections.abc import Sequence
import math
from typing import Literal, get_args

Course = Literal["constant", "falling", "rising", "geometric", "staged"]


def constant(r: int, depth: int) -> tuple[int, ...]:
    """The same r in every block."""
    return (r,) * depth


def sloped(r: int, inflect: float, depth: int) -> tuple[int, ...]:
    """About r a block on average, linear over the blocks (ToMe, `tome/utils.py:parse_r`).

    Args:
        r: tokens removed in the middle block.
        inflect: -1 falls from 2r to 0 (the paper's decreasing schedule), 0 is constant, +1 rises from 0 to 2r.
        depth: number of blocks.

    Counts are truncated, so that a slope removes somewhat fewer tokens than the constant schedule.

    Raises:
        ValueError: inflect outside [-1, 1].
    """
    if not -1 <= inflect <= 1:
        raise ValueError(f"inflect={inflect}: must be in [-1, 1]")
    if depth == 1:
        return (r,)
    low = int(r * (1 - inflect))
    step = (2 * r - low - low) / (depth - 1)
    return tuple(int(low + step * layer) for layer in range(depth))


def truncated(counts: Sequence[int], depth: int) -> tuple[int, ...]:
    """A list as it is, with zeros behind its end; entries beyond the last block are never read."""
    return (*counts, *(0,) * (depth - len(counts)))[:depth]


def per_block(r: int | Sequence[int], depth: int, inflect: float = 0.0) -> tuple[int, ...]:
    """Any of the above: a number with its slope, or a list."""
    if isinstance(r, Sequence):
        return truncated(r, depth)
    return sloped(r, inflect, depth) if inflect else constant(r, depth)


def stages(depth: int, number: int = 3) -> tuple[int, ...]:
    """Evenly spread blocks where stage-wise methods reduce: 3, 6, 9 of 12 (EViT's and DynamicViT's), 1, 2, 3 of 4."""
    return tuple(sorted({depth * (j + 1) // (number + 1) for j in range(number)}))


def at_layers(layers: Sequence[int] | None, depth: int, number: int = 3) -> tuple[int, ...]:
    """The given blocks, or the default stages.

    Raises:
        ValueError: a block that the model does not have.
    """
    if layers is None:
        return stages(depth, number)
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(f"layers={tuple(layers)}: must lie in 0 to {depth - 1}")
    return tuple(layers)


def kept(rate: float, tokens: int) -> int:
    """Tokens that a keep rate leaves, ceil(rate * tokens) in double precision (EViT, `evit.py`)."""
    return math.ceil(rate * tokens)


def kept_table(rate: float, patches: int, number: int) -> tuple[int, ...]:
    """Kept-count table int(patches * rate**(j+1)) (the "Which Tokens to Use?" benchmark, Haurum et al. 2023)."""
    return tuple(int(patches * rate ** (j + 1)) for j in range(number))


def keep_rate_ramp(iteration: int, iterations_per_epoch: int, *, base: float, start_epoch: int, epochs: int) -> float:
    """EViT's keep rate at a training iteration: 1, then a cosine from 1 to `base` over `epochs`, then `base`.

    Source: `helpers.py:adjust_keep_rate` of EViT (Liang et al. 2022).
    """
    done, total = iteration - start_epoch * iterations_per_epoch, epochs * iterations_per_epoch
    if done < 0:
        return 1.0
    if done >= total:
        return base
    return base + (1 - base) * (math.cos(math.pi * done / total) + 1) / 2


def course(kind: Course, strength: float, patches: int, depth: int, *, halving: bool = False) -> tuple[int, ...]:
    """Patches that are left after every block, by one of the hand-set schedules of the literature.

    Args:
        kind: "constant", "falling" and "rising" remove strength * patches over all blocks: the same in every block, or
            linearly fewer or more from block to block (ToMe's `inflect` of 0, -1, 1); "geometric" keeps the same share
            in every block, exp(-strength) of the patches in all; "staged" does so at the three blocks of `stages` only.
        strength: at least 0; 0 removes nothing. At least one patch stays.
        patches: at the input.
        depth: number of blocks.
        halving: whether no block may remove more than half of what it meets, as bipartite merging.

    Raises:
        ValueError: an unknown kind, or a negative strength.
    """
    if kind not in get_args(Course):
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(get_args(Course))}")
    if not strength >= 0:
        raise ValueError(f"strength={strength}: must be at least 0")
    steps = range(1, depth + 1)
    if kind == "geometric":
        shares = [math.exp(-strength * i / depth) for i in steps]
    elif kind == "staged":
        at = stages(depth)
        shares = [math.exp(-strength * sum(layer < i for layer in at) / len(at)) for i in steps]
    else:
        weights = {"constant": [1] * depth, "falling": [depth - i for i in steps], "rising": [i - 1 for i in steps]}[
            kind
        ]
        whole = max(1, sum(weights))
        shares = [1 - strength * sum(weights[:i]) / whole for i in steps]
    left = [patches]
    for share in shares:
        fewest = (left[-1] + 1) // 2 if halving else 1
        left.append(min(left[-1], max(1, fewest, int(patches * share + 0.5))))
    return tuple(left[1:])
