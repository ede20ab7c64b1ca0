"""What the tasks report: retrieval recall, k-NN accuracy, mean IoU, depth errors.

Everything is for the host, over a whole evaluation set; what grows with its square is done in pieces.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Int64
import numpy as np

IGNORE = 255  # the label of what does not count, in every public segmentation set


def recall_at_k(
    similarity: Float[np.ndarray, "I T"],
    owner: Int[np.ndarray, " T"],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Image-text retrieval: how often one of the k nearest belongs to the query.

    Several texts may belong to an image, as in Flickr30k and COCO (five each): an image is right if any of its texts
    is among its k nearest (the best of them decides), a text if its image is. Ties count against the query: a text that
    does not belong and is exactly as similar stands before one that does, so a model that gives everything the same
    score finds nothing.

    Args:
        similarity: of every image to every text, larger is nearer.
        owner: the image that each text belongs to.
        ks: at least 1 each; a k beyond the number of candidates counts all of them.
        chunk: rows of the comparison at a time.

    Returns:
        `image_to_text@k` and `text_to_image@k` in [0, 1]. Images without a text are no queries, but candidates.

    Raises:
        ValueError: shapes that do not fit, no texts, an owner out of range, a k below 1 or NaN in `similarity`.
    """
    similarity, owner = np.asarray(similarity), np.asarray(owner)
    if similarity.ndim != 2 or owner.shape != similarity.shape[1:]:
        raise ValueError(f"similarity is {similarity.shape} and owner {owner.shape}; they must be [I, T] and [T]")
    images, texts = similarity.shape
    if not texts:
        raise ValueError("owner is empty: there is no text to retrieve")
    if not np.issubdtype(owner.dtype, np.integer) or owner.min() < 0 or owner.max() >= images:
        raise ValueError(f"owner must name images 0..{images - 1}, got {owner.dtype} {owner.min()}..{owner.max()}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be at least 1 each, got {tuple(ks)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    with_text = np.unique(owner)
    ranks_of_images = []  # how many stand before the best of one's own
    for start in range(0, len(with_text), chunk):
        rows = with_text[start : start + chunk]
        block = similarity[rows]
        _no_nan(block)
        own = owner == rows[:, None]
        best = np.where(own, block, -np.inf).max(axis=1, keepdims=True)
        ranks_of_images.append(((block >= best) & ~own).sum(axis=1))
    ranks_of_texts = []
    for start in range(0, texts, chunk):
        block = similarity[:, start : start + chunk].T
        _no_nan(block)
        own = owner[start : start + chunk, None]
        ranks_of_texts.append((block >= np.take_along_axis(block, own, axis=1)).sum(axis=1) - 1)  # less itself
    ranks = {"image_to_text": np.concatenate(ranks_of_images), "text_to_image": np.concatenate(ranks_of_texts)}
    return {f"{name}@{k}": float((rank < k).mean()) for name, rank in ranks.items() for k in ks}


def _no_nan(block: np.ndarray) -> None:
    if np.isnan(block).any():
        raise ValueError("similarity holds NaN")


def knn_accuracy(
    train_features: Float[np.ndarray, "N C"],
    train_labels: Int[np.ndarray, " N"],
    test_features: Float[np.ndarray, "M C"],
    test_labels: Int[np.ndarray, " M"],
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> float:
    """Weighted k-NN classification of frozen features, as DINO measures them.

    The k nearest by cosine vote for their class with weight exp(cosine / temperature). Source: Wu et al. 2018,
    arXiv 1805.01978, section 3.4, with the settings of Caron et al. 2021 (DINO), arXiv 2104.14294. Among equal cosines
    the earlier training row is nearer, among equal votes the lower class wins.

    Args:
        train_features: of any scale; they are normalised here, a row of zeros stays zero.
        train_labels: from 0.
        test_features: as `train_features`.
        test_labels: a class that no training row has is always wrong.
        k: neighbours; all of them where there are fewer.
        temperature: above 0.
        chunk: test rows at a time.

    Returns:
        The share of test rows whose class wins.

    Raises:
        ValueError: shapes that do not fit, empty sets, features that are not finite, negative labels, or `k`,
            `temperature` or `chunk` out of range.
    """
    sets = {"train": (train_features, train_labels), "test": (test_features, test_labels)}
    for name, (features, labels) in sets.items():
        if np.ndim(features) != 2 or np.shape(labels) != np.shape(features)[:1] or not len(labels):
            raise ValueError(
                f"{name}_features are {np.shape(features)} and {name}_labels {np.shape(labels)}; "
                "they must be [N, C] and [N] with N at least 1"
            )
        if not np.isfinite(np.asarray(features, np.float32)).all():
            raise ValueError(f"{name}_features are not finite")
        if np.min(labels) < 0:
            raise ValueError(f"{name}_labels must not be negative, got {np.min(labels)}")
    if np.shape(train_features)[1] != np.shape(test_features)[1]:
        raise ValueError(
            f"train_features have {np.shape(train_features)[1]} channels, test_features {np.shape(test_features)[1]}"
        )
    if k < 1 or not temperature > 0 or chunk < 1:
        raise ValueError(f"k, temperature and chunk must be positive, got {k}, {temperature} and {chunk}")
    bank, classes_of = _unit(jnp.asarray(train_features, jnp.float32)), jnp.asarray(train_labels, jnp.int32)
    k, classes = min(k, len(train_labels)), int(np.max(train_labels)) + 1
    chunk = min(chunk, len(test_labels))
    queries = np.asarray(test_features, np.float32)
    correct = 0
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        padded = np.pad(rows, ((0, chunk - len(rows)), (0, 0)))  # one program for all pieces
        voted = _vote(bank, classes_of, jnp.asarray(padded), k=k, classes=classes, temperature=float(temperature))
        correct += int((np.asarray(voted)[: len(rows)] == np.asarray(test_labels)[start : start + chunk]).sum())
    return correct / len(queries)


@functools.partial(jax.jit, static_argnames=("k", "classes", "temperature"))
def _vote(bank: jax.Array, labels: jax.Array, queries: jax.Array, *, k: int, classes: int, temperature: float):
    cosines = jnp.matmul(_unit(queries), bank.T, precision=jax.lax.Precision.HIGHEST)
    nearest, index = jax.lax.top_k(cosines, k)
    # Relative to the nearest, so that a small temperature does not overflow; the winner is the same.
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
    votes = jax.vmap(lambda weight, label: jax.ops.segment_sum(weight, label, classes))(weights, labels[index])
    return votes.argmax(axis=1)


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norm == 0, 1.0, norm)


def confusion(
    pred: Int[np.ndarray, "*shape"], label: Int[np.ndarray, "*shape"], classes: int, ignore: int | None = IGNORE
) -> Int64[np.ndarray, "K K"]:
    """Counts of (label, prediction); matrices of batches add up.

    Args:
        pred: classes 0..K-1 wherever the label counts.
        label: classes 0..K-1, or `ignore`.
        classes: K.
        ignore: the label that does not count; None: all do.

    Raises:
        ValueError: shapes that differ, or a class out of range.
    """
    pred, label = np.asarray(pred), np.asarray(label)
    if pred.shape != label.shape:
        raise ValueError(f"pred is {pred.shape}, label {label.shape}; they must be the same")
    counted = np.ones(label.shape, bool) if ignore is None else label != ignore
    pred, label = pred[counted].astype(np.int64), label[counted].astype(np.int64)
    for name, values in (("pred", pred), ("label", label)):
        if values.size and (values.min() < 0 or values.max() >= classes):
            raise ValueError(f"{name} must be in 0..{classes - 1}, got {values.min()}..{values.max()}")
    return np.bincount(label * classes + pred, minlength=classes * classes).reshape(classes, classes)


def mean_iou(confusion: Int[np.ndarray, "K K"]) -> float:
    """Intersection over union, averaged over the classes that occur in labels or predictions; 0 where none does.

    Source: Everingham et al. 2015 (Pascal VOC), section 4.2 of doi 10.1007/s11263-014-0733-5. Classes that occur
    nowhere have no IoU and are left out, as in the usual evaluation code.

    Raises:
        ValueError: not a square matrix.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion is {confusion.shape}; it must be [K, K]")
    both = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - both
    return float((both[union > 0] / union[union > 0]).mean()) if union.any() else 0.0


class DepthMetrics(NamedTuple):
    """Errors of a depth map, over the points that count.

    Attributes:
        rmse: root of the mean squared error.
        abs_rel: mean of |error| / target.
        delta1: share of the points with max(pred / target, target / pred) < 1.25.
    """

    rmse: float
    abs_rel: float
    delta1: float


def depth_metrics(
    pred: Float[np.ndarray, "*shape"],
    target: Float[np.ndarray, "*shape"],
    valid: Bool[np.ndarray, "*shape"] | None = None,
) -> DepthMetrics:
    """The usual depth errors (Eigen et al. 2014, arXiv 1406.2283, section 4.3), over all points alike.

    Args:
        pred: finite; one that is not positive is wrong in `delta1`.
        target: above 0 wherever it counts.
        valid: points that count; None: all.

    Raises:
        ValueError: shapes that differ, no point that counts, a target that is not positive or a value that is not
            finite.
    """
    pred, target = np.asarray(pred, np.float64), np.asarray(target, np.float64)
    valid = np.ones(target.shape, bool) if valid is None else np.asarray(valid)
    if not pred.shape == target.shape == valid.shape:
        raise ValueError(f"pred is {pred.shape}, target {target.shape}, valid {valid.shape}; they must be the same")
    pred, target = pred[valid], target[valid]
    if not pred.size:
        raise ValueError("valid leaves no point to measure")
    if not (np.isfinite(pred).all() and np.isfinite(target).all()):
        raise ValueError("pred and target must be finite where valid")
    if target.min() <= 0:
        raise ValueError(f"target must be above 0 where valid, got {target.min()}")
    error = np.abs(pred - target)
    near = np.maximum(pred, target) < 1.25 * np.minimum(pred, target)
    return DepthMetrics(float(np.sqrt((error**2).mean())), float((error / target).mean()), float(near.mean()))
