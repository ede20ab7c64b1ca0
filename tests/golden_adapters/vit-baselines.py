"""Baselines on vision transformers: prunings in a block, whole small models, learned mergers, clusters, patterns."""

import dataclasses
import functools
import math
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch_params

from tokjax import schedules, signals
from tokjax.hooks import Hook
from tokjax.models import layers
from tokjax.models.transformer import Block
from tokjax.models.vit import ViT, ViTConfig
from tokjax.reducers.vit import ats, dpcknn, dynamicvit, evovit, heuristic, kmedoids, patchmerger, sinkhorn, sit
from tokjax.reducers.vit import tokenlearner as tl
from tokjax.reducers.vit.evit import EViT
from tokjax.reducers.vit.topk import TopK
from tokjax.signals import Signals, attention_rows
from tokjax.token_map import Plan, apply, identity, rows
from tokjax.tokens import Tokens
from tokjax.train import losses

INPUTS = (
    *("x", "keep_rate", "fuse", "num_heads", "param.*"),
    *("iters_per_epoch", "start_epoch", "shrink_epochs", "base_keep_rate"),
    *("attention", "values", "*sample_count", "second_attention", "second_values", "n_ref_tokens"),
    *("images", "patch_size", "mlp_ratio", "stage_wise", "reduction_loc", "keep_ratio", "gumbel_noise*"),
    *("*.param.*", "num_out", "sinkhorn.centers_before", "*.eps", "*.iters", "num_tokens"),
    *("num_clusters", "k_neighbours", "uniform_noise", "token_weight", "kmedoids_weights", "kmedoids_iters"),
    *("kmedoids_uniform_first_center", "labels", "teacher_*"),
)
MODEL = (0.0, 3e-5)
WEIGHT = 2.0  # of the ratio loss
TOLERANCE = {"*logits": MODEL, "train_patch_features": MODEL, "block*": MODEL, "*": (0.0, 1e-5)}


def first_row_of_duplicates(inputs):
    """Exactly duplicated tokens: in row 1 the order of the centres hinges on rounding."""
    batch, n = inputs["uniform_noise"].shape
    distinct = [len(np.unique(row, axis=0)) == n for row in inputs["x"]]
    if all(distinct):
        return np.ones((batch, 1), bool)
    return np.arange(batch)[:, None] == 0


def each_channel(inputs):
    return first_row_of_duplicates(inputs)[..., None]


COMPARE = {
    **dict.fromkeys(("center_index", "cluster_index", "new_token_index"), first_row_of_duplicates),
    **dict.fromkeys(("merged_weighted", "merged_equal"), each_channel),
}


def run(case, arrays):
    kind = next(kind for prefix, kind in CASES.items() if case.stem.startswith(prefix))
    ours = kind(case.stem, arrays) if kind is radial else kind(arrays)
    return {name: value for name, value in ours.items() if name in arrays}


def decimal(rate):
    """0.7, where the vectors have its float32 neighbour: counts are rounded up."""
    return round(float(rate), 6)


@dataclasses.dataclass(frozen=True)
class Noted:
    """A reducer, with what it saw and decided."""

    reducer: Any

    def plan(self, tokens, seen):
        plan = self.reducer.plan(tokens, seen)
        plan = Plan(identity(tokens.batch, tokens.length), how="keep") if plan is None else plan
        notes = {"x": tokens.x, "cls": signals.cls_attention(seen), "keep": plan.map.keep, "dest": plan.map.dest()}
        return plan.replace(aux=notes)


def pruning_block(arrays):
    x, make = arrays["x"], EViT if arrays["fuse"] else TopK
    width, hidden = x.shape[2], len(arrays["param.mlp.fc1.bias"])
    cfg = ViTConfig(
        width=width,
        heads=int(arrays["num_heads"]),
        mlp_ratio=(hidden + 0.5) / width,  # the config truncates the product
    )
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(0))))
    reducer = make(decimal(arrays["keep_rate"]))
    hooks = [Hook("after_attention", 0, Noted(reducer))]

    @jax.jit
    def forward(params, x):
        tokens, _ = nnx.merge(graphdef, params)(Tokens(x, prefix=1), hooks)
        return tokens.x, tokens.aux["00.after_attention.Noted"]

    out, notes = forward(torch_params.tree(arrays), x)
    k, dest = reducer.count(x.shape[1] - 1), np.asarray(notes["dest"])[:, 1:]
    return {
        "cls_attention": notes["cls"][:, 1:],
        "kept_index": notes["keep"][:, 1 : 1 + k] - 1,  # counted without CLS
        "removed_index_ascending": np.stack([np.flatnonzero(row > k) for row in dest]),
        "n_kept": k,
        "x_after_attention": notes["x"],
        "block_output": out,
    }


def keep_rate_schedule(arrays):
    epochs, steps = arrays["keep_rate_per_epoch_iter"].shape
    rates = [
        schedules.keep_rate_ramp(
            iteration,
            int(arrays["iters_per_epoch"]),
            base=decimal(arrays["base_keep_rate"]),
            start_epoch=int(arrays["start_epoch"]),
            epochs=int(arrays["shrink_epochs"]),
        )
        for iteration in range(epochs * steps)
    ]
    return {"keep_rate_per_epoch_iter": np.reshape(rates, (epochs, steps))}


def ats_benchmark(arrays):
    ours = {}
    mask = None
    for step, (fore, width) in enumerate((("", "sampled_ids_padded_with_zero"), ("second_", "second_ids"))):
        attention, values, count = (arrays[f"{fore}{name}"] for name in ("attention", "values", "sample_count"))
        samples, columns = int(count) - 1, arrays[width].shape[1]

        @jax.jit
        def all_of(attention, values, mask, samples=samples):
            b, n = attention.shape[0], attention.shape[2]
            tokens = Tokens(jnp.zeros((b, n, 1)), valid=mask, prefix=1)
            seen = Signals(weights=attention, value=values.swapaxes(1, 2))
            score = ats.normalised(ats.significance(tokens, seen))
            plan = ats.ATS(kept=samples).plan(tokens, seen)
            keep = jnp.where(plan.map.keep < n, plan.map.keep, 0)
            chosen = jax.vmap(lambda rows, ids: rows[:, ids])(attention_rows(seen), keep)
            return score, jnp.cumsum(score, -1), keep, plan.valid, chosen

        score, total, keep, valid, chosen = all_of(attention, values, mask)
        assert not np.asarray(valid)[:, columns:].any(), "more tokens than the vectors have"
        mask = valid[:, :columns]
        if step == 0:
            ours |= {
                "sample_points": ats.sample_points(samples, samples)[0],
                "score": score,
                "cdf": total,
                "sampled_ids_padded_with_zero": keep[:, :columns],
                "new_mask": mask,
                "new_attention": chosen[:, :, :columns],
            }
        else:
            ours |= {"second_ids": keep[:, :columns], "second_mask": mask}
    return ours


def ats_official(arrays):
    x, points = arrays["x"], int(arrays["n_ref_tokens"]) - 1
    width, hidden = x.shape[2], len(arrays["param.mlp.fc1.bias"])
    cfg = ViTConfig(width=width, heads=int(arrays["num_heads"]), mlp_ratio=(hidden + 0.5) / width)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(0))))
    params = torch_params.tree(arrays)
    params["attn"].pop("out_zero_mask")  # a constant of the published module
    hooks = [Hook("after_attention", 0, ats.ATS(variant="official", kept=points))]

    @jax.jit
    def block(params, tokens):
        tokens, _ = nnx.merge(graphdef, params)(tokens, hooks)
        return tokens.replace(x=jnp.where(tokens.valid[..., None], tokens.x, 0), aux={})  # the published masking

    first = block(params, Tokens(x, prefix=1))
    second = block(params, first)
    return {
        "block1_output": first.x,
        "block1_mask": first.valid.astype(jnp.float32),
        "block2_output_same_weights": second.x,
        "block2_mask": second.valid.astype(jnp.float32),
    }


def model_of(arrays, **fields):
    """A small published model: config, graph, parameters and images."""
    cfg, params, images = torch_params.vit(arrays, **fields)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(cfg, rngs=nnx.Rngs(0))))
    if cfg.fc_norm:
        params["fc_norm"] = params.pop("norm")
    return cfg, graphdef, params, images


@dataclasses.dataclass(frozen=True)
class Told:
    """A location that notes what the predictor says of all tokens, or decides with the noise that it is given."""

    stage: Any
    noise: Any = None

    def plan(self, tokens, seen):
        every = jnp.ones((tokens.batch, tokens.length - 1))
        return self.stage.plan(tokens, seen).replace(aux={"logprob": self.stage.predictor(tokens.x[:, 1:], every)})

    def decide(self, tokens, seen):
        return self.stage.decide(tokens, seen, self.noise)


def dynamic_vit(arrays):
    cfg, vit, params, images = model_of(arrays)
    locations, rate = tuple(arrays["reduction_loc"].tolist()), decimal(arrays["keep_ratio"][0])
    reducers = {
        form: nnx.split(dynamicvit.DynamicViT(cfg.info, rate, locations, masked=form == "train", ratio_weight=WEIGHT))[
            0
        ]
        for form in ("eval", "train")
    }
    params = {"model": params, "reducer": {"stages": {i: predictor(arrays, i) for i in range(len(locations))}}}

    def forward(form, params):
        reducer = nnx.merge(reducers[form], params["reducer"])
        told = {i: Told(stage, arrays.get(f"gumbel_noise{i}")) for i, stage in enumerate(reducer.stages)}
        hooks = [
            dataclasses.replace(hook, reducer=told[locations.index(hook.layer)])
            if hook.where == "before_block"
            else hook
            for hook in reducer.hooks(cfg.info)
        ]
        return nnx.merge(vit, params["model"])(images, hooks)

    def loss(params):
        out = forward("train", params)
        kept, features = out.tokens.carry[dynamicvit.DECISION], out.features[:, 1:]
        parts = {
            "loss_cls": losses.cross_entropy(out.logits, arrays["labels"].astype(np.int32)),
            "loss_cls_kl": losses.distillation(out.logits, arrays["teacher_logits"]),
            "loss_token": losses.token_distillation(features, arrays["teacher_patch_tokens"], kept),
        }
        ratio = sum(out.tokens.aux[site]["loss/ratio"].mean() for site in out.tokens.aux if "before_block" in site)
        total = parts["loss_cls"] + ratio + 0.5 * (parts["loss_cls_kl"] + parts["loss_token"])
        return total, (out, parts | {"loss": total, "loss_ratio_sum": ratio * len(locations) / WEIGHT})

    (_, (out, ours)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    outs = {"eval": jax.jit(functools.partial(forward, "eval"))(params), "train": out}
    for i, layer in enumerate(locations):
        notes = {form: out.tokens.aux[f"{layer:02d}.before_block.Told"] for form, out in outs.items()}
        ours |= {f"{form}.predictor{i}.logprob": noted["logprob"] for form, noted in notes.items()}
        last = gradient["reducer"]["stages"][i]["predictor"]["out"][2]["kernel"]
        ours |= {f"train.decision{i}": notes["train"]["decision"], f"grad_predictor{i}.out_last_weight": last.T}
    return ours | {
        **{f"{form}_logits": out.logits for form, out in outs.items()},
        "train_patch_features": out.features[:, 1:],
        "final_mask": out.tokens.carry[dynamicvit.DECISION][..., None],
        "grad_pos_embed": gradient["model"]["pos_embed"],
    }


def predictor(arrays, i):
    of = f"param.score_predictor.{i}"
    norm, inner = (torch_params.tree(arrays, f"{of}.in_conv.{part}.") for part in (0, 1))
    out = {j: torch_params.tree(arrays, f"{of}.out_conv.{2 * j}.") for j in range(3)}
    return {"predictor": {"norm": norm, "inner": inner, "out": out}}


def evo_vit(arrays):
    cfg, graphdef, params, images = model_of(arrays, pooling="mean", fc_norm=True)
    for i, block in params["blocks"].items():
        qk, v = (torch_params.tree(arrays, f"param.{name}s.{i}.{name}.") for name in ("qk", "v"))
        qkv = {leaf: jnp.concatenate([qk[leaf], v[leaf]], -1) for leaf in ("kernel", "bias")}
        block["norm1"] = torch_params.tree(arrays, f"param.norms.{i}.")
        block["attn"] = {"qkv": qkv, "proj": torch_params.tree(arrays, f"param.projs.{i}.")}
    hooks = evovit.EvoViT(stage_wise=bool(arrays["stage_wise"])).hooks(cfg.info)
    second = {
        **params,
        "fc_norm": torch_params.tree(arrays, "param.norm_cls."),
        "head": torch_params.tree(arrays, "param.head_cls."),
    }

    @jax.jit
    def forward(params, second, images):
        out, other = nnx.merge(graphdef, params)(images, hooks), nnx.merge(graphdef, second)
        cls = layers.pool(out.tokens, "cls")
        return out.logits, other.head(other.fc_norm(cls))

    logits, of_cls = forward(params, second, images)
    return {"eval_logits": logits, "train_logits": logits, "train_cls_logits": of_cls}


def soft_mergers(arrays):
    x, count = jnp.asarray(arrays["x"]), int(arrays["num_out"])
    width, rngs, ours = x.shape[2], nnx.Rngs(0), {}
    kinds = {name.split(".")[0] for name in arrays if name.endswith(".output")}
    for kind in kinds:
        if kind.startswith("sit"):
            merger = sit.Slimming(width, count, rngs=rngs)
            norm, hidden, out = (torch_params.tree(arrays, f"{kind}.param.weight.{i}.") for i in (0, 1, 3))
            scale = jnp.asarray(arrays[f"{kind}.param.scale"].reshape(()))
            nnx.update(merger, {"norm": norm, "hidden": hidden, "out": out, "scale": scale})
        elif kind.startswith("patchmerger"):
            merger = patchmerger.Queries(width, count, "scaled" in kind, rngs=rngs)
            queries = jnp.asarray(arrays[f"{kind}.param.queries"])
            nnx.update(merger, {"norm": torch_params.tree(arrays, f"{kind}.param.norm."), "queries": queries})
        else:
            eps, iters = sinkhorn_settings(kind, arrays)
            merger = sinkhorn.Centres(width, count, eps, iters, rngs=rngs)
            nnx.update(merger, {"centres": jnp.asarray(arrays["sinkhorn.centers_before"])})
            ours[f"{kind}.centers_after"] = merger.normalised()
        plan = merger.plan(Tokens(x), Signals())
        ours |= {f"{kind}.output": apply(plan, Tokens(x)).x, f"{kind}.weights": plan.map.weights}
    return ours


def sinkhorn_settings(kind, arrays):
    """Of the vector, or told by its name: `sinkhorn_eps01_it5` has eps 0.1 and 5 iterations."""
    if named := re.fullmatch(r"sinkhorn_eps(\d)(\d*)_it(\d+)", kind):
        return float(f"{named[1]}.{named[2] or 0}"), int(named[3])
    return float(arrays[f"{kind}.eps"]), int(arrays[f"{kind}.iters"])


def cluster_maps(arrays):
    x, k = jnp.asarray(arrays["x"]), int(arrays["num_clusters"])
    neighbours, noise = int(arrays["k_neighbours"]), 1e-6 * jnp.asarray(arrays["uniform_noise"])
    tokens = Tokens(x)
    apart = dpcknn.distances(x) * x.shape[2] ** -0.5
    found = dpcknn.clusters(x, k, neighbours=neighbours, noise=noise)
    weighted = tokens.replace(size=jnp.asarray(arrays["token_weight"][..., 0]))
    ours = {
        "distances": apart,
        "density_without_noise": dpcknn.density(apart, neighbours),
        "center_index": found.keep,
        "cluster_index": found.dest(),
        "new_token_index": found.dest(),
        "merged_weighted": apply(Plan(found, how="size"), weighted).x,
        "merged_equal": apply(Plan(found, how="mean"), tokens).x,
    }
    weights = {"weighted": jnp.asarray(arrays["kmedoids_weights"][..., 0]), "uniform": None}
    first, iters = int(arrays["kmedoids_uniform_first_center"]), int(arrays["kmedoids_iters"])
    for kind, weight in weights.items():
        centres, to = kmedoids.medoids(x, k, weight, iters=iters, first=first)
        ours |= {
            f"kmedoids_{kind}_center_index": centres,
            f"kmedoids_{kind}_assignment": to,
            f"kmedoids_{kind}_output": rows(x, centres),
        }
    return ours


def flax_tree(arrays, prefix):
    """Parameters below a prefix by their flax paths."""
    tree = {}
    for name, value in arrays.items():
        if name.startswith(prefix):
            *parents, leaf = name.removeprefix(prefix).split("/")
            here = tree
            for parent in parents:
                here = here.setdefault(parent, {})
            here[leaf] = jnp.asarray(value)
    return tree


def token_learner(arrays):
    x, count = jnp.asarray(arrays["x"]), int(arrays["num_tokens"])
    width, rngs, ours = x.shape[2], nnx.Rngs(0), {}
    side = math.isqrt(x.shape[1])

    def masks(tree):
        return {"hidden": tree["token_masking"]["Dense_0"], "out": tree["token_masking"]["Dense_1"]}

    for kind in ("v1", "v1_mean", "v11"):
        tree = flax_tree(arrays, f"{kind}.param.")
        if kind == "v11":
            merger = tl.DenseMaps(width, count, rngs=rngs)
            nnx.update(merger, {"norm": tree["LayerNorm_0"], "masks": masks(tree)})
        else:
            how = "mean" if kind.endswith("mean") else "sum"
            merger = tl.ConvMaps(width, count, (side, side), how, rngs=rngs)
            nnx.update(merger, {"norm": tree["LayerNorm_0"], "convs": {i: tree[f"Conv_{i}"] for i in range(4)}})
        ours[f"{kind}.output"] = apply(merger.plan(Tokens(x), Signals()), Tokens(x)).x
    fuser, tree = tl.Fuser(width, count, rngs=rngs), flax_tree(arrays, "fuser.param.")
    norms = {"norm1": tree["fuser_mix_norm1"], "norm2": tree["fuser_mix_norm2"], "norm": tree["LayerNorm_0"]}
    nnx.update(fuser, {**norms, "across": tree["Dense_0"], "masks": masks(tree)})
    return ours | {"fuser.output": fuser(ours["v11.output"], x)}


def radial(stem, arrays):
    size, patch, rate = re.fullmatch(r"heuristic_(\d+)_p(\d+)_kr(\d+)", stem).groups()
    rate = float(f"{rate[0]}.{rate[1:]}")
    side = int(size) // int(patch)
    cfg = ViTConfig(image_size=(int(size),) * 2, patch_size=int(patch))
    locations, ours = schedules.stages(cfg.depth), {}
    for metric in ("l1", "l2", "linf"):
        distance = heuristic.radial_distance((side, side), metric)
        falling = heuristic.contiguous_radii(distance, locations[0], locations[-1], cfg.depth)
        told = dict(heuristic.Heuristic(rate, metric=metric).radii(cfg.info))
        now, radii = distance.max(), []
        for layer in range(cfg.depth):
            now = told.get(layer, now)
            radii.append(now)
        ours |= {
            f"{metric}.distance": distance,
            f"{metric}.contiguous_threshold": falling,
            f"{metric}.subset_threshold_per_block": np.array(radii),
            f"{metric}.subset_tokens_per_block": np.array([(distance <= radius).sum() for radius in radii]),
        }
    return ours


CASES = {
    "evit_keep_rate": keep_rate_schedule,
    "evit": pruning_block,
    "topk": pruning_block,
    "ats_benchmark": ats_benchmark,
    "ats_official": ats_official,
    "dynamicvit": dynamic_vit,
    "evo_vit": evo_vit,
    "soft_mergers": soft_mergers,
    "clusters": cluster_maps,
    "tokenlearner": token_learner,
    "heuristic": radial,
}
