"""Goes on with texts: greedy, by sampling, or by beam search, as one program of static shape.

A model takes part with a function `step(state, ids [B]) -> (logits [B, V], state)`, whose state holds its caches with
the batch in front, and with the logits of the first new token; it need not know how tokens are chosen.

    out = model.generate(ids, max_tokens=64, temperature=0.8, top_p=0.95, key=jax.random.key(0))
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

Step = Callable[[Any, Int[Array, "B"]], tuple[Float[Array, "B V"], Any]]
_NEVER = -1e9  # a score that no text has


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; static.

    Attributes:
        max_tokens: T, of new tokens, the end included.
        temperature: logits are divided by it before one is drawn; 0: the largest is taken.
        top_k: only the k largest logits count; None: all.
        top_p: only the largest probabilities count that are needed for a sum of p (nucleus sampling, Holtzman et al.
            2020); after `top_k`. None: all.
        beams: K, partial texts that a beam search keeps; 1: no search.
        length_penalty: finished beams are compared by log-probability / length**this; above 0 favours long texts.
        early_stopping: a search ends once there are K finished texts, without a look at whether one that still runs
            could be better.
        eos_id: ends a text; several: any of them does; None: it has `max_tokens`.
        pad_id: what stands behind the end.

    Raises:
        ValueError: a field out of range; the message names it, its value and what is allowed.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    eos_id: int | tuple[int, ...] | None = 1
    pad_id: int = 0

    def __post_init__(self):
        if isinstance(self.eos_id, list | tuple):
            object.__setattr__(self, "eos_id", tuple(self.eos_id) or None)
        for name in ("max_tokens", "beams", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be at least 0 and finite")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty}: must be finite")
        if self.beams > 1 and self.temperature:
            raise ValueError(f"beams={self.beams}: a beam search draws nothing, needs temperature=0")
        if not self.temperature and not (self.top_k is None and self.top_p is None):
            raise ValueError(f"top_k={self.top_k}, top_p={self.top_p}: need a temperature above 0")

    def ends(self, token: Int[Array, "*b"]) -> Bool[Array, "*b"]:
        """Which tokens end a text."""
        return jnp.isin(token, jnp.asarray(() if self.eos_id is None else self.eos_id, jnp.int32))


class Generated(struct.PyTreeNode):
    """New tokens, up to the end of each text and including it."""

    ids: Int[Array, "B T"]
    length: Int[Array, "B"]  # tokens of each row that are no padding
    score: Float[Array, "B"]  # log-probability of the text; of a beam search divided by length**length_penalty
    beam_ids: Int[Array, "B K T"] | None = None  # of a beam search: all that it found, the best first
    beam_scores: Float[Array, "B K"] | None = None


def run(step: Step, state: Any, logits: Float[Array, "R V"], how: Decoding, key: Array | None = None) -> Generated:
    """Goes on from a state.

    Args:
        step: the next logits, and state, of tokens.
        state: before the first step; a pytree whose arrays have the batch in front, single numbers excepted. A beam
            search has K rows for each text, next to each other.
        logits: of the first new token, R rows: the batch, or for a beam search K times as many.
        how: static.
        key: for drawing, one or one a row; what a row draws does not depend on the others.

    Raises:
        ValueError: drawing without a key, or more beams than half the vocabulary can fill.
    """
    if how.beams > 1:
        return _search(step, state, logits, how)
    return go_on(step, start(state, logits, how, key), how.max_tokens).result


class Going(struct.PyTreeNode):
    """Texts between two steps, without a search. A program may take one in (donated) and give the next."""

    t: Int[Array, ""]  # tokens that are chosen
    state: Any  # of the model; the last chosen token is not in it yet
    ids: Int[Array, "B T"]
    open: Bool[Array, "B"]  # texts that have not ended
    length: Int[Array, "B"]
    score: Float[Array, "B"]
    keys: Array | None  # one a row
    how: Decoding = struct.field(pytree_node=False)

    @property
    def result(self) -> Generated:
        return Generated(self.ids, self.length, self.score)


def start(state: Any, logits: Float[Array, "B V"], how: Decoding, key: Array | None = None) -> Going:
    """Chooses the first token; arguments and errors as of `run`, which does the whole.

    Raises:
        ValueError: a beam search, which cannot be interrupted.
    """
    if how.beams > 1:
        raise ValueError(f"beams={how.beams}: a search is not taken step by step, needs beams=1")
    if not how.temperature:
        keys = None
    elif key is None:
        raise ValueError(f"key=None: temperature={how.temperature} draws tokens, which needs one")
    else:
        keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
    batch = len(logits)
    ids = jnp.full((batch, how.max_tokens), how.pad_id, jnp.int32)
    nothing = jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)
    return _advance(Going(jnp.int32(0), state, ids, *nothing, keys, how), logits)


def go_on(step: Step, now: Going, until: int | Int[Array, ""]) -> Going:
    """Goes on to `until` tokens, at most `max_tokens`, or until all texts have ended."""
    until = jnp.minimum(until, now.how.max_tokens)

    def body(now: Going) -> Going:
        logits, state = step(now.state, now.ids[:, now.t - 1])
        return _advance(now.replace(state=state), logits)

    return jax.lax.while_loop(lambda now: (now.t < until) & now.open.any(), body, now)


def _advance(now: Going, logits: Float[Array, "B V"]) -> Going:
    """Chooses a token for every text that has not ended."""
    how, t, going = now.how, now.t, now.open
    new = choose(logits, how, None if now.keys is None else jax.vmap(jax.random.fold_in, (0, None))(now.keys, t))
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), new[:, None], -1)[:, 0]
    return now.replace(
        t=t + 1,
        ids=now.ids.at[:, t].set(jnp.where(going, new, how.pad_id)),
        open=going & ~how.ends(new),
        length=now.length + going,
        score=now.score + jnp.where(going, log_p, 0),
    )


class Console:
    """Prints one of the texts as it grows: a `stream` of `Model.generate`.

    Args:
        decode: from ids [n] to a string, such as `model.preprocess.decode`.
        row: which of the texts.
        write: where to; None: standard output.
    """

    def __init__(self, decode: Callable[[Any], str], row: int = 0, write: Callable[[str], Any] | None = None):
        self._decode, self._row = decode, row
        self._write = write or (lambda text: print(text, end="", flush=True))
        self._printed = ""

    def __call__(self, ids: Int[np.ndarray, "B t"], done: bool) -> None:
        """All new tokens so far, without what stands behind an end, and whether these are all."""
        text = self._decode(ids[self._row])
        if not done:
            text = text.rstrip("\ufffd")  # of a character only the first bytes
        if text.startswith(self._printed):
            self._write(text[len(self._printed) :])
            self._printed = text
        if done:
            self._write("\n")


def choose(logits: Float[Array, "B V"], how: Decoding, keys: Array | None) -> Int[Array, "B"]:
    """The next token of every row: the likeliest, or one that is drawn with the row's key."""
    if not how.temperature:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    assert keys is not None
    logits, order = logits.astype(jnp.float32) / how.temperature, None
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        logits, order = jax.lax.top_k(logits, how.top_k)
    elif how.top_p is not None:
        order = jnp.argsort(-logits, -1)
        logits = jnp.take_along_axis(logits, order, -1)
    if how.top_p is not None:  # kept as long as those before do not suffice
        p = jax.nn.softmax(logits, -1)
        logits = jnp.where(jnp.cumsum(p, -1) - p < how.top_p, logits, -jnp.inf)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    if order is not None:
        drawn = jnp.take_along_axis(order, drawn[:, None], -1)[:, 0]
    return drawn.astype(jnp.int32)


class _Beams(struct.PyTreeNode):
    """A beam search between two steps."""

    t: Int[Array, ""]
    state: Any
    ids: Int[Array, "B K T"]
    score: Float[Array, "B K"]  # log-probability
    source: Int[Array, "B K"]  # the row of `state` that a beam goes on from
    done_ids: Int[Array, "B K T"]
    done_score: Float[Array, "B K"]  # best first; `_NEVER` or less: nothing
    open: Array  # [B]: whether a running beam could still be among the best


def _search(step: Step, state: Any, logits: Array, how: Decoding) -> Generated:
    """Beam search, with the rules of transformers' `generate` for which beams finish and when it ends.

    Of the 2K best continuations the K best that do not end run on, and those that end within the first K are finished.
    A row ends once its best running beam would not be among its K finished ones if it were finished now.
    """
    k, vocabulary, total = how.beams, logits.shape[-1], how.max_tokens
    if vocabulary < 2:
        raise ValueError(f"beams={k}: a vocabulary of {vocabulary} is too small")
    batch = len(logits) // k

    def best(scores, *others):
        scores, at = jax.lax.top_k(scores, k)
        return scores, *(jax.vmap(lambda x, i: x[i])(other, at) for other in others)

    def advance(logits: Array, now: _Beams) -> _Beams:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, k, vocabulary)
        score, at = jax.lax.top_k((now.score[..., None] + log_p).reshape(batch, -1), 2 * k)
        source, token = at // vocabulary, (at % vocabulary).astype(jnp.int32)
        ids = jax.vmap(lambda x, i: x[i])(now.ids, source).at[:, :, now.t].set(token)
        ends = jnp.broadcast_to(now.t + 1 == total, token.shape)
        ends |= how.ends(token)

        length = (now.t + 1).astype(jnp.float32) ** how.length_penalty
        full = (now.done_score > _NEVER / 2).all(1)
        takes = now.open & ~full if how.early_stopping else now.open
        counts = ends & (jnp.arange(2 * k) < k) & takes[:, None]
        merged = jnp.concatenate([now.done_score, jnp.where(counts, score / length, 2 * _NEVER)], 1)
        done_score, done_ids = best(merged, jnp.concatenate([now.done_ids, ids], 1))

        running, ids, source = best(jnp.where(ends, score + _NEVER, score), ids, source)
        full = (done_score > _NEVER / 2).all(1)
        better = ~full if how.early_stopping else ~full | (running[:, 0] / length > done_score[:, -1])
        return _Beams(now.t + 1, now.state, ids, running, source, done_ids, done_score, now.open & better)

    def body(now: _Beams) -> _Beams:
        rows = (now.source + k * jnp.arange(batch)[:, None]).reshape(-1)
        state = jax.tree.map(lambda leaf: leaf[rows] if jnp.ndim(leaf) else leaf, now.state)
        logits, state = step(state, now.ids[:, :, now.t - 1].reshape(-1))
        return advance(logits, now.replace(state=state))

    empty = jnp.full((batch, k, total), how.pad_id, jnp.int32)
    never = jnp.full((batch, k), _NEVER, jnp.float32)
    # All beams are alike at first: one counts.
    start = _Beams(
        t=jnp.int32(0),
        state=state,
        ids=empty,
        score=never.at[:, 0].set(0),
        source=jnp.zeros((batch, k), jnp.int32),
        done_ids=empty,
        done_score=never,
        open=jnp.ones(batch, bool),
    )
    last = jax.lax.while_loop(lambda now: (now.t < total) & now.open.any(), body, advance(logits, start))
    ids, scores = last.done_ids, last.done_score
    if how.eos_id is None:
        length = jnp.full(batch, total, jnp.int32)
    else:
        ended = how.ends(ids[:, 0])
        length = jnp.where(ended.any(1), ended.argmax(1) + 1, total).astype(jnp.int32)
    return Generated(ids[:, 0], length, scores[:, 0], ids, scores)
