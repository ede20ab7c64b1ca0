"""GTP: scores, graphs, sparse attention, propagation, and a whole tiny model."""

import dataclasses
from functools import partial

from flax import nnx
import jax
import jax.numpy as jnp

from tokjax.hooks import Hook
from tokjax.models import layers
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit import gtp, tome
from tokjax.reducers.vit.gtp import GTP
from tokjax.signals import AttentionRule, Context, Signals, attention_rows
from tokjax.token_map import Plan, apply, rows
from tokjax.tokens import Tokens

INPUTS = (
    *("x", "attention", "num_prop", "class_token", "alpha_f64", "grid_side", "num_neighbours", "graph_in"),
    *("token_scales", "token_scales_in", "sparsity_f64", "num_heads", "layernorm_eps_f64", "token_scale"),
    *("graph_type_is_mixed", "tokens_in", "qkv_*", "proj_*", "w_*"),
)
TOLERANCE = {
    **dict.fromkeys(("block*", "logits"), (0.0, 1e-4)),  # a whole model
    "spatial_adjacency": (0.0, 0.0),
    "*": (0.0, 1e-5),
}
SELECTIONS = {
    "CLSAttnMean": "cls_mean",
    "CLSAttnMax": "cls_max",
    "IMGAttnMean": "column_mean",
    "IMGAttnMax": "column_max",
    "DiagAttnMean": "diagonal_mean",
    "DiagAttnMax": "diagonal_max",
    "MixedAttnMean": "mixed_mean",
    "MixedAttnMax": "mixed_max",
    "SumAttnMax": "sum_max",
    "CosSimMean": "cosine_mean",
    "CosSimMax": "cosine_max",
}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def select(arrays):
    weights, prefix, number = arrays["attention"], int(arrays["class_token"]), int(arrays["num_prop"])
    batch, _, n, _ = weights.shape
    tokens = Tokens(jnp.zeros((batch, n, 1)), prefix=prefix)
    signals, ours = Signals(weights=jnp.asarray(weights)), {}
    for published, selection in SELECTIONS.items():
        if f"score_{published}" not in arrays:
            continue
        plan = GTP(number, selection, propagation="mean").plan(tokens, signals)
        ours |= {
            f"score_{published}": gtp.scores(signals.weights, selection, prefix=prefix)[:, prefix:],
            f"kept_{published}": plan.map.keep[:, prefix : n - number],
            f"propagated_{published}": plan.map.moved,
        }
    return ours


def graph(arrays):
    x, prefix, side = jnp.asarray(arrays["x"]), int(arrays["class_token"]), int(arrays["grid_side"])
    tokens, signals = Tokens(x, prefix=prefix), Signals(context=Context(grid=(side, side)))
    unit = tome.unit(x[:, prefix:])
    ours = {"cosine": tome.similarity(unit, unit)}
    for kind in ("spatial", "semantic", "mixed"):
        reducer = GTP(graph_type=kind, neighbours=int(arrays["num_neighbours"]))
        made = reducer.graph(tokens, signals).carry["gtp"]["graph"]
        ours |= {f"graph_normalised_{kind.title()}": made, f"row_degree_{kind.title()}": (made > 0).sum(-1)}
    ours["spatial_adjacency"] = ours["graph_normalised_Spatial"][0] > 0
    ours["semantic_edges"] = ours["graph_normalised_Semantic"] > 0
    return ours


def attention(arrays):
    x, heads, sparsity = jnp.asarray(arrays["x"]), int(arrays["num_heads"]), float(arrays["sparsity_f64"])
    b, n, c = x.shape
    qkv = x @ arrays["qkv_kernel_torch_out_in"].T + arrays["qkv_bias"]
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)
    tokens = Tokens(x, size=jnp.asarray(arrays["token_scales"]))
    bias = tokens.attention_bias()[:, None, None]
    signals = Signals(q, k, v, bias, rule=AttentionRule((c // heads) ** -0.5))
    seen = GTP(sparsity=sparsity).attend(tokens, signals)
    out = layers.attention(seen).reshape(b, n, c) @ arrays["proj_kernel_torch_out_in"].T + arrays["proj_bias"]
    return {
        "attention_dense": attention_rows(signals),
        "attention_sparse": seen.weights,
        "out": out,
        "kth_smallest": gtp.least_rank(n, sparsity),
        "kept_per_head": (seen.weights > 0).sum((2, 3)),
    }


def propagate(arrays, propagation="graph"):
    x, prefix, number = jnp.asarray(arrays["x"]), int(arrays["class_token"]), int(arrays["num_prop"])
    batch, n, _ = x.shape
    reducer = GTP(number, alpha=float(arrays["alpha_f64"]), propagation=propagation)
    size = jnp.asarray(arrays["token_scales_in"]) if "token_scales_in" in arrays else None
    tokens, carry = Tokens(x, size=size, prefix=prefix), {}
    if propagation == "graph":
        every = jnp.broadcast_to(jnp.arange(n - prefix), (batch, n - prefix))
        carry = {"gtp": {"graph": jnp.asarray(arrays["graph_in"]), "row": every}}
    tokens = tokens.replace(carry=carry)
    plan = reducer.plan(tokens, Signals(weights=jnp.asarray(arrays["attention"])))
    out, moved = apply(plan, tokens), plan.map.moved
    if propagation == "none":
        order = GTP(number, propagation="mean").plan(tokens, Signals(weights=jnp.asarray(arrays["attention"])))
        moved = order.map.moved
    ours = {
        "kept_idx": plan.map.keep[:, prefix : n - number],
        "propagated_idx": moved,
        "x_out": out.x,
        "token_map_W": plan.map.matrix(),
        "token_scales_out": out.sizes(),
    }
    return ours | ({"graph_out": restricted(out)} if carry else {})


def restricted(tokens):
    """The graph of the tokens that are left."""
    graph, row = tokens.carry["gtp"]["graph"], tokens.carry["gtp"]["row"]
    return rows(rows(graph, row).swapaxes(1, 2), row).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A hook that changes nothing and notes what it sees."""

    def plan(self, tokens, signals):
        return Plan(aux={"x": tokens.x, "graph": restricted(tokens), "size": tokens.sizes()})


def tiny_vit(arrays):
    x, side = arrays["tokens_in"], int(arrays["grid_side"])
    depth, width = sum(name.endswith("qkv_bias") for name in arrays), x.shape[2]
    cfg = ViTConfig(
        image_size=(side, side),
        patch_size=1,
        width=width,
        depth=depth,
        heads=int(arrays["num_heads"]),
        mlp_ratio=(len(arrays["w_block0_fc1_bias"]) + 0.5) / width,  # the config truncates the product
        num_classes=len(arrays["w_head_bias"]),
        norm_eps=float(arrays["layernorm_eps_f64"]),
    )
    graphdef, state = nnx.split(ViT(cfg, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    params |= {"norm": part(arrays, "w_norm"), "head": part(arrays, "w_head"), "blocks": {}}
    for i in range(depth):
        qkv, proj, fc1, fc2, norm1, norm2 = (
            part(arrays, f"w_block{i}_{name}") for name in ("qkv", "proj", "fc1", "fc2", "norm1", "norm2")
        )
        attn, mlp = {"qkv": qkv, "proj": proj}, {"fc1": fc1, "fc2": fc2}
        params["blocks"][i] = {"norm1": norm1, "attn": attn, "norm2": norm2, "mlp": mlp}
    reducer = GTP(
        int(arrays["num_prop"]),
        graph_type="mixed" if arrays["graph_type_is_mixed"] else "spatial",
        neighbours=int(arrays["num_neighbours"]),
        alpha=float(arrays["alpha_f64"]),
        sparsity=float(arrays["sparsity_f64"]),
        token_scale=bool(arrays["token_scale"]),
    )
    hooks = reducer.hooks(cfg.info)
    probes = [Hook("before_block", 0, Probe()), *(Hook("after_block", i, Probe()) for i in range(depth))]

    @jax.jit
    def forward(params, x):
        out = nnx.merge(graphdef, params).encode(Tokens(x, prefix=cfg.prefix), [*hooks, *probes])
        return out.logits, out.tokens.aux

    logits, aux = forward(params, x)
    ours = {"logits": logits, "graph_in": aux["00.before_block.Probe"]["graph"]}
    for i in range(depth):
        seen = aux[f"{i:02d}.after_block.Probe"]
        ours |= {f"block{i}_out": seen["x"], f"block{i}_graph": seen["graph"], f"block{i}_scales": seen["size"]}
    return ours


def part(arrays, name):
    """Kernel or scale and bias of one layer; kernels lie transposed in the vectors."""
    kernel = arrays.get(f"{name}_kernel_torch_out_in")
    first = {"scale": jnp.asarray(arrays[f"{name}_scale"])} if kernel is None else {"kernel": jnp.asarray(kernel.T)}
    return first | {"bias": jnp.asarray(arrays[f"{name}_bias"])}


CASES = {
    "select": select,
    "graph": graph,
    "sparse_attention": attention,
    "attention": attention,
    "propagate": propagate,
    "drop_none": partial(propagate, propagation="none"),
    "drop_mean": partial(propagate, propagation="mean"),
    "tiny_vit": tiny_vit,
}
