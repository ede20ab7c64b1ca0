"""What a config runs: each task is data, a model and a metric."""

from pathlib import Path
from typing import Protocol

import ml_collections

from tokjax.errors import UserError

MODES = ("all", "train", "eval", "sweep", "bench", "viz")


class Task(Protocol):
    """A mode of the command line is a method of the task."""

    def run(self, mode: str) -> None: ...


def make(config: ml_collections.ConfigDict, workdir: Path, command: str) -> Task:
    """The task that the config names.

    Raises:
        UserError: there is none of this name.
    """
    from tokjax.tasks.classify import Classify

    tasks = {"classify": Classify}
    if config.task not in tasks:
        raise UserError(f"config.task={config.task!r}: must be one of {', '.join(tasks)}")
    return tasks[config.task](config, workdir, command)
