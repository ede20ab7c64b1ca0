"""MrT5: the learned gate in soft and hard form, its baselines, and the span corruption that it is trained with."""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch_params

from tokjax import hooks as hk
from tokjax.data import corruption
from tokjax.models.t5 import T5, Seq2Seq, T5Config, relative_buckets
from tokjax.reducers.llm import byte_baselines, gates
from tokjax.reducers.llm.mrt5 import MrT5
from tokjax.signals import AttentionRule, Signals, attention_rows
from tokjax.token_map import Plan, apply
from tokjax.tokens import MASKED, Tokens
from tokjax.train.controllers import PI
from tokjax.train.losses import cross_entropy

INPUTS = (
    *("raw_token_ids", "input_length", "noise_density", "mean_noise_span_length", "numpy_default_rng_seed"),
    *("attention_mask", "hard_delete", "deletion_threshold", "sigmoid_mask_scale", "delete_gate_layer", "use_softmax1"),
    *("weights_file", "alpha", "beta"),
    *("measured_deletion_fraction", "target", "k_p", "k_i"),
    *("fixed_deletion_amount", "input_ids_*"),
    *("hidden", "non_pad_mask", "raw_boundaries", "prior", "fc*", "uniform_noise", "temperature"),
    *("relative_position", "num_buckets", "max_distance"),
)
TOLERANCE = {
    "*/grad/*": (5e-4, 5e-4),
    "soft_*/*": (2e-4, 2e-4),
    "hard_*/*": (2e-4, 2e-4),
    "pi_controller*/*": (0.0, 1e-12),
    "boundary_predictor*/*": (1e-4, 1e-4),
    "boundary_pooling*/*": (1e-5, 1e-5),
    "softmax1*/*": (1e-6, 1e-6),
    "*": (0.0, 0.0),
}
OF_FILE = "what the case is made of, read from its file: other cases compare an array of this name"
EXCUSED = {"input_ids": OF_FILE, "labels": OF_FILE, "logits": OF_FILE}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(case, arrays)
    return {name: value for name, value in ours.items() if name in arrays}


# The model


@dataclasses.dataclass(frozen=True)
class Probe:
    """Changes nothing and notes the features; behind attention, its map and its biases but that of gates too."""

    gates_hidden: bool = True

    def plan(self, tokens, signals):
        if signals.key is None:
            return Plan(aux={"x": tokens.x})
        bias = 0.0 if signals.pair_bias is None else signals.pair_bias(slice(None))
        if signals.bias is not None and self.gates_hidden:
            bias = bias + jnp.where(signals.bias <= MASKED / 2, MASKED, 0.0)
        return Plan(aux={"rows": attention_rows(signals), "bias": bias})


@dataclasses.dataclass(frozen=True)
class Told:
    """The gate's own plan, with what it keeps."""

    gate: Any

    def plan(self, tokens, signals):
        plan = self.gate.plan(tokens, signals)
        return plan.replace(aux={**plan.aux, "keep": plan.map.keep})


def convert(weights, layer):
    """Parameters of the model and of the gate, from arrays under the checkpoint's names."""
    tree = torch_params.tree(weights, "")

    def joined(parts):
        return {"kernel": jnp.concatenate([part["kernel"] for part in parts], 1)}

    def block(parts, decoder):
        own, mlp = parts[0]["SelfAttention"], parts[1 + decoder]["DenseReluDense"]
        out = {
            "norm1": parts[0]["layer_norm"],
            "norm2": parts[1 + decoder]["layer_norm"],
            "attn": {"qkv": joined([own[name] for name in "qkv"]), "proj": own["o"]},
            "mlp": {"fc1": joined([mlp["wi_0"], mlp["wi_1"]]), "fc2": mlp["wo"]},
        }
        if decoder:
            cross = parts[1]["EncDecAttention"]
            kv = joined([cross[name] for name in "kv"])
            out |= {"norm_cross": parts[1]["layer_norm"], "cross": {"q": cross["q"], "kv": kv, "proj": cross["o"]}}
        return out

    def stack(side, decoder):
        first = side["block"][0]["layer"][0]["SelfAttention"]
        return {
            "relative_bias": first["relative_attention_bias"]["kernel"].T,
            "blocks": {i: block(parts["layer"], decoder) for i, parts in side["block"].items()},
            "norm": side["final_layer_norm"],
        }

    model = {
        "embedding": tree["shared"]["kernel"].T,
        "encoder": stack(tree["encoder"], False),
        "decoder": stack(tree["decoder"], True),
        "head": tree["lm_head"],
    }
    gate = tree["encoder"]["block"][layer]["delete_gate"]
    return {"model": model, "gate": {"norm": gate["layer_norm"], "out": gate["feed_forward"]}}


def t5(case, arrays):
    with np.load(case) as file:
        ids, labels = (jnp.asarray(file[name]) for name in ("input_ids", "labels"))
    with np.load(case.with_name(str(arrays["weights_file"]))) as file:
        weights = {name: jnp.asarray(file[name]) for name in file.files}
    layer, hard = int(arrays["delete_gate_layer"]), bool(arrays["hard_delete"])
    alpha, beta = (float(arrays.get(name, 1.0)) for name in ("alpha", "beta"))
    threshold = float(arrays["deletion_threshold"])
    params = jax.eval_shape(lambda: convert(weights, layer))["model"]
    heads = params["encoder"]["relative_bias"].shape[1]
    cfg = T5Config(
        vocab_size=params["embedding"].shape[0],
        width=params["embedding"].shape[1],
        hidden=params["encoder"]["blocks"][0]["mlp"]["fc2"]["kernel"].shape[0],
        heads=heads,
        head_width=params["encoder"]["blocks"][0]["attn"]["proj"]["kernel"].shape[0] // heads,
        depth=len(params["encoder"]["blocks"]),
        decoder_depth=len(params["decoder"]["blocks"]),
        length=ids.shape[1],
        normaliser="softmax1" if arrays["use_softmax1"] else "softmax",
    )
    gate = MrT5(
        cfg.info,
        layer,
        hard=hard,
        scale=float(arrays["sigmoid_mask_scale"]),
        threshold=threshold,
        capacity=arrays["encoder_delete_bias"].shape[1],
        loss_weight=alpha,
        scores=beta,
        compat="reference",
    )
    module = {"model": nnx.eval_shape(lambda: T5(cfg, rngs=nnx.Rngs(0))), "gate": gate}
    graphdef = nnx.split(module)[0]
    inputs = Seq2Seq(ids, corruption.shift_right(labels), arrays["attention_mask"] > 0)
    count, valid = labels >= 0, arrays["attention_mask"] > 0

    def forward(weights):
        parts = nnx.merge(graphdef, convert(weights, layer))
        first, scored = parts["gate"].hooks(cfg.info)[0], parts["gate"].regularisers()
        probe = Probe(gates_hidden=not hard)
        hooks = [hk.Hook("before_block", i, probe) for i in range(cfg.depth)]
        hooks += [
            hk.Hook(first.where, layer, Told(first.reducer)) if hard else first,
            hk.Hook("before_block", layer, probe),
        ]
        hooks += [hk.Hook("after_attention", layer, probe), hk.Hook("after_cross_attention", 0, probe), *scored]
        out = parts["model"](inputs, hooks, states=True)
        targets = jnp.where(count, labels, 0)
        error = cross_entropy(out.logits.reshape(-1, cfg.vocab_size), targets.reshape(-1), count.reshape(-1))
        terms = hk.losses(out.tokens.aux)
        return error + sum(terms.values()), (error, terms, out, parts["model"].embed(inputs.decoder_ids))

    differentiated = jax.value_and_grad(forward, has_aux=True) if "alpha" in arrays else forward
    told, grads = jax.jit(differentiated)(weights), {}
    if "alpha" in arrays:
        told, grads = told
    total, (error, terms, out, embedded) = told

    aux = out.tokens.aux
    noted = aux[f"{layer:02d}.before_block.{'Told' if hard else 'MrT5'}"]
    before = [aux[f"{i:02d}.before_block.Probe"]["x"] for i in range(cfg.depth)]
    inside, across = aux[f"{layer:02d}.after_attention.Probe"], aux["00.after_cross_attention.Probe"]
    rate = gates.deleted(noted["gate"], valid, -15.0).sum() / valid.sum()
    tokens, kept = out.tokens, noted["gate"] > threshold
    return {
        "gate_input_hidden": before[layer],
        "gate_logits": noted["logits"],
        "gate_values": noted["gate"],
        "encoder_delete_bias": jnp.where(tokens.valid, 0, -1e9) if hard else tokens.key_bias,
        "keep_mask": kept.astype(np.int32),
        "source_positions": noted.get("keep"),
        "new_length": np.int32(tokens.count().max()),
        "gate_layer_attention_input_hidden": aux[f"{layer:02d}.before_block.Probe.2"]["x"],
        "gate_layer_position_bias_plus_mask": jnp.broadcast_to(inside["bias"], inside["rows"].shape),
        **{f"encoder_hidden_before_layer_{i}": x for i, x in enumerate(before)},
        "encoder_last_hidden_after_final_norm": out.encoder.x,
        "decoder_hidden_before_layer_0": embedded,
        **{f"decoder_hidden_before_layer_{i + 1}": state.x for i, state in enumerate(out.decoder_states)},
        "decoder_last_hidden_after_final_norm": out.decoder.x,
        f"encoder_attention_weights_layer_{layer}": inside["rows"],
        "cross_attention_weights_layer_0": across["rows"],
        "logits": out.logits,
        "cross_entropy": error,
        "mean_gate_value_over_nonpad": gates.mean_inside(noted["gate"], valid),
        "percent_nonpad_deleted": 100 * rate,
        "attention_score_loss_unweighted": terms["scores"] / beta,
        "total_loss": total,
        **{f"grad/{name}": value for name, value in grads.items()},
    }


# Its parts


def softmax1(case, arrays):
    with np.load(case) as file:
        logits = jnp.asarray(file["logits"])

    @jax.jit
    def weights(logits):  # queries are the logits, keys unit vectors
        keys = jnp.eye(logits.shape[1])[None, :, None]
        signals = Signals(logits[None, :, None], keys, keys, rule=AttentionRule(normaliser="softmax1"))
        plain = signals.replace(rule=AttentionRule())
        return attention_rows(signals)[0, 0], attention_rows(plain)[0, 0]

    return dict(zip(("weights", "plain_softmax"), weights(logits), strict=True))


def buckets(case, arrays):
    sizes = {"buckets": int(arrays["num_buckets"]), "max_distance": int(arrays["max_distance"])}
    both = (relative_buckets(arrays["relative_position"], causal=causal, **sizes) for causal in (False, True))
    return dict(zip(("bucket_bidirectional", "bucket_causal"), both, strict=True))


def controller(case, arrays):
    pi = PI(**{name: float(arrays[name]) for name in ("target", "k_p", "k_i")})
    with jax.enable_x64(True):
        _, state = jax.lax.scan(lambda s, r: (pi.step(s, r),) * 2, pi.init(), arrays["measured_deletion_fraction"])
        ours = {"alpha": state.weight, "p_acc": state.proportional, "i_acc": state.integral}
        return {f"{name}_after_update": np.asarray(value) for name, value in ours.items()}


def fixed(case, arrays):
    gate = byte_baselines.ByteFixed(amount=round(float(arrays["fixed_deletion_amount"]), 6))
    stays = jax.jit(lambda ids: gate.of_ids(ids, jnp.ones(ids.shape, bool)))
    texts = [name for name in arrays if name.startswith("input_ids_")]
    ours = {name: jnp.where(stays(arrays[name][None])[0], 0, gates.SCALE) for name in texts}
    separators = np.array([*byte_baselines.SEPARATORS[1:], byte_baselines.SEPARATORS[0]], np.int32)  # the end last
    return {name.replace("input_ids", "gate_values"): v for name, v in ours.items()} | {
        "separator_token_ids": separators
    }


def pooling(case, arrays):
    prior, slots = round(float(arrays["prior"]), 6), arrays["pooled_hidden"].shape[1]

    @jax.jit
    def all_of(x, valid, drawn):
        ends = byte_baselines.boundaries(drawn, valid)
        segment, n = (jnp.cumsum(ends, 1) - ends).astype(int), x.shape[1]
        map = byte_baselines.pool_cells(segment, valid, slots, most=n)
        place = jnp.broadcast_to(jnp.arange(n), valid.shape)
        count = ends.sum(1).astype(int)
        there = jnp.arange(slots) < count[:, None]
        out = apply(Plan(map, how="mean", valid=there), Tokens(x, position=place, valid=valid))
        trials = jnp.full(len(x), n)
        return {
            "hard_boundaries": ends,
            "pooled_hidden": out.x,
            "num_segments": count,
            "segment_first_positions": jnp.where(there, out.position, 0),
            "boundary_loss": byte_baselines.prior_loss(ends, trials, prior).mean(),
        }

    return all_of(arrays["hidden"], arrays["non_pad_mask"] > 0, arrays["raw_boundaries"])


def predictor(case, arrays):
    width, hidden = arrays["hidden"].shape[-1], len(arrays["fc1_bias"])
    graphdef = nnx.split(nnx.eval_shape(lambda: byte_baselines.Predictor(width, hidden, nnx.Rngs(0))))[0]
    params = {
        ours: {"kernel": jnp.asarray(arrays[f"{theirs}_weight"].T), "bias": jnp.asarray(arrays[f"{theirs}_bias"])}
        for ours, theirs in (("inner", "fc1"), ("out", "fc2"))
    }

    @jax.jit
    def all_of(params, x, noise):
        logits = nnx.merge(graphdef, params)(x)
        soft, hard = byte_baselines.relaxed_bernoulli(logits, noise, float(arrays["temperature"]))
        return {"logits": logits, "probs": nnx.sigmoid(logits), "soft_boundaries": soft, "hard_boundaries": hard}

    return all_of(params, arrays["hidden"], arrays["uniform_noise"].astype(np.float32))


# Span corruption


def span_corruption(case, arrays):
    ids, rng = arrays["raw_token_ids"], np.random.default_rng(int(arrays["numpy_default_rng_seed"]))
    density, mean_span = (round(float(arrays[name]), 6) for name in ("noise_density", "mean_noise_span_length"))
    tokens, target = corruption.lengths(int(arrays["input_length"]), density, mean_span)
    noise = np.stack([corruption.noise_mask(ids.shape[1], rng, density, mean_span) for _ in ids])
    inputs, labels = corruption.corrupt(ids, noise)
    return {
        "noise_mask": noise.astype(np.int32),
        "input_ids": inputs,
        "labels": labels,
        "decoder_input_ids": corruption.shift_right(labels),
        "tokens_length": np.int32(tokens),
        "targets_length": np.int32(target),
    }


def span_lengths(case, arrays):
    name = "rows_inputlen_density_meanspan_tokenslen_targetslen"
    with np.load(case) as file:  # the first three columns are the question
        questions = file[name][:, :3]
    return {name: [(*row, *corruption.lengths(int(row[0]), row[1], row[2])) for row in questions.tolist()]}


CASES = {
    "span_corruption": span_corruption,
    "span_lengths": span_lengths,
    "soft_": t5,
    "hard_": t5,
    "softmax1": softmax1,
    "relative_position": buckets,
    "pi_controller": controller,
    "fixed_gate": fixed,
    "boundary_pooling": pooling,
    "boundary_predictor": predictor,
}
