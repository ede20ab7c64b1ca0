"""What a config runs: each task is data, a model and a metric."""

import importlib
from pathlib import Path
from typing import Protocol

import ml_collections

from tokjax.errors import UserError

MODES = (
    "all",
    "train",
    "eval",
    "sweep",
    "features",
    "generate",
    "bench",
    "viz",
    "train_methods",
    "compare",
    "speed",
    "lengths",
    "search",
    "schedules",
    "finetune",
    "report",
)
TASKS = {  # name -> module beside this one and class in it; imported when it runs
    "a_clip": ("a_clip", "AClip"),
    "byte_lm": ("byte_lm", "ByteLM"),
    "byte_study": ("byte_study", "ByteStudy"),
    "causal_lm": ("causal_lm", "CausalLM"),
    "classify": ("classify", "Classify"),
    "compare": ("compare", "Compare"),
    "features": ("features", "FrozenFeatures"),
    "train_reducer": ("train_reducer", "TrainReducer"),
    "kv_compare": ("kv_compare", "KVCompare"),
    "dense": ("dense", "Dense"),
    "rates": ("rates", "Rates"),
    "retrieval": ("retrieval", "Retrieval"),
    "text_classify": ("text_classify", "TextClassify"),
    "zero_shot": ("zero_shot", "ZeroShot"),
}


class Task(Protocol):
    """A mode of the command line is a method of the task."""

    def run(self, mode: str) -> None: ...


def make(config: ml_collections.ConfigDict, workdir: Path, command: str) -> Task:
    """The task that the config names.

    Raises:
        UserError: there is none of this name.
    """
    if config.task not in TASKS:
        raise UserError(f"config.task={config.task!r}: must be one of {', '.join(TASKS)}")
    module, name = TASKS[config.task]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)(config, workdir, command)
