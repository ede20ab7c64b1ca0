"""A whole run on made-up data: `python tiny_run.py WORKDIR [field=value ...]`. Killed and restarted by test_loop.py."""

import sys
import time
from typing import Any

import jax
import numpy as np

from tokjax.train.config import default_config
from tokjax.train.loop import train
from tokjax.train.losses import accuracy, cross_entropy

FEATURES, CLASSES, BATCH, EXAMPLES = 12, 3, 16, 20 * 16 + 5


class Points:
    """Gaussian classes, shuffled anew each epoch; a place in them is an epoch and a batch."""

    def __init__(self, pause: float = 0.0) -> None:
        rng = np.random.default_rng(0)
        self.label = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
        self.image = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
        self.image[:, :CLASSES] += 2 * np.eye(CLASSES, dtype=np.float32)[self.label]
        self.pause = pause

    def __iter__(self) -> "PointsIterator":
        return PointsIterator(self)


class PointsIterator:
    def __init__(self, points: Points) -> None:
        self.points, self.epoch, self.batch = points, 0, 0

    def __next__(self) -> dict[str, Any]:
        time.sleep(self.points.pause)
        if self.batch == EXAMPLES // BATCH:
            self.epoch, self.batch = self.epoch + 1, 0
        order = np.random.default_rng((1, self.epoch)).permutation(EXAMPLES)
        rows = order[self.batch * BATCH : (self.batch + 1) * BATCH]
        self.batch += 1
        return {"image": self.points.image[rows], "label": self.points.label[rows], "valid": np.ones(BATCH, bool)}

    def get_state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def set_state(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]


def init_params() -> dict[str, Any]:
    rng = np.random.default_rng(2)

    def dense(n: int, m: int) -> dict[str, Any]:
        return {"kernel": (rng.normal(size=(n, m)) / np.sqrt(n)).astype(np.float32), "bias": np.zeros(m, np.float32)}

    return {"blocks": {0: dense(FEATURES, 16), 1: dense(16, 16)}, "head": dense(16, CLASSES)}


def forward(params: Any, image: Any, key: Any = None) -> Any:
    x = image
    for block in params["blocks"].values():
        x = jax.nn.gelu(x @ block["kernel"] + block["bias"])
    if key is not None:  # dropout, so that a restart with another key or step would show
        x = x * jax.random.bernoulli(key, 0.8, x.shape) / 0.8
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params: Any, batch: Any, key: Any) -> Any:
    logits = forward(params, batch["image"], key)
    correct, total = accuracy(logits, batch["label"], batch["valid"])
    return cross_entropy(logits, batch["label"], batch["valid"], 0.1), {"accuracy": correct / total}


@jax.jit
def scores(params: Any, image: Any, label: Any) -> dict[str, Any]:
    logits = forward(params, image)
    correct, total = accuracy(logits, label)
    return {"accuracy": correct / total, "loss": cross_entropy(logits, label)}


def evaluate(params: Any) -> dict[str, float]:
    points = Points()
    return {name: float(value) for name, value in scores(params, points.image, points.label).items()}


def config(**changes: Any) -> Any:
    optimiser = {"lr": 3e-3, "warmup_steps": 10}
    fields = {"total_steps": 200, "log_every": 1, "eval_every": 50, "checkpoint_every": 20, "ema_decay": 0.99}
    return default_config(**fields | {"optimiser": optimiser} | changes)


if __name__ == "__main__":
    cfg = config()
    pause = 0.0
    for change in sys.argv[2:]:
        name, _, value = change.partition("=")
        if name == "pause":
            pause = float(value)
        else:
            cfg[name] = type(cfg[name])(value)
    train(cfg, sys.argv[1], init_params=init_params(), loss_fn=loss_fn, train_loader=Points(pause), evaluate=evaluate)
