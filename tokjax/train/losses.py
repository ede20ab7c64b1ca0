"""Losses and counts in float32, over the valid rows of a batch."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _rows(labels: jax.Array, logits: jax.Array, valid: jax.Array | None) -> jax.Array:
    batch, classes = logits.shape
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != ((batch,) if integer else (batch, classes)):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; for logits {logits.shape} they must be "
            f"integers ({batch},) or floats ({batch}, {classes})"
        )
    if valid is None:
        return jnp.ones(batch, bool)
    if valid.shape != (batch,):
        raise ValueError(f"valid is {valid.shape}; for logits {logits.shape} it must be ({batch},)")
    return valid


def cross_entropy(
    logits: Float[Array, "B K"],
    labels: Int[Array, "B"] | Float[Array, "B K"],
    valid: Bool[Array, "B"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Mean softmax cross-entropy over the valid rows.

    Args:
        logits: of any float type; the arithmetic is float32.
        labels: class numbers, or a distribution over the classes for each row (mixed or smoothed by the data).
        valid: rows that count; None: all. What an invalid row holds, NaN too, changes neither value nor gradient.
        label_smoothing: s in `(1 - s) one_hot + s / K`, for class numbers only.

    Returns:
        float32 []; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit, smoothing outside [0, 1), or smoothing of labels that are distributions.
    """
    valid = _rows(labels, logits, valid)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")
    # Both ends are masked: a zero weight alone would let a NaN of an invalid row into the gradient.
    logits = jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0)
    logp = jax.nn.log_softmax(logits)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        picked = jnp.take_along_axis(logp, jnp.where(valid, labels, 0)[:, None], axis=1)[:, 0]
        rows = -(1.0 - label_smoothing) * picked - label_smoothing * logp.mean(axis=1)
    elif label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing}; labels that are distributions must bring their own")
    else:
        # A class of probability 0 adds 0 even where its logit is -inf.
        targets = labels.astype(jnp.float32)
        rows = -(targets * jnp.where(targets == 0, 0.0, logp)).sum(axis=1)
    return jnp.where(valid, rows, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def distillation(
    logits: Float[Array, "B K"],
    teacher: Float[Array, "B K"],
    valid: Bool[Array, "B"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Mean Kullback-Leibler divergence of the student's classes from the teacher's, over the valid rows.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2: both softmaxes at a temperature, whose square multiplies
    the loss, so that gradients keep their size.

    Args:
        logits: the student's.
        teacher: the teacher's; no gradient.
        valid: rows that count; None: all. What others hold changes nothing.
        temperature: above 0; 1 compares the distributions as they are.

    Returns:
        float32 []; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not above 0.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")
    valid = _rows(teacher, logits, valid)
    logits, teacher = (jnp.where(valid[:, None], x.astype(jnp.float32), 0.0) for x in (logits, teacher))
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    given = jax.nn.log_softmax(logits / temperature)
    # A class of probability 0 adds 0 even where its logit is -inf.
    apart = jnp.where(jnp.exp(wanted) == 0, 0.0, wanted - given)
    rows = (jnp.exp(wanted) * apart).sum(axis=1) * temperature**2
    return jnp.where(valid, rows, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def token_distillation(
    features: Float[Array, "B N C"],
    teacher: Float[Array, "B N C"],
    kept: Float[Array, "B N"],
    valid: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the features of the tokens that are kept, over these tokens of all rows and over channels.

    Source: Rao et al. 2021, arXiv 2106.02034, section 3.4 (DynamicViT); features after the final norm.

    Args:
        features: the student's, token by token; C channels.
        teacher: of the same tokens, unreduced; no gradient.
        kept: which tokens count, above 1/2; no gradient.
        valid: rows that count; None: all. What others hold, and what is dropped, changes nothing.

    Returns:
        float32 []; 0 where nothing is kept.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.ndim != 3 or features.shape != teacher.shape:
        raise ValueError(f"features are {features.shape} and teacher {teacher.shape}; both must be [B, N, C]")
    if kept.shape != features.shape[:2]:
        raise ValueError(f"kept is {kept.shape}; for these features it must be {features.shape[:2]}")
    if valid is not None and valid.shape != features.shape[:1]:
        raise ValueError(f"valid is {valid.shape}; for these features it must be {features.shape[:1]}")
    counted = kept > 0.5 if valid is None else (kept > 0.5) & valid[:, None]
    ours, theirs = (
        jnp.where(counted[..., None], x.astype(jnp.float32), 0.0) for x in (features, jax.lax.stop_gradient(teacher))
    )
    return jnp.square(ours - theirs).sum() / (jnp.maximum(counted.sum(), 1) * features.shape[2])


def swift_kv(
    logits: Float[Array, "B N V"],
    teacher: Float[Array, "B N V"],
    hidden: Float[Array, "B N C"],
    teacher_hidden: Float[Array, "B N C"],
    answer: Bool[Array, "B N"] | None = None,
    valid: Bool[Array, "B N"] | None = None,
    *,
    temperature: float = 2.0,
    weight: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What distils a decoder with shared keys from the one that it was: divergence of logits and error of features.

    Source: Qiao et al. 2024, arXiv 2410.03960; snowflakedb/ArcticTraining, `projects/swiftkv/train.py`: the divergence
    counts where an answer stands, at the places of the labels and not before them, and is divided by all places.

    Args:
        logits: the student's.
        teacher: those of the model without shared keys; no gradient.
        hidden: the student's features that enter its last block (`states[-2]` of a call of it).
        teacher_hidden: the teacher's; no gradient.
        answer: places whose logits count, those of no prompt; None: all.
        valid: places that are no padding; None: all. What others hold changes nothing.
        temperature: of both softmaxes, whose square multiplies the divergence.
        weight: of the features' mean squared error.

    Returns:
        float32 [], and its two terms `{"logits": [], "hidden": []}`, the second without its weight; 0 where nothing is
        valid.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not above 0.
    """
    if logits.ndim != 3 or logits.shape != teacher.shape:
        raise ValueError(f"logits are {logits.shape} and teacher {teacher.shape}; both must be [B, N, V]")
    places = logits.shape[:2]
    for name, mask in (("answer", answer), ("valid", valid)):
        if mask is not None and mask.shape != places:
            raise ValueError(f"{name} is {mask.shape}; for these logits it must be {places}")
    valid = jnp.ones(places, bool) if valid is None else valid
    counted = valid if answer is None else valid & answer
    rows, targets = logits.reshape(-1, logits.shape[2]), teacher.reshape(-1, logits.shape[2])
    apart = distillation(rows, targets, counted.reshape(-1), temperature)
    terms = {
        "logits": apart * counted.sum() / jnp.maximum(valid.sum(), 1),
        "hidden": token_distillation(hidden, teacher_hidden, valid.astype(jnp.float32)),
    }
    return terms["logits"] + weight * terms["hidden"], terms


def accuracy(
    logits: Float[Array, "B K"],
    labels: Int[Array, "B"] | Float[Array, "B K"],
    valid: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many valid rows have their largest logit at the label (or at the label's largest share), and how many count.

    Counts, not a ratio, so that batches and processes add up. Ties go to the lower class.

    Returns:
        correct and total, float32 [] each.

    Raises:
        ValueError: shapes that do not fit.
    """
    valid = _rows(labels, logits, valid)
    wanted = labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(labels, axis=1)
    correct = (jnp.argmax(logits, axis=1) == wanted) & valid
    return correct.sum(dtype=jnp.float32), valid.sum(dtype=jnp.float32)


def clip_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""] | float,
    valid: Bool[Array, "B"] | None = None,
    *,
    same: Bool[Array, "B D"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """CLIP's symmetric cross-entropy: image i must find text i among all texts, and text i image i among all images.

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3 (the loss is InfoNCE, van den Oord et al. 2018, arXiv
    1807.03748, in both directions, averaged). The negatives are the whole batch, over all devices if it is split.

    Args:
        image: L2-normalised embeddings; row i belongs to row i of `text`.
        text: the same.
        scale: what the cosines are multiplied by (the exponential of the learned log scale).
        valid: rows that count, as pairs and as negatives; None: all. What others hold changes nothing.
        same: [B, B], symmetric, True where pair i and pair j tell the same (such as equal captions): they are left out
            of each other's negatives. With `axis_name` the local rows against all D = B * devices columns.
        axis_name: the mapped axis (of `shard_map`, `vmap`, `pmap`) over which the batch is split; None: it is whole.

    Returns:
        float32 [], the mean over the valid rows, of all devices with `axis_name`; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit.
    """
    pairs = _Pairs(image, text, valid, same, axis_name)
    loss = jnp.float32(0)
    for queries, keys in ((pairs.image, pairs.all_text), (pairs.text, pairs.all_image)):
        logits = jnp.where(pairs.counted, _cosines(queries, keys) * scale, jnp.finfo(jnp.float32).min)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), pairs.own[:, None], axis=1)[:, 0]
        loss -= pairs.mean(own) / 2
    return loss


def siglip_loss(
    image: Float[Array, "B E"],
    text: Float[Array, "B E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    valid: Bool[Array, "B"] | None = None,
    *,
    same: Bool[Array, "B D"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """SigLIP's loss: every pair of an image and a text is a yes-no question of its own.

    The sum of -log sigmoid(z_ij (scale cos_ij + bias)) over all pairs, divided by the number of rows; z is 1 for the B
    matching pairs, -1 for the others. Source: Zhai et al. 2023, arXiv 2303.15343, algorithm 1.

    Args:
        image: as in `clip_loss`.
        text: as in `clip_loss`.
        scale: as in `clip_loss`.
        bias: added to the scaled cosines.
        valid: as in `clip_loss`.
        same: as in `clip_loss`: pairs of which neither answer is asked.
        axis_name: as in `clip_loss`.

    Returns:
        float32 []; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit.
    """
    pairs = _Pairs(image, text, valid, same, axis_name)
    logits = _cosines(pairs.image, pairs.all_text) * scale + bias
    match = jnp.arange(logits.shape[1]) == pairs.own[:, None]
    asked = jnp.where(pairs.counted, jax.nn.log_sigmoid(jnp.where(match, logits, -logits)), 0.0)
    return -pairs.mean(asked.sum(axis=1))


def simclr_loss(
    first: Float[Array, "B E"],
    second: Float[Array, "B E"],
    temperature: float = 0.1,
    valid: Bool[Array, "B"] | None = None,
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """SimCLR's NT-Xent: each view must find the other view of its image among all other views of the batch.

    Source: Chen et al. 2020, arXiv 2002.05709, equation 1. The A-CLIP repository's `losses.py` gives the first view
    twice, a slip that its text does not share: what it then reports is `simclr_loss(first, first)`.

    Args:
        first: embeddings of any length, those of one view; row i shows the image of row i of `second`.
        second: the same of the other.
        temperature: what the cosines are divided by.
        valid: as in `clip_loss`.
        axis_name: as in `clip_loss`.

    Returns:
        float32 [], the mean over the valid rows and both views; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    pairs = _Pairs(first, second, valid, None, axis_name, at_length_one=False)
    views = (pairs.image, pairs.all_image), (pairs.text, pairs.all_text)
    mine = jnp.arange(pairs.counted.shape[1]) == pairs.own[:, None]
    masks = jnp.concatenate([pairs.counted, pairs.counted & ~mine], axis=1)  # a view is no negative of itself
    loss = jnp.float32(0)
    for (queries, same), (_, other) in (views, views[::-1]):
        logits = jnp.concatenate([_cosines(queries, other), _cosines(queries, same)], axis=1) / temperature
        logits = jnp.where(masks, logits, jnp.finfo(jnp.float32).min)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), pairs.own[:, None], axis=1)[:, 0]
        loss -= 0.5 * pairs.mean(picked)
    return loss


def byol_loss(
    predicted: Float[Array, "B E"],
    target: Float[Array, "B E"],
    valid: Bool[Array, "B"] | None = None,
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """BYOL's distance, 2 - 2 cos, of a prediction to what another network gives for the same image.

    Source: Grill et al. 2020, arXiv 2006.07733, equation 2. No gradient reaches `target`.

    Args:
        predicted: of any length.
        target: the same, row by row.
        valid: as in `clip_loss`.
        axis_name: as in `clip_loss`.

    Returns:
        float32 [] in 0..4, the mean over the valid rows, of all devices with `axis_name`; 0 where no row is valid.

    Raises:
        ValueError: shapes that do not fit.
    """
    pairs = _Pairs(predicted, jax.lax.stop_gradient(target), valid, None, axis_name, at_length_one=False)
    return pairs.mean(2 - 2 * (pairs.image * pairs.text).sum(axis=1))


def _unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows at length 1, float32; those of length 0 stay, with a finite gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


class _Pairs:
    """The rows of this device against the rows of all.

    Attributes:
        image, text: [B, E] float32, zeros where not valid.
        all_image, all_text: [D, E], D = B without an axis.
        own: [B], the column of each row's partner.
        counted: [B, D], which columns stand in a row's denominator; its own always does.
    """

    def __init__(self, image, text, valid, same, axis_name, *, at_length_one=True):
        if image.ndim != 2 or image.shape != text.shape:
            raise ValueError(f"image is {image.shape} and text {text.shape}; both must be [B, E]")
        batch = image.shape[0]
        if valid is None:
            valid = jnp.ones(batch, bool)
        if valid.shape != (batch,):
            raise ValueError(f"valid is {valid.shape}; for {batch} pairs it must be ({batch},)")
        # Both ends are masked, as in cross_entropy: a NaN of an invalid row stays out of values and gradients.
        image, text = (jnp.where(valid[:, None], x.astype(jnp.float32), 0.0) for x in (image, text))
        if not at_length_one:
            image, text = _unit(image), _unit(text)
        self._valid, self._axis = valid, axis_name
        self.image, self.text = image, text
        self.all_image, self.all_text, columns = image, text, valid
        self.own = jnp.arange(batch)
        if axis_name is not None:
            self.all_image, self.all_text, columns = (
                jax.lax.all_gather(x, axis_name, tiled=True) for x in (image, text, valid)
            )
            self.own += jax.lax.axis_index(axis_name) * batch
        shape = (batch, columns.shape[0])
        if same is None:
            same = jnp.zeros(shape, bool)
        if same.shape != shape:
            raise ValueError(f"same is {same.shape}; for these pairs it must be {shape}")
        mine = jnp.arange(shape[1]) == self.own[:, None]
        self.counted = mine | (columns & ~same)

    def mean(self, rows: jax.Array) -> jax.Array:
        """Over the valid rows of all devices."""
        total, count = jnp.where(self._valid, rows, 0.0).sum(), self._valid.sum()
        if self._axis is not None:
            total, count = jax.lax.psum((total, count), self._axis)
        return total / jnp.maximum(count, 1)


def _cosines(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
