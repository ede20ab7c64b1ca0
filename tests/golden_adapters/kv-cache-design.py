"""Prompts of different lengths and layouts in one batch, padded on either side, with steps behind them."""

import functools

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np
import tiny_llama

from tokjax.cache import PROMPT, VISUAL
from tokjax.reducers.llm.fastv import FastV
from tokjax.tokens import Tokens

INPUTS = (
    *tiny_llama.INPUTS,
    *("num_rows", "steps", "row*_inputs_embeds", "row*_sys_image_text_rank", "row*_decode_embeds"),
)
TOLERANCE = {"*": (0, 3e-5)}


def run(case, arrays):
    """Both sides must agree before one of them is compared."""
    right, left = (padded(arrays, side) for side in ("right", "left"))
    for name, value in right.items():
        np.testing.assert_allclose(left[name], value, atol=3e-5, err_msg=name)
    return right


def padded(arrays, side):
    model, count = tiny_llama.model(arrays), int(arrays["num_rows"])
    prompts = [arrays[f"row{r}_inputs_embeds"] for r in range(count)]
    layouts = np.stack([arrays[f"row{r}_sys_image_text_rank"] for r in range(count)])
    longest = max(map(len, prompts))
    x = np.zeros((count, longest, prompts[0].shape[1]), np.float32)
    kind = np.zeros((count, longest), np.int32)
    for row, (prompt, (before, visual, _, _)) in enumerate(zip(prompts, layouts, strict=True)):
        start = longest - len(prompt) if side == "left" else 0
        x[row, start : start + len(prompt)] = prompt
        kind[row, start : start + len(prompt)] = PROMPT
        kind[row, start + before : start + before + visual] = VISUAL
    steps = np.stack([arrays[f"row{r}_decode_embeds"] for r in range(count)], 1)
    others = int((layouts[:, 0] + layouts[:, 2]).max())
    pruning = FastV(layer=int(arrays["K"]), kept=tuple(map(int, layouts[:, 3])), kind=VISUAL, others=others)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def outputs(params):
        module = model.module(params)
        tokens = Tokens(jnp.asarray(x), kind=jnp.asarray(kind), valid=jnp.asarray(kind > 0))
        read = module.prefill(tokens, pruning.hooks(model.info), capacity=len(steps))
        cache, decoded = read.cache, []
        for one in steps:
            features, cache = module.step(cache, jnp.asarray(one)[:, None])
            decoded.append(features[:, 0])
        return read, cache, jnp.stack(decoded, 1)

    read, cache, decoded = outputs(model.params)
    lengths = np.stack([cache.groups[group].count() for group, _ in cache.layers], 1)
    results = {}
    for row in range(count):
        there = np.asarray(read.tokens.valid[row])
        results |= {
            f"row{row}_keep_positions": np.asarray(read.tokens.position[row])[there],
            f"row{row}_prefill_last_hidden": np.asarray(read.features[row])[there],
            f"row{row}_decode_last_hidden": decoded[row],
            f"row{row}_cache_len_per_layer": lengths[row],
        }
    return results
