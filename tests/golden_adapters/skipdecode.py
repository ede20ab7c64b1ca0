"""SkipDecode: schedules, and a small decoder under one, as a whole text and through the cache."""

import functools

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np

import tokjax
from tokjax.models.decoder import DecoderConfig
from tokjax.reducers.llm.skipdecode import SkipDecode, SkipDecodeSchedule

INPUTS = ("param/*", "input_ids", "num_*", "n_max", "n_min", "warmup_layers", "prompt_length", "horizon")
TOLERANCE = {"logits": (0, 1e-4), "hidden_after_layer": (0, 1e-4), "expected_speedup": (1e-12, 0)}


def run(case, arrays):
    prompt, end = int(arrays["prompt_length"]), int(arrays["horizon"])
    method = SkipDecode(
        n_max=int(arrays["n_max"]),
        n_min=int(arrays["n_min"]),
        warmup=int(arrays["warmup_layers"]),
        length=max(end - prompt, 1),
        prompt=prompt,
    )
    model = model_of(arrays) if "input_ids" in arrays else None
    depth = int(arrays["num_layers"]) if model is None else model.info.depth
    schedule, columns = SkipDecodeSchedule(method, depth), np.arange(arrays["budget_per_position"].shape[0])
    budget, active = (function(columns, None, end) for function in (schedule.budget, schedule.active))
    results = {"budget_per_position": budget, "active": active.astype(np.int32)}
    results["expected_speedup"] = method.expected(depth, max(end - prompt, 1))
    if model is not None:
        results |= decoded(model, method, arrays["input_ids"], prompt)
    return {name: value for name, value in results.items() if name in arrays}


def decoded(model, method, ids, prompt):
    """Features of the text as a whole, logits by a step a token behind the prompt, if there is one."""
    ids, hooks = jnp.asarray(ids), method.hooks(model.info)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def outputs(params):
        module = model.module(params)
        whole = module(ids, hooks, states=True)
        states = jnp.stack([tokens.x for tokens in whole.states])
        if prompt == 0:
            return whole.logits, states
        read = module.prefill(ids[:, :prompt], hooks, capacity=ids.shape[1] - prompt)
        step, cache, logits = module.steps(hooks), read.cache, [module.logits(read.features)]
        for column in range(prompt, ids.shape[1]):
            one, cache = step(cache, ids[:, column])
            logits.append(one[:, None])
        return jnp.concatenate(logits, 1), states

    logits, states = outputs(model.params)
    return {"logits": logits, "hidden_after_layer": states}


def model_of(arrays):
    named = {name.removeprefix("param/"): jnp.asarray(x) for name, x in arrays.items() if name.startswith("param/")}
    vocab_size, width = named["embed"].shape
    heads, depth = int(arrays["num_heads"]), sum(name.endswith("/wq") for name in named)
    config = DecoderConfig(
        vocab_size=vocab_size,
        max_length=len(named["pos"]),
        width=width,
        hidden=named["layer0/w1"].shape[1],
        depth=depth,
        heads=heads,
        kv_heads=heads,
        head_width=named["layer0/wq"].shape[1] // heads,
        feed="tanh",
        norm="layer",
        position="learned",
        tied=True,
        bos_id=None,
        eos_ids=(),
    )

    def block(i):
        def linear(*names):
            return {"kernel": jnp.concatenate([named[f"layer{i}/{name}"] for name in names], 1)}

        attention = {"q": linear("wq"), "kv": linear("wk", "wv"), "proj": linear("wo")}
        norms = {f"norm{j}": norm(named, f"layer{i}/ln{j}") for j in (1, 2)}
        return {"attn": attention, "mlp": {"fc1": linear("w1"), "fc2": linear("w2")}, **norms}

    params = {
        "embedding": named["embed"],
        "positions": jnp.pad(named["pos"], ((2, 0), (0, 0))),  # the table has two rows before position 0
        "blocks": {i: block(i) for i in range(depth)},
        "norm": norm(named, "lnf"),
    }
    return tokjax.build(config).with_params({"model": params})


def norm(named, name):
    return {"scale": named[f"{name}_w"], "bias": named[f"{name}_b"]}
