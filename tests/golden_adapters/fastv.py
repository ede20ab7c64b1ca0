"""FastV in small LLaMA models: choices, every block's input, and caches with two steps behind them."""

import dataclasses
import functools

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np
import tiny_llama

from tokjax import hooks as hk
from tokjax.reducers.llm.fastv import FastV
from tokjax.signals import attention_rows, last_row
from tokjax.token_map import Plan
from tokjax.tokens import MASKED, Tokens

INPUTS = (
    *tiny_llama.INPUTS,
    *("inputs_embeds", "decode_embeds", "sys_len", "image_len", "text_len", "rank_kept"),
)
TOLERANCE = {"score_image": (0, 1e-6), "attn_Kminus1": (0, 1e-6), "*": (0, 2e-5)}


@dataclasses.dataclass(frozen=True)
class Watch:
    """Notes what every block gives before anything is dropped."""

    def plan(self, tokens, signals):
        rows = attention_rows(signals)
        return Plan(aux={"x": tokens.x, "rows": rows, "last": last_row(tokens, signals).mean(1)})


def run(case, arrays):
    model, k = tiny_llama.model(arrays), int(arrays["K"])
    start, count = int(arrays["sys_len"]), int(arrays["image_len"])
    kept, masked = int(arrays["rank_kept"]), case.stem.startswith("mask")
    pruning = FastV(layer=k, kept=kept, span=(start, start + count), masked=masked).hooks(model.info)
    watching = [hk.Hook("after_block", layer, Watch()) for layer in range(model.info.depth)]
    steps = jnp.asarray(arrays["decode_embeds"]) if "decode_embeds" in arrays else jnp.zeros((0, 1, 1, 1))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def outputs(params):
        module = model.module(params)
        read = module.prefill(Tokens(jnp.asarray(arrays["inputs_embeds"])), [*watching, *pruning], capacity=len(steps))
        cache, decoded, places = read.cache, [], []
        for x in steps:
            places.append(cache.position[0])
            features, cache = module.step(cache, x)
            decoded.append(features)
        return read, cache, decoded, places

    read, cache, decoded, places = outputs(model.params)
    noted = [read.tokens.aux[f"{layer:02d}.after_block.Watch"] for layer in range(model.info.depth)]
    results = {"hidden_0": arrays["inputs_embeds"], "last_hidden": read.features}
    results |= {f"hidden_{i + 1}": one["x"] for i, one in enumerate(noted[:-1])}
    results[f"hidden_{len(noted)}"] = read.features
    results["attn_Kminus1"] = noted[k - 1]["rows"]
    results["score_image"] = noted[k - 1]["last"][0, start : start + count]
    results["keep_positions"] = read.tokens.position[0]
    if masked:
        seen = np.asarray(read.tokens.key_bias[0] > MASKED / 2)
        results |= {"key_visible_last_row": seen, "keep_positions": np.flatnonzero(seen)}
    if decoded:
        results |= {"decode_last_hidden": jnp.stack(decoded), "decode_position_ids": jnp.stack(places)}
        groups = [(cache.groups[group], i) for group, i in cache.layers]
        results["cache_lengths_final"] = jnp.stack([group.count()[0] for group, _ in groups])
        for layer, (group, i) in enumerate(groups):
            results[f"cache_key_prefill_{layer}"] = group.keys[i][:, :, : group.prompt]
            results[f"cache_value_prefill_{layer}"] = group.values[i][:, :, : group.prompt]
    return {name: value for name, value in results.items() if name in arrays}
