"""Prompt merging: which neighbours merge, that nothing looks ahead, and what a decoder with a cache makes of it."""

import dataclasses

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import TINY, batch, model

import tokjax
from tokjax.api import Model
from tokjax.models.decoder import Prompts
from tokjax.reducers.llm.prompt_merging import PromptMerging
from tokjax.signals import Signals
from tokjax.token_map import Plan, apply
from tokjax.tokens import MASKED, Tokens


def tokens(angles, **fields):
    """Tokens with keys of these angles: what is alike has near ones."""
    angles = jnp.asarray(angles, jnp.float32)
    key = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)
    place = jnp.broadcast_to(jnp.arange(angles.shape[1], dtype=jnp.int32), angles.shape)
    given = Tokens(angles[..., None], position=place, **fields)
    return given, Signals(key=key[:, :, None], value=key[:, :, None], query=key[:, :, None])


# Pairs behind the first token, with the distance of their keys; the last token stands alone.
PAIRS = [[0, 0, 1.0, 2, 2.1, 3, 3.2, 4, 4.0, 5]]


@pytest.mark.parametrize(
    ("settings", "positions", "sizes"),
    [
        ({"keep_rate": 0.5}, [0, 2, 4, 6, 8, 9], [1, 2, 2, 2, 2, 1]),
        ({"keep_rate": 0.75}, [0, 2, 4, 5, 6, 7, 8, 9], [1, 2, 2, 1, 1, 1, 1, 1]),
        ({"keep_rate": 0.75, "first": 3}, [0, 1, 2, 4, 5, 6, 7, 8, 9], [1, 1, 1, 2, 1, 1, 1, 1, 1]),
        ({"keep_rate": 0.5, "special": (7,), "others": 2}, [0, 1, 2, 4, 6, 8, 9], [1, 1, 1, 2, 2, 2, 1]),
        ({"keep_rate": 0.5, "special": (7, 3), "others": 1}, [0, 1, 2, 4, 6, 8, 9], [1, 1, 1, 2, 2, 2, 1]),
    ],
)
def test_what_merges(settings, positions, sizes):
    """All pairs, or half of them, from left to right; never the first, the last, nor what is special."""
    given, signals = tokens(PAIRS, kind=jnp.asarray([[0, 7, 0, 0, 3, 0, 0, 0, 0, 0]]))
    method = PromptMerging(**settings)
    out = jax.jit(lambda *args: apply(method.plan(*args), args[0]), compiler_options=QUICK)(given, signals)
    count = len(positions)
    np.testing.assert_array_equal(out.position[0, :count], positions)
    np.testing.assert_array_equal(out.size[0, :count], sizes)
    assert out.valid is None or (out.valid[0, :count].all() and not out.valid[0, count:].any())
    means = [np.mean(PAIRS[0][p - size + 1 : p + 1]) for p, size in zip(positions, sizes, strict=True)]
    np.testing.assert_allclose(out.x[0, :count, 0], means, rtol=1e-6)


def test_from_left_to_right():
    """Against the rule taken pair by pair, in rows of different counts; as many merge as each row's share says."""
    method, pairs = PromptMerging(0.7, window=4), 40
    counts, share = np.array([40, 23, 1, 0]), np.array(method.share(40))
    alike = np.random.default_rng(0).normal(size=(4, pairs)).astype(np.float32)
    alike[np.arange(pairs) >= counts[:, None]] = -np.inf
    found = np.asarray(jax.jit(method.chosen)(alike, counts, share))
    for row, count, merges in zip(alike, counts, found, strict=True):
        done, total = 0, share[count]
        for t in range(count):
            last = row[max(0, t - 3) : t + 1]
            hit = (last > row[t]).sum() < 0.6 * len(last)
            low, high = max(share[t + 1] - 4, total - (count - t - 1)), min(share[t + 1] + 4, total)
            assert merges[t] == (low > done or (hit and done < high))
            done += merges[t]
        assert done == total == int(0.6 * count + 1e-6)
        assert not merges[count:].any()
    assert alike[found].mean() > 0.3  # by chance 0, with the whole text in view 0.64


# In a decoder.

MERGING = PromptMerging(keep_rate=0.75, window=2)


@dataclasses.dataclass(frozen=True)
class Masked:
    """The same at full length: of a pair the late one has the mean and counts twice, the early one is hidden."""

    method: PromptMerging

    def hooks(self, info):
        return [dataclasses.replace(hook, reducer=self) for hook in self.method.hooks(info)]

    def plan(self, tokens, signals):
        merge = self.method.plan(tokens, signals).map
        pairs = jax.nn.one_hot(merge.moved, tokens.length, axis=1) @ jax.nn.one_hot(
            jnp.take_along_axis(merge.keep, jnp.minimum(merge.into, merge.num_out - 1), 1), tokens.length
        )  # [B, early, late]
        late, early = pairs.sum(1), pairs.sum(2)
        other = jnp.einsum("bel,bec->blc", pairs, tokens.x)
        x = jnp.where(late[..., None] > 0, (tokens.x + other) / 2, tokens.x)
        return Plan(x=x, key_bias=jnp.where(early > 0, MASKED, jnp.log1p(late)))


def reader(method):
    """Prompts read and gone on with for two tokens."""

    def run(module, prompts):
        hooks = method.hooks(TINY.info)
        read = module.prefill(prompts, hooks, capacity=3)
        step = module.steps(hooks)
        logits, cache = step(read.cache, jnp.argmax(read.logits, -1).astype(jnp.int32))
        after, _ = step(cache, jnp.argmax(logits, -1).astype(jnp.int32))
        return (read.logits, logits, after), read

    graph, params = model(TINY)
    program = jax.jit(lambda params, prompts: run(nnx.merge(graph, params), prompts), compiler_options=QUICK)
    return lambda prompts: program(params, prompts)


@pytest.fixture(scope="module")
def merged():
    return reader(MERGING)


def test_a_masked_simulation(merged):
    """Outputs, and steps on the cache, which has sizes as a bias; rows of different lengths, padded on either side."""
    masked = reader(Masked(MERGING))
    (left, right), kept = (merged(batch(side)) for side in ("left", "right")), {}
    want, full = masked(batch("left"))
    for found in (left, right):
        for ours, theirs in zip(found[0], want, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for row in range(3):
        for out in (full, left[1]):
            there = np.asarray(out.tokens.valid[row])
            places = np.asarray(out.tokens.position[row])[there].tolist()
            kept[out is full] = dict(zip(places, np.asarray(out.features[row])[there], strict=True))
        assert len(kept[False]) < len(kept[True])
        for position, features in kept[False].items():
            np.testing.assert_allclose(features, kept[True][position], atol=2e-5)
    before, after = left[1].cache.groups
    assert before.bias is None
    assert after.prompt == 12 - MERGING.share(5)[5]
    sizes = np.where(after.valid, np.exp(after.bias), 0)[:, : after.prompt]
    np.testing.assert_allclose(sizes.sum(1), before.count(), rtol=1e-6)


def test_nothing_looks_ahead(merged):
    """Another token changes what stands behind it, and which tokens merge from there on, but no output before it."""
    ids = np.random.default_rng(1).integers(0, 30, 12).astype(np.int32)
    differ = 0
    for start in range(1, 12, 3):
        others = np.tile(ids, (3, 1))
        for row, place in enumerate(range(start, min(start + 2, 12)), 1):
            others[row, place] = (others[row, place] + 11) % 30
        _, read = merged(Prompts(others, np.ones(others.shape, bool)))
        position, features = np.asarray(read.tokens.position), np.asarray(read.features)
        for row, place in enumerate(range(start, min(start + 2, 12)), 1):
            early = [set(position[i][position[i] < place].tolist()) for i in (0, row)]
            assert early[0] ^ early[1] <= {place - 1}  # merges into the other token, or not
            both = early[0] & early[1]
            same = [features[i][np.isin(position[i], list(both))] for i in (0, row)]
            np.testing.assert_allclose(*same, atol=1e-6)
            differ += int((position[0] != position[row]).any())
    assert differ


def test_generate():
    """By name, with strings of different lengths in one batch; a row alone gives the same."""
    graph, params = model(TINY)
    fast = tokjax.reduce(Model(nnx.merge(graph, params)), "prompt_merging", window=2)
    prompts, how = batch("left"), {"max_tokens": 4, "eos_id": None}
    out = fast.generate(prompts.ids, valid=prompts.valid, **how)
    alone = fast.generate(prompts.ids[1:2, 5:], **how)
    np.testing.assert_array_equal(out.ids[1:2], alone.ids)
    np.testing.assert_allclose(out.score[1:2], alone.score, atol=2e-5)
    assert fast.token_counts() == (12, 12, 10)


def test_settings():
    given, signals = tokens(PAIRS)
    for settings, message in (
        ({"keep_rate": 0.4}, r"keep_rate=0.4: must be in \[0.5, 1\]"),
        ({"layers": (2, 2)}, r"layers=\(2, 2\): must be different numbers of blocks"),
        ({"layers": ()}, r"layers=\(\): must be different numbers of blocks, at least 1"),
        ({"first": -1}, "first=-1: must be at least 0"),
        ({"window": 0}, "window=0: must be at least 1"),
        ({"others": 2}, r"special=\(\), others=2: give both or none"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptMerging(**settings)
    with pytest.raises(ValueError, match=r"layers=\(4,\): must be at most the 3 blocks"):
        PromptMerging(layers=(4,)).hooks(TINY.info)
    with pytest.raises(ValueError, match=r"special=\(7,\): the tokens of this model have no kinds"):
        PromptMerging(special=(7,), others=1).plan(given, signals)
    assert PromptMerging(keep_rate=1.0).hooks(TINY.info) == []
    assert PromptMerging(first=9).plan(given, signals) is None
