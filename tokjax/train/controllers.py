"""Weights of a loss term that change while a run goes on: steered to a target rate, or held back for some steps.

A controller's state lives in the `TrainState`, so that a restarted run goes on with the same numbers. The loss gets the
weight as a further argument, its metrics tell what was reached, and the state moves once per update, with the rate of
the whole batch: not per accumulated part, not in evaluation, not where a step is skipped.

Source: Kallini et al., MrT5, ICLR 2025, appendix; jkallini/mrt5, `training/trainer.py`. There every call of the loss
moves the state, each accumulated part and each evaluated batch too.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Protocol

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


class Controller(Protocol):
    """What `make_step` asks of a controller: static settings, a small state of arrays."""

    def init(self) -> PyTree[Array]:
        """The state before the first step."""
        ...

    def weight(self, state: Any, step: Int[Array, ""]) -> Float[Array, ""]:
        """What the loss gets at this step, counted from 0."""
        ...

    def update(self, state: Any, metrics: Mapping[str, Array], step: Int[Array, ""]) -> Any:
        """The state after the update of this step, from the loss's metrics, which are means over the parts."""
        ...

    def report(self, metrics: Mapping[str, Array]) -> dict[str, Array]:
        """Further metrics of the step."""
        ...


class PIState(struct.PyTreeNode):
    """The terms of a PI controller."""

    proportional: Float[Array, ""]
    integral: Float[Array, ""]
    weight: Float[Array, ""]


def _check_delay(delay: int) -> None:
    if delay < 0:
        raise ValueError(f"delay={delay}: must be at least 0")


@dataclasses.dataclass(frozen=True)
class PI:
    """A proportional-integral controller: the weight rises while the rate is below its target.

    With e = target - rate: P <- 0.9 P + 0.1 k_p e, I <- I + k_i e, weight <- max(0, P + I). A step uses the weight from
    before its own update. I is not bounded, so that a target which stays out of reach winds it up.

    Attributes:
        target: rate to reach, in (0, 1).
        k_p: gain of the error, smoothed.
        k_i: gain of its sum; the published 1e-5, or 5e-5 in the released example.
        start: weight before the first update.
        delay: steps at the start with weight 0, in which the state stands still.
        counts: names of two metrics of the loss, the rate being the first divided by the second. With counts the rate
            is that of the whole batch, however tokens are spread over its parts.

    Raises:
        ValueError: a value out of range.
    """

    target: float
    k_p: float = 0.5
    k_i: float = 1e-5
    start: float = 0.0
    delay: int = 0
    counts: tuple[str, str] = ("deleted", "tokens")

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target={self.target}: must be in (0, 1)")
        for name in ("k_p", "k_i", "start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and finite")
        _check_delay(self.delay)

    def init(self) -> PIState:
        zero, start = (jnp.full((), value, jnp.result_type(float)) for value in (0.0, self.start))
        return PIState(zero, jnp.copy(zero), start)  # one array each: a step gives them away

    def step(self, state: PIState, rate: Float[Array, ""]) -> PIState:
        """One update."""
        error = self.target - rate
        proportional = 0.9 * state.proportional + 0.1 * self.k_p * error
        integral = state.integral + self.k_i * error
        return PIState(proportional, integral, jnp.maximum(0, proportional + integral))

    def rate(self, metrics: Mapping[str, Array]) -> Float[Array, ""]:
        """The rate that the metrics tell.

        Raises:
            ValueError: they lack one of `counts`.
        """
        for name in self.counts:
            if name not in metrics:
                raise ValueError(f"counts={self.counts}: the loss's metrics have no {name!r}, only {sorted(metrics)}")
        part, whole = (metrics[name] for name in self.counts)
        return part / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)

    def weight(self, state: PIState, step: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.where(step < self.delay, 0, state.weight)

    def update(self, state: PIState, metrics: Mapping[str, Array], step: Int[Array, ""]) -> PIState:
        new = self.step(state, self.rate(metrics))
        late = step >= self.delay
        return PIState(*(jnp.where(late, n, o) for n, o in zip(_parts(new), _parts(state), strict=True)))

    def report(self, metrics: Mapping[str, Array]) -> dict[str, Array]:
        return {"rate": self.rate(metrics)}


def _parts(state: PIState) -> tuple[Array, Array, Array]:
    return state.proportional, state.integral, state.weight


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same weight at every step but the first ones.

    Attributes:
        value: of the weight.
        delay: steps at the start with weight 0.

    Raises:
        ValueError: a value that is not finite, or a negative delay.
    """

    value: float
    delay: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"value={self.value}: must be finite")
        _check_delay(self.delay)

    def init(self) -> tuple[()]:
        return ()

    def weight(self, state: Any, step: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.where(step < self.delay, 0, jnp.float32(self.value))

    def update(self, state: Any, metrics: Mapping[str, Array], step: Int[Array, ""]) -> Any:
        return state

    def report(self, metrics: Mapping[str, Array]) -> dict[str, Array]:
        return {}
