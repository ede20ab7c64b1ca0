"""What a reduction costs besides MACs: its share of a block, dispatch, and the first call of a process.

python -m experiments.vit_speed.overheads     # prints the figures of README.md; a quiet machine, two minutes
"""

import os
from pathlib import Path
import subprocess
import sys
import tempfile

from flax import nnx
import jax

import tokjax
from tokjax.bench import timing
from tokjax.models.transformer import Block
from tokjax.models.vit import ViTConfig, preset

FIRST_CALL = """
import time, jax, tokjax
from tokjax.models.vit import preset
model = tokjax.reduce(tokjax.build(preset("s/16")), "tome", r=13)
images = jax.block_until_ready(jax.numpy.zeros((8, 224, 224, 3)))
start = time.perf_counter()
jax.block_until_ready(model(images))
print(time.perf_counter() - start)
"""


def share_of_a_block(batch: int = 8, r: int = 13) -> None:
    """Match and merge, alone, against one block's forward at N=197, C=384."""
    cfg = preset("s/16")
    graph, state = nnx.split(Block(cfg, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    x = jax.random.normal(jax.random.key(0), (batch, 197, cfg.width))
    key = jax.random.normal(jax.random.key(1), (batch, 197, cfg.heads, cfg.width // cfg.heads))
    size = jax.numpy.ones((batch, 197))
    tome = tokjax.reducers.tome(r=r)

    @jax.jit
    def block(params, x):
        return nnx.merge(graph, params)(tokjax.Tokens(x, prefix=1))[0].x

    def reduction(form):
        @jax.jit
        def run(x, size, key):
            with tokjax.token_map.apply_form(form):
                tokens = tokjax.Tokens(x, size=size, prefix=1)
                tokens = tokjax.apply(tome.plan(tokens, tokjax.Signals(key=key)), tokens)
            return tokens.x, tokens.size

        return lambda: run(x, size, key)

    @jax.jit
    def match(x, size, key):
        plan = tome.plan(tokjax.Tokens(x, size=size, prefix=1), tokjax.Signals(key=key))
        return plan.map.keep, plan.map.moved, plan.map.into

    runs = {
        "block": lambda: block(params, x),
        "match": lambda: match(x, size, key),
        "match + merge, scatter": reduction("scatter"),
        "match + merge, matmul": reduction("matmul"),
    }
    times = timing.interleaved(runs, repeats=9, min_seconds=0.4)
    for name, time in times.items():
        share = 100 * time.median_s / times["block"].median_s
        print(f"B={batch} {name}: {1e3 * time.median_s:.2f} ms, {share:.1f} % of a block")


def dispatch() -> None:
    """A call of a loaded model against jax.jit over the pure dict, on a model that computes next to nothing."""
    model = tokjax.build(ViTConfig(image_size=(8, 8), patch_size=8, width=8, depth=12, heads=1, num_classes=2))
    images = jax.numpy.zeros((1, 8, 8, 3))
    bare = jax.jit(lambda params, images: model.forward(params, images).logits)
    runs = {"jax.jit over the pure dict": lambda: bare(model.params, images), "model(images)": lambda: model(images)}
    times = timing.interleaved(runs, repeats=15, min_seconds=0.2)
    for name, time in times.items():
        print(f"{name}: {1e6 * time.median_s:.0f} us a call")
    print(f"ratio {timing.ratio(times['model(images)'], times['jax.jit over the pure dict']):.2f}")


def first_call() -> None:
    """ToMe r=13 on ViT-S/16 at batch 8 in fresh processes, without and with a filled compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        root = Path(__file__).parents[2]
        env = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": str(root)}
        for name in ("cold cache", "warm cache", "warm cache"):
            run = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], env=env, capture_output=True, text=True, check=True
            )
            print(f"first call, {name}: {float(run.stdout):.2f} s after imports")


if __name__ == "__main__":
    print(timing.device_summary())
    share_of_a_block()
    dispatch()
    first_call()
