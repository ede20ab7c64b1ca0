"""TokenWeave: how batches of texts are cut in two, and sums over devices with the norm behind them."""

import functools

from contract_setup import QUICK
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
import numpy as np

from tokjax.models import weave

INPUTS = (
    *("request_new_tokens", "request_computed_tokens", "split_offset"),
    *("partial_sums_per_device", "residual_in", "norm_weight", "epsilon"),
)
TOLERANCE = {"residual_out": (0, 1e-5), "normed_out": (0, 1e-5)}


def run(case, arrays):
    if "partial_sums_per_device" in arrays:
        return reduced(arrays)
    new, computed = arrays["request_new_tokens"], arrays["request_computed_tokens"]
    split = weave.split(new, computed, offset=int(arrays["split_offset"]))
    results = {"split_size": split.size, "padded_total": split.total}
    results |= {"first_query_lens": split.first_queries, "second_query_lens": split.second_queries}
    return {**results, "first_kv_lens": split.first_keys, "second_kv_lens": split.second_keys}


def reduced(arrays):
    """Two parts of the tokens, each over the devices; their halves need no multiple of a tile."""
    partial, residual = arrays["partial_sums_per_device"], arrays["residual_in"]
    devices, tokens, _ = partial.shape
    mesh = jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    size = weave.split([tokens], multiple=2).size

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec("model"), PartitionSpec()), out_specs=PartitionSpec("model")
    )
    def part(partial, residual):
        mine = weave.own(residual[None], "model")[0]
        weight, eps = arrays["norm_weight"], arrays["epsilon"]
        residual, normed = weave.fused_reduce_norm(partial[0], mine, weight, eps, "model")
        return residual, normed[None]

    halves = [part(partial[:, at], residual[at]) for at in (slice(size), slice(size, tokens))]
    sums = [half[0][:count] for half, count in zip(halves, (size, tokens - size), strict=True)]
    normed = [half[1] for half in halves]
    for one in normed:  # every device has them all
        np.testing.assert_array_equal(one, jnp.broadcast_to(one[:1], one.shape))
    results = {"residual_out": jnp.concatenate(sums), "normed_out": jnp.concatenate([one[0] for one in normed])}
    return {**results, "split_size": np.int32(size)}
