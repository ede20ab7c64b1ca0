import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokjax
from tokjax.hooks import Hook, ModelInfo, losses
from tokjax.models.t5 import Seq2Seq, T5Config
from tokjax.reducers import create
from tokjax.reducers.llm import gates
from tokjax.reducers.llm.mrt5 import MrT5, excess, gate_loss
from tokjax.signals import AttentionRule, Signals, attention_rows
from tokjax.token_map import apply
from tokjax.tokens import Tokens

WIDTH, N = 8, 6
INFO = ModelInfo(depth=4, width=WIDTH, heads=2, length=N, decoder_depth=2)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, N, WIDTH)).astype(np.float32)
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
PLACE = np.tile(np.arange(N, dtype=np.int32), (3, 1))
PADDED = Tokens(X, position=PLACE, valid=VALID)


def gated(values):
    return np.array(values, np.float32)


def hardened(gate, tokens=PADDED, **options):
    """Positions that stay in each row, and what the plan noted."""
    plan = gates.harden(tokens, gated(gate), threshold=-15.0, **options)
    out = apply(plan, tokens)
    return [np.asarray(p[v]).tolist() for p, v in zip(out.position, out.valid, strict=True)], plan.aux, out


OPEN, SHUT = 0.0, -30.0


def test_survivors_stay_in_order_at_their_places():
    gate = [[OPEN, SHUT, OPEN, SHUT, OPEN, SHUT], [SHUT, OPEN, SHUT, OPEN, OPEN, OPEN], [OPEN] * 6]
    places, aux, out = hardened(gate)
    assert places == [[0, 2, 4], [1, 3], []]  # open gates in the padding keep nothing
    np.testing.assert_array_equal(out.x[0, :3], X[0, [0, 2, 4]])
    assert out.key_bias is None
    assert not aux["overflow"].any()


def test_a_row_that_would_lose_everything_keeps_its_first_token():
    left_padded = PADDED.replace(valid=VALID[:, ::-1])
    for tokens, second in ((PADDED, [0]), (left_padded, [2])):
        places, aux, _ = hardened([[SHUT] * 6] * 3, tokens)
        assert places == [[0], second, []]
        assert aux["overflow"].tolist() == [0, 0, 0]
        counts = gates.counted(jnp.full((3, N), SHUT), jnp.asarray(tokens.valid), -15.0)
        assert counts["starved"].tolist() == [1, 1, 0] and counts["deleted"].tolist() == [6, 4, 0]


@pytest.mark.parametrize(("overflow", "stay"), [("gate", [1, 3, 5]), ("tail", [0, 1, 3])])
def test_overflow_is_counted_and_goes_by_gate_or_from_the_tail(overflow, stay):
    gate = [[-9, -1, SHUT, -1, -9, -2]] * 3
    places, aux, out = hardened(gate, capacity=3, overflow=overflow)
    assert places[0] == stay and out.length == 3
    assert aux["overflow"].tolist() == [2, 0, 0]


def test_a_gate_at_the_threshold_is_dropped_but_not_counted():
    gate = gated([[-15, np.nextafter(np.float32(-15), 0), np.nextafter(np.float32(-15), -16), 0, 0, 0]] * 3)
    places, _, _ = hardened(gate)
    assert places[0] == [1, 3, 4, 5]
    assert gates.deleted(jnp.asarray(gate), jnp.asarray(VALID), -15.0).tolist() == [1, 1, 0]


def test_the_form_of_the_released_code():
    gate = [[SHUT, OPEN, SHUT, OPEN, SHUT, SHUT]] * 3
    _, _, out = hardened(gate, capacity=4, compat="reference")
    np.testing.assert_array_equal(out.x[0], X[0, [1, 3, 0, 0]])
    np.testing.assert_array_equal(out.position[0], [1, 3, 0, 0])
    _, _, out = hardened(gate, capacity=4, compat="reference", renumber=True)
    np.testing.assert_array_equal(out.position[0], [0, 1, 2, 3])


def attended(plan, tokens):
    """What one attention head over the tokens of a plan gives to the tokens that are left."""
    after = apply(plan, tokens)
    x = after.x[:, :, None]
    bias = after.attention_bias()
    signals = Signals(x, x, x, bias[:, None, None], rule=AttentionRule(normaliser="softmax1"))
    return np.einsum("bhqn,bnhd->bqhd", attention_rows(signals), x)[:, :, 0], after


def test_soft_and_hard_agree_where_gates_are_extreme():
    stays = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    gate = gated(np.where(stays, 0, -1e4))
    soft, _ = attended(gates.soften(PADDED, gate), PADDED)
    hard, after = attended(gates.harden(PADDED, gate, threshold=-15.0), PADDED)
    for row in range(2):
        kept = np.asarray(after.position[row][after.valid[row]])
        np.testing.assert_allclose(hard[row][after.valid[row]], soft[row, kept], atol=1e-6)
    assert np.isfinite(hard).all() and np.isfinite(soft).all()


def test_gates_start_open_and_padding_is_shut():
    z, gate = MrT5(INFO).gate(PADDED)
    x = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(z, x @ np.asarray(MrT5(INFO).out.kernel[...])[:, 0] + 1, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(MrT5(INFO).out.kernel[...])).max() <= np.sqrt(6 / (WIDTH + 1))
    assert (np.asarray(gate)[~VALID] == -30).all()
    assert ((np.asarray(gate) > -30) & (np.asarray(gate) < 0))[VALID].all()


def soft(reducer, tokens=PADDED):
    return reducer.soften(tokens, Signals())


def test_the_mean_is_over_the_tokens_of_the_batch():
    plan = soft(MrT5(INFO, hard=False, loss_weight=0.5))
    gate = np.asarray(plan.aux["gate"])
    np.testing.assert_allclose(plan.aux["loss/gate"], 0.5 * gate[VALID].mean(), rtol=1e-6)
    assert plan.aux["tokens"].tolist() == [6, 4, 0] and plan.aux["deleted"].shape == (3,)
    np.testing.assert_array_equal(plan.key_bias, gate)


def test_losses_of_logits():
    z = gated([[1, -40, 3], [2, 2, 2]])
    valid = jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_allclose(gate_loss(z, z, valid, "logits_mean"), (1 - 40 + 2) / 3, rtol=1e-6)
    np.testing.assert_allclose(gate_loss(z, z, valid, "clamped_logits_mean"), (1 - 30 + 2) / 3, rtol=1e-6)


def test_a_batch_that_is_all_padding_gives_no_nan():
    nothing = PADDED.replace(valid=np.zeros_like(VALID))
    plan = soft(MrT5(INFO, hard=False), nothing)
    assert plan.aux["loss/gate"] == 0 and plan.aux["deleted"].sum() == 0 and plan.aux["starved"].sum() == 0
    out = apply(MrT5(INFO).plan(nothing, Signals()), nothing)
    assert not out.valid.any() and np.isfinite(out.x).all()


def test_the_gradient_reaches_the_tokens_that_are_no_padding():
    def total(x):
        plan = soft(MrT5(INFO, hard=False), PADDED.replace(x=x))
        return plan.aux["loss/gate"] + jnp.where(VALID, plan.key_bias, 0).sum()

    g = np.abs(np.asarray(jax.grad(total)(X))).max(-1)
    assert (g[VALID] > 0).all() and (g[~VALID] == 0).all()


def test_both_forms_have_the_same_parameters():
    """The learning form biases, the plain one deletes; a threshold below all gates deletes nothing."""
    learning = create("mrt5", INFO, hard=False)
    assert [hook.call for hook in learning.hooks(INFO)] == ["soften"]
    assert [hook.call for hook in create("mrt5", INFO).hooks(INFO)] == ["plan"]
    assert MrT5(INFO, threshold=-31.0).plan(PADDED, Signals()).map is None
    assert MrT5(INFO, threshold=-31.0, capacity=2).plan(PADDED, Signals()).map.num_out == 2


def test_noise_is_drawn_where_it_is_asked_for():
    key = jax.random.key(1)
    context = Signals().context.replace(key=key)
    plain, noisy = (MrT5(INFO, hard=False, gumbel=gumbel) for gumbel in (False, True))
    still = plain.soften(PADDED, Signals(context=context)).aux["logits"]
    np.testing.assert_array_equal(noisy.soften(PADDED, Signals()).aux["logits"], still)  # without a key
    moved = np.asarray(noisy.soften(PADDED, Signals(context=context)).aux["logits"] - still)
    assert np.unique(moved[VALID].round(5)).size == VALID.sum()


# The regulariser of scores


def scores(batch=2, queries=7, keys=5, masked=True):
    q, k = (jnp.asarray(RNG.normal(size=(batch, n, 2, 4)).astype(np.float32) * 3) for n in (queries, keys))
    bias = np.where(np.arange(keys) < 4, -20.0, -1e30).astype(np.float32)[None, None, None]
    return Signals(q, k, k, bias if masked else None)


def test_scores_are_counted_without_gates_and_in_blocks():
    given = scores()
    raw = np.einsum("bqhd,bkhd->bhqk", given.query, given.key)
    raw[..., 4] = -1e30
    expected = np.maximum(raw - 5, 0).mean()
    assert expected > 0
    reducer = MrT5(INFO, layer=3, scores=1.0)
    noted = reducer.regularise(PADDED, given).aux["loss/scores"]
    np.testing.assert_allclose(noted, expected / 3, rtol=1e-5)  # one block of the encoder, two of the decoder

    def in_blocks(q, block):
        return excess(given.replace(query=q, bias=None), block)

    whole, parts = (jax.value_and_grad(in_blocks)(given.query, block) for block in (128, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, parts)


def test_scores_are_read_in_all_attention_that_has_the_gate():
    hooks = MrT5(INFO, layer=2, scores=0.5, hard=False).hooks(INFO)
    assert [(h.where, h.layer) for h in hooks] == [
        ("before_block", 2),
        ("after_attention", 2),
        ("after_attention", 3),
        ("after_cross_attention", 0),
        ("after_cross_attention", 1),
    ]
    assert all(isinstance(hook, Hook) for hook in hooks)
    assert len(MrT5(INFO, layer=2, scores=0.5).hooks(INFO)) == len(MrT5(INFO, hard=False).hooks(INFO)) == 1


# In an encoder-decoder

T5 = T5Config(
    vocab_size=384,
    length=16,
    decoder_length=5,
    width=16,
    hidden=24,
    heads=2,
    head_width=8,
    depth=3,
    decoder_depth=2,
    normaliser="softmax1",
)


def reduced(scale=1.0, **settings):
    """A T5 with a gate whose logits are spread around 0, `scale` times as wide."""
    made = tokjax.reduce(tokjax.build(T5), "mrt5", layer=1, **settings)
    params, rng = made.params, np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)
    out = params["reducers"][0]["out"]
    params["reducers"][0]["out"] = {"kernel": 3 * scale * out["kernel"], "bias": 0 * out["bias"]}
    return made.with_params(params)


def texts(lengths, width=16):
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 259, (len(lengths), width)) * (np.arange(width) < np.array(lengths)[:, None])
    return Seq2Seq(ids.astype(np.int32), rng.integers(3, 259, (len(lengths), 5)).astype(np.int32))


def test_a_model_with_extreme_gates_is_the_same_in_both_forms():
    x = texts((16, 9, 12))
    hard = reduced(scale=300.0)
    out, traced = hard(x, trace=True)
    np.testing.assert_allclose(out, hard.learning()(x), atol=1e-4)
    assert (traced.tokens[-1] < traced.tokens[0]).all()


def test_a_padded_text_gives_what_it_gives_alone():
    x = texts((16, 9, 12))
    short = Seq2Seq(x.ids[1:2, :9], x.decoder_ids[1:2])
    for model in (reduced(), reduced().learning()):
        np.testing.assert_allclose(model(x)[1:2], model(short), atol=2e-5)


def test_what_rewards_deletion_moves_the_gate_and_what_stands_before_it():
    learning, x = reduced(scores=0.5).learning(), texts((16, 9))

    def term(params):
        terms = losses(learning.forward(params, x).tokens.aux)
        assert set(terms) == {"gate", "scores"}
        return terms["gate"]

    gradient = jax.jit(jax.grad(term))(learning.params)
    encoder = gradient["model"]["encoder"]["blocks"]
    moved = [max(np.abs(leaf).max() for leaf in jax.tree.leaves(part)) > 0 for part in encoder.values()]
    assert moved == [True, False, False]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["reducers"]))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["model"]["decoder"]))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 4}, "layer=4: must be in 0 to 3"),
        ({"scale": 0.0}, "scale=0.0: must be below 0"),
        ({"capacity": 0}, "capacity=0: must be a whole number of at least 1"),
        ({"capacity": 0.6}, "capacity=0.6: must be a whole number"),
        ({"target": 1.0}, r"target=1.0: must be in \(0, 1\)"),
        ({"loss_weight": np.nan}, "loss_weight=nan: must be at least 0 and finite"),
        ({"scores": -1.0}, "scores=-1.0: must be at least 0"),
        ({"loss": "gate_var"}, "loss='gate_var': must be one of gate_mean"),
        ({"overflow": "head"}, "overflow='head': must be one of gate, tail"),
        ({"compat": "paper"}, "compat='paper': must be one of positions, reference"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        create("mrt5", INFO, **settings)


def test_a_model_of_another_width():
    with pytest.raises(ValueError, match="width=16: these parameters were made for width=8"):
        create("mrt5", INFO).hooks(ModelInfo(4, 16, 2, N))


def test_the_target_that_fills_the_capacity():
    assert MrT5(INFO).target is None and MrT5(INFO, capacity=3).target == 0.5
    assert MrT5(INFO, capacity=3, target=0.7).target == 0.7
