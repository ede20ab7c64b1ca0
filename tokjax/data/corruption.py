"""Span corruption: parts of a text are cut out, and the model writes them (Raffel et al. 2020, "T5", section 3.1.4).

With ByT5's settings (Xue et al. 2022, arXiv 2105.13626, section 3.1): 15 % of the bytes, in spans of 20 on average.
Each span that was cut out leaves one sentinel in the input, 258 for the first, then 257 and so on; the target has a
sentinel for what stayed, and the bytes that were cut out. Both end with EOS. The random draws are those of the
published pipeline (T5's `random_spans_noise_mask` with numpy), in its order.

Eleven sentinels, 258 to 248, stand for bytes that no UTF-8 text has. More spans than that (an input of 1024 bytes has
nine) go on with the ids of rare bytes, as published.
"""

from jaxtyping import Bool, Int, Int32
import numpy as np

from tokjax.data.bytes import EOS, FIRST_SENTINEL, OFFSET, PAD

IGNORE = -100  # the label of what is not predicted


def lengths(length: int, density: float = 0.15, mean_span: float = 20.0) -> tuple[int, int]:
    """How much text gives inputs of a length, and how long the targets are.

    Args:
        length: of the corrupted input, its EOS included, at least 3.
        density: share of the text that is cut out, above 0 and below 1.
        mean_span: bytes in a span on average, above 0.

    Returns:
        T, the ids of text that go into one example (the most that fit), and the length of the target, EOS included.
        Where T's noise is less than half a span, the rule counts no span, while `noise_mask` makes one: input and
        target are then longer by one each.

    Raises:
        ValueError: an argument out of range.
    """
    _check(density, mean_span)
    if length < 3:
        raise ValueError(f"length must be at least 3, got {length}")

    def sizes(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = length
    while sizes(tokens + 1)[0] <= length:
        tokens += 1
    target = sizes(tokens)[1]
    if density == 0.5 and target > length:
        tokens, target = tokens - 1, target - 1
    return tokens, target


def counts(tokens: int, density: float = 0.15, mean_span: float = 20.0) -> tuple[int, int]:
    """How many ids of `tokens` are cut out, and in how many spans: at least one of each, and one that stays.

    Raises:
        ValueError: fewer than two tokens, a density outside (0, 1) or a mean span that is not above 0.
    """
    _check(density, mean_span)
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2, one to cut out and one to keep, got {tokens}")
    noise = min(max(round(tokens * density), 1), tokens - 1)
    kept = tokens - noise
    return noise, min(max(1, round(min(noise, kept) / mean_span)), noise, kept)


def noise_mask(
    tokens: int, rng: np.random.Generator, density: float = 0.15, mean_span: float = 20.0
) -> Bool[np.ndarray, " T"]:
    """Which ids of a text are cut out: spans of random lengths, beginning with text and ending with a span.

    Args:
        tokens: T, at least 2.
        rng: drawn from twice, for the lengths of the spans and then for those of the text between them.
        density: share of the text that is cut out.
        mean_span: ids in a span on average.

    Raises:
        ValueError: as `counts`.
    """
    noise, spans = counts(tokens, density, mean_span)
    runs = np.empty(2 * spans, int)  # text and noise in turn
    runs[1::2] = _composition(noise, spans, rng)
    runs[::2] = _composition(tokens - noise, spans, rng)
    return np.repeat(np.arange(2 * spans) % 2 == 1, runs)


def _composition(total: int, parts: int, rng: np.random.Generator) -> Int[np.ndarray, " parts"]:
    """Random lengths, at least 1 each, that add up to a total: every choice of places to part it is as likely."""
    parted = np.arange(total - 1) < parts - 1
    rng.shuffle(parted)
    ends = np.concatenate([[-1], np.flatnonzero(parted), [total - 1]])
    return ends[1:] - ends[:-1]


def corrupt(
    ids: Int[np.ndarray, "B T"], noise: Bool[np.ndarray, "B T"]
) -> tuple[Int32[np.ndarray, "B N"], Int32[np.ndarray, "B M"]]:
    """Inputs and targets of texts and what is cut out of them.

    Args:
        ids: of bytes and the EOS between documents; rows without padding.
        noise: what is cut out, spans of any number and length.

    Returns:
        Input and target ids, each as wide as its longest row, padded with 0.

    Raises:
        ValueError: shapes that differ, or more spans in a row than there are sentinels.
    """
    ids, noise = np.asarray(ids), np.asarray(noise, bool)
    if ids.ndim != 2 or ids.shape != noise.shape:
        raise ValueError(f"ids are {list(ids.shape)} and noise {list(noise.shape)}; they must be the same [B, T]")
    return _cut(ids, noise), _cut(ids, ~noise)


def _cut(ids: Int[np.ndarray, "B T"], gone: Bool[np.ndarray, "B T"]) -> Int32[np.ndarray, "B N"]:
    """Each run that is gone becomes a sentinel; EOS behind what is left."""
    first = gone.copy()
    first[:, 1:] &= ~gone[:, :-1]
    spans = first.sum(axis=1, keepdims=True)
    most = int(spans.max(initial=0))
    if most > FIRST_SENTINEL + 1 - OFFSET:
        raise ValueError(f"noise has {most} spans in a row, there are {FIRST_SENTINEL + 1 - OFFSET} sentinels")
    marked = ids.astype(np.int32)
    marked[first] = np.broadcast_to(FIRST_SENTINEL - np.arange(most), (len(ids), most))[np.arange(most) < spans]
    kept = ~gone | first
    size = kept.sum(axis=1, keepdims=True)
    out = np.full((len(ids), int(size.max(initial=0)) + 1), PAD, np.int32)
    out[np.arange(out.shape[1]) < size] = marked[kept]
    np.put_along_axis(out, size, EOS, axis=1)
    return out


def shift_right(labels: Int[np.ndarray, "*B T"]) -> Int32[np.ndarray, "*B T"]:
    """What a decoder reads to predict labels: a 0, then all labels but the last, with 0 for what is ignored."""
    labels = np.asarray(labels)
    shifted = np.pad(labels, [(0, 0)] * (labels.ndim - 1) + [(1, 0)])[..., :-1]
    return np.where(shifted == IGNORE, PAD, shifted).astype(np.int32)


def _check(density: float, mean_span: float) -> None:
    if not 0 < density < 1:
        raise ValueError(f"density must be above 0 and below 1, got {density}")
    if not mean_span > 0:
        raise ValueError(f"mean_span must be above 0, got {mean_span}")
