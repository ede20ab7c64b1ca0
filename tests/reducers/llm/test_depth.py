"""SwiftKV and SkipDecode: fewer blocks while a decoder reads, fewer while it goes on; bad input."""

import dataclasses
import functools

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tokjax
from tokjax import budget
from tokjax.models.decoder import DecoderConfig, Prompts
from tokjax.models.vit import ViTConfig
from tokjax.reducers.llm import swiftkv
from tokjax.reducers.llm.skipdecode import SkipDecode, SkipDecodeSchedule
from tokjax.reducers.llm.swiftkv import SwiftKV
from tokjax.train import optimisers
from tokjax.train.config import OptimiserConfig
from tokjax.train.losses import swift_kv

CONFIG = DecoderConfig(
    vocab_size=30,
    length=12,
    max_length=64,
    width=16,
    hidden=24,
    depth=6,
    heads=4,
    kv_heads=2,
    head_width=6,
    qkv_bias=True,
    rope_base=100.0,
)
LENGTHS = np.array([[12], [7], [9]])
IDS = np.random.default_rng(0).integers(0, 30, (3, 12)).astype(np.int32)
NEW = np.array([[3, 6], [4, 7], [5, 8]], np.int32)
PADDED = {"right": np.arange(12) < LENGTHS, "left": np.arange(12) >= 12 - LENGTHS}
MORE = np.ones((3, 2), bool)


@functools.cache
def model(**changes):
    """With parameters that are not the small initial ones."""
    made, rng = tokjax.build(dataclasses.replace(CONFIG, **changes)), np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), made.params))


def run(function, *args):
    return jax.jit(function, compiler_options=QUICK)(*args)


def going(reduced, side="right", hooks=None):
    """Logits of a prompt's last token and of two more, and the cache between."""
    hooks = reduced.hooks if hooks is None else hooks

    def outputs(params):
        module = reduced.module(params)
        read = module.prefill(Prompts(IDS, PADDED[side]), hooks, capacity=2)
        step, cache, logits = module.steps(hooks), read.cache, [read.logits]
        for token in NEW.T:
            one, cache = step(cache, jnp.asarray(token))
            logits.append(one)
        return jnp.stack(logits, 1), read.cache

    return run(outputs, reduced.params)


def whole(reduced, side="right"):
    """Logits of the same texts as a whole, at the same places."""
    ids, valid = np.concatenate([IDS, NEW], 1), np.concatenate([PADDED[side], MORE], 1)
    logits = run(lambda p: reduced.forward(p, Prompts(ids, valid)).logits, reduced.params)
    last = np.full(3, 11) if side == "left" else LENGTHS[:, 0] - 1
    return np.stack([logits[np.arange(3), last], logits[:, 12], logits[:, 13]], 1)


def test_all_blocks_are_the_model_itself():
    assert SwiftKV(layer=5.0) == SwiftKV(layer=5)
    for settings in ({"layer": 6}, {"layer": 1.0}, {"layer": 6, "group": 3}):
        same = tokjax.reduce(model(), "swiftkv", **settings)
        assert same.config == CONFIG and not same.hooks
        jax.tree.map(np.testing.assert_array_equal, same.params, model().params)
    assert not tokjax.reduce(model(), "skipdecode", speedup=1.0).hooks


@pytest.mark.parametrize("side", PADDED)
def test_the_first_block_that_shares_makes_what_it_made(side):
    """Keys of the last block, of its own input through a copy of its own norm: nothing but time changes."""
    fast = tokjax.reduce(model(), "swiftkv", layer=5)
    (logits, cache), (plain, before) = going(fast, side), going(model(), side)
    np.testing.assert_allclose(logits, plain, atol=2e-5)
    np.testing.assert_allclose(logits, whole(model(), side), atol=3e-5)
    assert cache.lengths() == (12,) * 6
    np.testing.assert_allclose(cache.groups[0].keys[5], before.groups[0].keys[5], atol=1e-5)


@pytest.mark.parametrize(("settings", "buffers"), [({"layer": 2}, 6), ({"layer": 0.5, "group": 2}, 5)])
def test_leaving_is_running_through_all_blocks(settings, buffers):
    """A prompt whose tokens leave, one whose tokens stay, and the text as a whole; the same cache."""
    fast = tokjax.reduce(model(), "swiftkv", **settings)
    (logits, cache), (slow, full) = going(fast), going(fast, hooks=())
    np.testing.assert_allclose(logits, slow, atol=2e-5)
    np.testing.assert_allclose(logits, whole(fast), atol=3e-5)
    assert [len(group.keys) for group in cache.groups] == [buffers]
    assert cache.layers == full.layers
    there = PADDED["right"][:, None, :, None]
    for name in ("keys", "values"):
        for one, other in zip(getattr(cache.groups[0], name), getattr(full.groups[0], name), strict=True):
            np.testing.assert_allclose(*(np.where(there, x[:, :, :12], 0) for x in (one, other)), atol=1e-5)
    assert np.abs(logits - whole(model())).max() > 1e-2


def test_a_row_does_not_depend_on_those_beside_it():
    fast = tokjax.reduce(tokjax.reduce(model(), "swiftkv"), "skipdecode", n_max=5, n_min=2, length=2)
    logits, cache = going(fast)
    alone = run(lambda p: fast.module(p).prefill(IDS[1:2, :7], fast.hooks, capacity=2).logits, fast.params)
    np.testing.assert_allclose(logits[1:2, 0], alone, atol=2e-5)
    assert cache.lengths() == (12, 0, 12, 12, 12, 12)


def test_tokens_that_a_reducer_drops_first():
    """What FastV drops has no keys in later blocks; hidden or gone is the same."""
    kept = {"layer": 1, "span": (1, -2), "keep_rate": 0.4}
    dropped, hidden = (
        going(tokjax.reduce(tokjax.reduce(model(), "fastv", **kept, masked=masked), "swiftkv", layer=3))
        for masked in (False, True)
    )
    np.testing.assert_allclose(dropped[0], hidden[0], atol=3e-5)
    assert dropped[1].lengths() == (12, *[7] * 5)


@pytest.mark.parametrize("scan", [False, True])
def test_first_projections_of_groups(scan):
    base = model(scan=scan)
    first, config = base.params["model"]["blocks"], dataclasses.replace(CONFIG, scan=scan, kv_layers=1, kv_group=3)

    def of(params, i, *path):
        for name in () if scan else (i,):
            params = params[name]
        for name in path:
            params = params[name]
        return params[i] if scan else params

    for shares, last in (("mean", 2), ("reference", 3)):
        fast = tokjax.reduce(base, "swiftkv", layer=1, group=3, shares=shares)
        assert fast.config == config
        blocks = fast.params["model"]["blocks"]
        for name in ("kernel", "bias"):
            kv = [of(first, i, "attn", "kv", name) for i in range(6)]
            for i, want in ((0, kv[0]), (1, (kv[1] + kv[2] + kv[3]) / 3), (4, (kv[4] + kv[5]) / last)):
                np.testing.assert_allclose(of(blocks, i, "attn", "kv", name), want, atol=1e-7)
        np.testing.assert_array_equal(fast.params["model"]["norm_kv"]["scale"], of(first, 1, "norm1", "scale"))
        np.testing.assert_array_equal(of(blocks, 4, "mlp", "fc1", "kernel"), of(first, 4, "mlp", "fc1", "kernel"))
    if scan:
        np.testing.assert_allclose(going(fast)[0], whole(fast), atol=3e-5)


def test_macs_while_reading():
    """Later blocks cost keys and values of every token, and all else of one."""
    c, n, layer = CONFIG, CONFIG.length, 2
    inner, kept = c.heads * c.head_width, c.kv_heads * c.head_width

    def block(queries, keys):
        return queries * (2 * c.width * inner + 3 * c.width * c.hidden) + keys * 2 * c.width * kept, queries * keys

    def macs(queries):
        blocks = [block(n, n) if i < layer else block(queries, n) for i in range(c.depth)]
        return sum(a + 2 * pairs * inner for a, pairs in blocks) + c.width * c.vocab_size

    fast = tokjax.reduce(model(), "swiftkv", layer=layer)
    read, plain = fast.cost(phase="prefill"), model().cost(phase="prefill")
    assert (read.total, plain.total, read.notes) == (macs(1), macs(n), ())
    assert fast.cost().total == model().cost().total  # logits everywhere


def test_macs_while_going_on():
    """Twelve tokens at depths 5 to 2; without a schedule every step costs the same."""
    c, slots = CONFIG, CONFIG.length + 12
    inner, kept = c.heads * c.head_width, c.kv_heads * c.head_width
    block = 2 * c.width * (inner + kept) + 3 * c.width * c.hidden + 2 * slots * inner
    fast = tokjax.reduce(model(), "skipdecode", n_max=5, n_min=2)
    blocks = SkipDecode(n_max=5, n_min=2).budgets(6, 12)
    assert fast.cost(phase="decode", tokens=12).total == blocks.sum() * block + 12 * c.width * c.vocab_size
    assert model().cost(phase="decode", tokens=12).total == 12 * (6 * block + c.width * c.vocab_size)
    with pytest.raises(ValueError, match="phase='read': must be one of call, prefill, decode"):
        model().cost(phase="read")
    with pytest.raises(ValueError, match="phase='decode': needs a Decoder, this is a ViT"):
        tokjax.build(ViTConfig((8, 8), 4, width=8, depth=1, heads=1)).cost(phase="decode")


@pytest.mark.parametrize(
    ("settings", "bounds", "budgets"),
    [
        ({"speedup": 2.0}, (18, 6), [18, 16, 14, 12, 10, 8, 6]),
        ({"speedup": 1.2}, (24, 16), [24, 23, 21, 20, 19, 17, 16]),
        ({"speedup": 24.0}, (1, 1), [1] * 7),
        ({"speedup": 24.0, "warmup": 3}, (3, 3), [3] * 7),
        ({"n_max": 9, "n_min": 8}, (9, 8), [9, 9, 9, 9, 8, 8, 8]),  # 8.5 is rounded up
    ],
)
def test_bounds_and_budgets(settings, bounds, budgets):
    method = SkipDecode(**settings)
    assert method.bounds(24) == bounds
    np.testing.assert_array_equal(method.budgets(24, 7), budgets)
    assert method.expected(24, 7) == pytest.approx(24 * 7 / sum(budgets))


def test_a_schedule_never_deepens_and_has_the_lowest_and_uppermost_blocks():
    """Also where columns are traced; behind its end the depth stays."""
    schedule, columns = SkipDecodeSchedule(SkipDecode(warmup=2, length=5), 9), np.arange(12)
    active = schedule.active(columns, 3, 12)
    np.testing.assert_array_equal(active.sum(0), [7, 7, 7, 7, 6, 5, 3, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(active[:, 5], [1, 1, 0, 0, 0, 0, 1, 1, 1])
    assert (active[:, 1:] <= active[:, :-1]).all()
    np.testing.assert_array_equal(jax.jit(lambda column: schedule.active(column, 3, 12))(columns), active)
    assert isinstance(schedule.active(np.int32(4), 3, 12)[0], np.bool_)
    free = SkipDecodeSchedule(SkipDecode(warmup=2, prompt=3), 9)  # as many columns as there are
    np.testing.assert_array_equal(free.budget(np.arange(8), None, 8), active.sum(0)[:8])


@pytest.mark.parametrize("side", PADDED)
def test_going_on_at_less_depth_is_the_text_under_its_mask(side):
    fast = tokjax.reduce(model(), "skipdecode", n_max=5, n_min=2, length=2, prompt=12)
    logits, cache = going(fast, side)
    np.testing.assert_allclose(logits, whole(fast, side), atol=3e-5)
    assert cache.lengths() == (12, 0, 12, 12, 12, 12)
    assert np.abs(logits[:, 1] - going(model(), side)[0][:, 1]).max() > 1e-2


def test_generated_texts_fall_over_what_there_is_room_for():
    """`generate` gives what a text at those depths gives: the largest logits behind the prompt."""
    fast = tokjax.reduce(model(), "skipdecode", n_max=6, n_min=1)
    out = fast.generate(IDS, max_tokens=4, eos_id=None)
    text = np.concatenate([IDS, out.ids], 1)
    masked = tokjax.reduce(model(), "skipdecode", n_max=6, n_min=1, prompt=12)
    logits = run(lambda p: masked.forward(p, text).logits, masked.params)
    np.testing.assert_array_equal(logits[:, 11:15].argmax(-1), out.ids)


@pytest.mark.parametrize(("name", "phase"), [("swiftkv", "prefill"), ("skipdecode", "decode")])
def test_a_knob_comes_to_its_target(name, phase):
    found = budget.solve(name, model(), macs=0.6)
    assert found.reached and abs(found.relative - 0.6) < 0.1
    assert found.macs == found.model.cost(phase=phase).total
    assert found.relative == found.macs / model().cost(phase=phase).total
    with pytest.raises(ValueError, match=f"tokens=0.5: {name} leaves all tokens in a call; give macs"):
        budget.solve(name, model(), tokens=0.5)


def test_saved_and_loaded(tmp_path):
    fast = tokjax.reduce(model(), "swiftkv", layer=3, group=2)
    changed = jax.tree.map(lambda x: x + 0.01, fast.params)
    tokjax.save(fast.with_params(changed), tmp_path)
    read = tokjax.load(tmp_path)
    assert dataclasses.replace(read.config, length=12) == fast.config and len(read.hooks) == 1
    jax.tree.map(np.testing.assert_array_equal, read.params["model"]["norm_kv"], changed["model"]["norm_kv"])
    np.testing.assert_allclose(going(read)[0], going(fast.with_params(changed))[0], atol=1e-5)


def test_distillation_comes_nearer_and_leaves_the_rest():
    teacher, fast = model(), tokjax.reduce(model(), "swiftkv", layer=2, group=2)
    inputs, valid = Prompts(IDS, PADDED["right"]), jnp.asarray(PADDED["right"])
    wanted = run(lambda p: teacher.forward(p, inputs, states=True), teacher.params)
    config = OptimiserConfig(lr=5e-3, weight_decay=0.0, frozen=swiftkv.frozen(2))
    update = optimisers.make_optimiser(config, 12, fast.params)

    def loss(params):
        out = fast.forward(params, inputs, states=True)
        return swift_kv(out.logits, wanted.logits, out.states[-2].x, wanted.states[-2].x, valid=valid)[0]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        change, state = update.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    params, state, values = fast.params, update.init(fast.params), []
    for _ in range(10):
        params, state, value = step(params, state)
        values.append(float(value))
    assert np.isfinite(values).all() and values[-1] < 0.7 * values[0]
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), params, fast.params)
    changed = {optimisers.path_name(path) for path, one in jax.tree.leaves_with_path(moved) if one}
    own = {f"model/blocks/{i}/attn/kv/{part}" for i in (2, 4) for part in ("kernel", "bias")}
    queries = {f"model/blocks/{i}/attn/q/{part}" for i in (2, 3, 4, 5) for part in ("kernel", "bias")}
    assert changed == own | queries | {"model/norm_kv/scale"}


def test_the_loss_counts_answers_and_no_padding():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 2, 4, 5)).astype(np.float32)
    hidden, wanted = rng.normal(size=(2, 2, 4, 3)).astype(np.float32)
    answer = np.array([[0, 1, 1, 1], [0, 0, 1, 1]], bool)
    valid = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (teacher, logits))
    apart = (p * np.log(p / q)).sum(-1)
    total, terms = swift_kv(logits, teacher, hidden, wanted, answer, valid, weight=0.5)
    assert terms["logits"] == pytest.approx(4 * apart[answer & valid].sum() / 7, rel=1e-5)
    assert terms["hidden"] == pytest.approx(((hidden - wanted) ** 2)[valid].mean(), rel=1e-5)
    assert total == pytest.approx(terms["logits"] + 0.5 * terms["hidden"])
    broken = np.where(valid[..., None], logits, np.nan)
    assert swift_kv(broken, teacher, hidden, wanted, answer, valid, weight=0.5)[0] == total
    assert swift_kv(logits, teacher, hidden, wanted, valid=np.zeros((2, 4), bool))[0] == 0
    with pytest.raises(ValueError, match=r"answer is \(2, 3\); for these logits it must be \(2, 4\)"):
        swift_kv(logits, teacher, hidden, wanted, answer[:, :3])
    with pytest.raises(ValueError, match=r"both must be \[B, N, V\]"):
        swift_kv(logits, teacher[:1], hidden, wanted)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (SwiftKV, {"layer": -1}, "layer=-1: must be at least 0"),
        (SwiftKV, {"layer": 1.5}, r"layer=1.5: must be in \[0, 1\] as a share"),
        (SwiftKV, {"group": 0}, "group=0: must be at least 1"),
        (SwiftKV, {"shares": "sum"}, "shares='sum': must be one of mean, reference"),
        (SkipDecode, {"speedup": 0.5}, "speedup=0.5: must be at least 1"),
        (SkipDecode, {"warmup": -1}, "warmup=-1: must be at least 0"),
        (SkipDecode, {"length": 0}, "length=0: must be at least 1, or None"),
        (SkipDecode, {"prompt": -1}, "prompt=-1: must be at least 0"),
        (SkipDecode, {"n_max": 4}, "n_max=4, n_min=None: give both or none"),
        (SkipDecode, {"n_max": 4, "n_min": 1, "warmup": 2}, "n_min=1: must be at least warmup=2"),
        (SkipDecode, {"n_max": 2, "n_min": 3}, "n_max=2: must be at least n_min=3"),
    ],
)
def test_bad_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_models_that_they_are_not_for():
    with pytest.raises(ValueError, match="layer=7: must be at most the 6 blocks of the model"):
        tokjax.reduce(model(), "swiftkv", layer=7)
    with pytest.raises(ValueError, match="n_max=7: must be at most the 6 blocks of the model"):
        tokjax.reduce(model(), "skipdecode", n_max=7, n_min=2)
    with pytest.raises(ValueError, match="warmup=7: must be at most the 6 blocks of the model"):
        tokjax.reduce(model(), "skipdecode", warmup=7)
    shared = tokjax.reduce(model(), "swiftkv", layer=3, group=2)
    with pytest.raises(ValueError, match="layer=2, group=2: must be kv_layers=3 and kv_group=2, which the model has"):
        tokjax.reduce(shared, "swiftkv", layer=2, group=2)
    with pytest.raises(ValueError, match="kv_group=2: must be 1 where a depth schedule skips blocks"):
        tokjax.reduce(shared, "skipdecode").cost()
    with pytest.raises(ValueError, match="norm_order='post': keys of an earlier block need norms"):
        tokjax.reduce(model(norm_order="post"), "swiftkv")
    vit = tokjax.build(ViTConfig((8, 8), 4, width=8, depth=2, heads=1))
    with pytest.raises(ValueError, match="This model is a ViT: share_keys needs a Decoder"):
        tokjax.reduce(vit, "swiftkv")
    with pytest.raises(ValueError, match="SkipDecodeSchedule hooks in at 'depth'; this model has"):
        tokjax.reduce(vit, "skipdecode")
