"""What a training run can be told, with defaults, checked before anything is compiled."""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any, Self

import ml_collections

from tokjax.errors import UserError


def _check(config: Any, where: str, rules: Mapping[str, tuple[bool, str]]) -> None:
    for name, (holds, allowed) in rules.items():
        if not holds:
            raise UserError(f"{where}{name} is {getattr(config, name)!r}; it must be {allowed}")


def _real(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _pairs(x: Any) -> bool:
    def pair(one: Any) -> bool:
        return isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str) and _real(one[1]) and one[1] >= 0

    return isinstance(x, tuple) and all(map(pair, x))


def _fields(config: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with a linear warm-up and a cosine. An experiment's config sets its own values over these defaults.

    Attributes:
        lr: learning rate at the end of the warm-up.
        final_lr: learning rate that the cosine reaches at the last step.
        warmup_steps: steps of linear warm-up; or give `warmup_fraction` of all steps, in [0, 1).
        weight_decay: decoupled, times the learning rate; `optimisers.decayed` says which parameters it touches.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        clip_norm: largest global norm of the gradients of what is trained; None: no clipping.
        accumulate: parts that a batch is split into, one after the other, before the one update that it gives.
        frozen: regular expressions; a parameter is not trained if one matches its path (`model/blocks/0/norm1/scale`)
            or the end of it from any `/` on: `blocks/0/.*`, `pos_embed`.
        scales: pairs of such an expression and what the learning rate of the parameters that it matches is multiplied
            by; the first that matches counts.
    """

    lr: float = 1e-3
    final_lr: float = 0.0
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    accumulate: int = 1
    frozen: tuple[str, ...] = ()
    scales: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        frozen = self.frozen
        strings = isinstance(frozen, tuple) and all(isinstance(x, str) for x in frozen)
        rules = {
            "lr": (_real(self.lr) and self.lr > 0, "a number above 0"),
            "final_lr": (_real(self.final_lr) and self.final_lr >= 0, "a number of at least 0"),
            "warmup_steps": (_whole(self.warmup_steps) and self.warmup_steps >= 0, "a whole number of at least 0"),
            "warmup_fraction": (_real(self.warmup_fraction) and 0 <= self.warmup_fraction < 1, "a number in [0, 1)"),
            "weight_decay": (_real(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0"),
            "b1": (_real(self.b1) and 0 <= self.b1 < 1, "a number in [0, 1)"),
            "b2": (_real(self.b2) and 0 <= self.b2 < 1, "a number in [0, 1)"),
            "eps": (_real(self.eps) and self.eps > 0, "a number above 0"),
            "clip_norm": (self.clip_norm is None or (_real(self.clip_norm) and self.clip_norm > 0), "above 0, or None"),
            "accumulate": (_whole(self.accumulate) and self.accumulate >= 1, "a whole number of at least 1"),
            "frozen": (strings, "a tuple of regular expressions"),
            "scales": (_pairs(self.scales), "a tuple of pairs of a regular expression and a number of at least 0"),
        }
        _check(self, "optimiser.", rules)
        if self.warmup_steps and self.warmup_fraction:
            raise UserError(
                f"optimiser.warmup_steps is {self.warmup_steps} and optimiser.warmup_fraction is "
                f"{self.warmup_fraction}; give one of them"
            )
        for name, patterns in (("frozen", frozen), ("scales", [pattern for pattern, _ in self.scales])):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"optimiser.{name} has {pattern!r}, not a regular expression: {error}") from None

    @classmethod
    def of(cls, cfg: "Mapping[str, Any] | ml_collections.ConfigDict | OptimiserConfig") -> Self:
        """Reads a ConfigDict; fields that it lacks keep their default.

        Raises:
            UserError: an unknown field, or a value outside its range.
        """
        values = _values(cfg)
        if unknown := sorted(set(values) - set(_fields(cls))):
            raise UserError(f"optimiser.{unknown[0]} is not a field; there are {', '.join(_fields(cls))}")
        if isinstance(values.get("frozen"), str):
            values["frozen"] = (values["frozen"],)
        elif "frozen" in values:
            values["frozen"] = tuple(values["frozen"])
        if isinstance(values.get("scales"), list | tuple):
            values["scales"] = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in values["scales"])
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What `loop.train` reads of an experiment's config; other fields there are left to others.

    Attributes:
        total_steps: updates of the whole run, over all restarts.
        seed: of the key that dropout, drop path and random reducers draw from.
        log_every: steps between two lines of `metrics.jsonl`.
        eval_every: steps between two evaluations; 0: only at the end.
        checkpoint_every: steps between two checkpoints; one is also written at the end and for a new best.
        keep_last: checkpoints kept besides the best.
        keep_best: keep the best checkpoint by `best_metric` too.
        best_metric: which of the evaluation's values is compared.
        best_mode: "max" or "min".
        ema_decay: of the moving average of the parameters, which is then what is evaluated; None: no average.
        max_bad_steps: this many steps in a row without finite gradients end the run.
        prefetch: batches put on the device ahead of the step that reads them.
        tensorboard: write TensorBoard events too (needs tensorboardX).
        optimiser: an `OptimiserConfig`.
    """

    total_steps: int
    seed: int = 0
    log_every: int = 50
    eval_every: int = 0
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_best: bool = True
    best_metric: str = "accuracy"
    best_mode: str = "max"
    ema_decay: float | None = None
    max_bad_steps: int = 10
    prefetch: int = 2
    tensorboard: bool = False
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        counts = ("total_steps", "log_every", "checkpoint_every", "keep_last", "max_bad_steps", "prefetch")
        ema, seed = self.ema_decay, self.seed
        rules = {
            **{n: (_whole(x := getattr(self, n)) and x >= 1, "a whole number of at least 1") for n in counts},
            "eval_every": (_whole(self.eval_every) and self.eval_every >= 0, "a whole number of at least 0"),
            "seed": (_whole(seed) and 0 <= seed < 2**32, "a whole number in [0, 2^32)"),
            "best_mode": (self.best_mode in ("max", "min"), "'max' or 'min'"),
            "best_metric": (isinstance(self.best_metric, str), "the name of one of the evaluation's values"),
            "ema_decay": (ema is None or (_real(ema) and 0 < ema < 1), "a number between 0 and 1, or None"),
            "keep_best": (isinstance(self.keep_best, bool), "True or False"),
            "tensorboard": (isinstance(self.tensorboard, bool), "True or False"),
        }
        _check(self, "", rules)

    @classmethod
    def of(cls, cfg: "Mapping[str, Any] | ml_collections.ConfigDict | TrainConfig") -> Self:
        """Reads an experiment's config; fields that it lacks keep their default.

        Raises:
            UserError: no `total_steps`, or a value outside its range.
        """
        values = {name: value for name, value in _values(cfg).items() if name in _fields(cls)}
        if "total_steps" not in values:
            raise UserError("total_steps is not in the config; it must be a whole number of at least 1")
        return cls(**values | {"optimiser": OptimiserConfig.of(values.get("optimiser", {}))})


def _values(cfg: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(cfg) and not isinstance(cfg, type):
        return {name: getattr(cfg, name) for name in _fields(type(cfg))}
    return {name: cfg[name] for name in cfg}


def default_config(total_steps: int, **changes: Any) -> ml_collections.ConfigDict:
    """Every field above as a ConfigDict, for an experiment's config to start from.

    Args:
        total_steps: updates of the whole run.
        **changes: fields to set; `optimiser` may be a dict of some of its fields.

    Returns:
        A ConfigDict with all fields of TrainConfig and, below `optimiser`, of OptimiserConfig.
    """
    config = ml_collections.ConfigDict(dataclasses.asdict(TrainConfig.of({"total_steps": total_steps} | changes)))
    if config.ema_decay is None:  # a typed None, so that the command line can still set it
        config.ema_decay = ml_collections.config_dict.placeholder(float)
    return config
