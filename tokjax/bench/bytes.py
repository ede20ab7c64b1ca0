"""What is measured of byte-level models: bits per byte, which bytes are deleted, whole targets that are right.

Everything is numpy on the host. What is counted over batches are plain sums and arrays that add up, so that a last
batch with fewer rows weighs what it should.
"""

from collections.abc import Mapping, Sequence
import math

from jaxtyping import Bool, Float, Int, Int64
import numpy as np

from tokjax.data.bytes import CLASSES, PAD, byte_classes
from tokjax.data.corruption import IGNORE


def bits_per_byte(nats: float, count: float) -> float:
    """Cross-entropy in bits per predicted id, sentinels and EOS among them, as Kallini et al. 2025 (MrT5) report it.

    Args:
        nats: summed over all predicted ids.
        count: how many there are.

    Raises:
        ValueError: nothing was counted, or a sum that is negative or not a number.
    """
    if not count > 0 or not nats >= 0:
        raise ValueError(f"nats must not be negative and count must be positive, got {nats} and {count}")
    return float(nats) / float(count) / math.log(2)


def sequence_correct(predicted: Int[np.ndarray, "B T"], labels: Int[np.ndarray, "B T"]) -> Bool[np.ndarray, " B"]:
    """Rows all of whose predictions are right: sequence accuracy under teacher forcing is the mean of it.

    Args:
        predicted: the likeliest id at each place.
        labels: -100 where nothing is predicted; a row of nothing else counts as wrong, leave such rows out.

    Raises:
        ValueError: shapes that differ.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or labels.ndim != 2:
        raise ValueError(f"predicted is {predicted.shape}, labels {labels.shape}; they must be the same [B, T]")
    counted = labels != IGNORE
    return ((predicted == labels) | ~counted).all(axis=1) & counted.any(axis=1)


def deletion_counts(
    ids: Int[np.ndarray, "B N"],
    kept: Bool[np.ndarray, "B N"],
    group: Int[np.ndarray, " B"] | None = None,
    groups: int = 1,
) -> Int64[np.ndarray, "G K 2"]:
    """How many ids of each group and byte class there are, and how many of them are deleted; batches add up.

    Args:
        ids: 0 pads and is not counted.
        kept: whether an id is still there.
        group: the group (language) of each row, 0..G-1; None: all are of group 0.
        groups: G.

    Returns:
        `[g, k, 0]` ids of group g and class `tokjax.data.bytes.CLASSES[k]`, `[g, k, 1]` of them deleted.

    Raises:
        ValueError: shapes that do not fit, or a group out of range.
    """
    ids, kept = np.asarray(ids), np.asarray(kept)
    group = np.zeros(len(ids), int) if group is None else np.asarray(group)
    if ids.ndim != 2 or kept.shape != ids.shape or kept.dtype != np.bool_ or group.shape != ids.shape[:1]:
        raise ValueError(
            f"ids are {list(ids.shape)}, kept {kept.dtype} {list(kept.shape)} and group {list(group.shape)}; "
            "they must be [B, N], bool [B, N] and [B]"
        )
    if len(group) and (group.min() < 0 or group.max() >= groups):
        raise ValueError(f"group must be in 0..{groups - 1}, got {group.min()}..{group.max()}")
    place = group[:, None] * len(CLASSES) + byte_classes(ids)
    shape = groups, len(CLASSES)
    here = ids != PAD
    total, gone = (np.bincount(place[part], minlength=math.prod(shape)) for part in (here, here & ~kept))
    return np.stack([total, gone], axis=-1).reshape(*shape, 2)


def deletion_rate(counts: Int[np.ndarray, "*shape 2"]) -> float:
    """The share that is deleted; 0 where nothing is counted."""
    total, gone = np.asarray(counts).reshape(-1, 2).sum(axis=0)
    return float(gone / total) if total else 0.0


def deletion_by_group(counts: Int[np.ndarray, "G K 2"], names: Sequence[str]) -> Mapping[str, float]:
    """The share of the ids of each group that is deleted; groups that did not occur are left out.

    Raises:
        ValueError: another number of names than of groups.
    """
    if len(names) != len(counts):
        raise ValueError(f"names must be one for each of {len(counts)} groups, got {len(names)}")
    return {name: deletion_rate(part) for name, part in zip(names, counts, strict=True) if part[..., 0].any()}


def deletion_by_class(counts: Int[np.ndarray, "G K 2"]) -> Mapping[str, float]:
    """The share of the ids of each byte class that is deleted; classes that did not occur are left out."""
    whole = np.asarray(counts).sum(axis=0)
    return {name: deletion_rate(part) for name, part in zip(CLASSES, whole, strict=True) if part[0]}


def mean_over_groups(values: Mapping[str, Float[np.ndarray, ""] | float], sizes: Mapping[str, int]) -> float:
    """The mean of a figure over groups, each weighted by how many examples it has.

    Raises:
        ValueError: groups that differ, or no examples.
    """
    if set(values) != set(sizes) or not sum(sizes.values()) > 0:
        raise ValueError(
            f"values and sizes must have the same groups with examples, got {set(values)} and {dict(sizes)}"
        )
    return float(sum(values[name] * size for name, size in sizes.items()) / sum(sizes.values()))
