"""What a run carries from step to step, and the one jitted function that carries it."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Self

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree
import optax

from tokjax.errors import UserError
from tokjax.train.controllers import Controller

Batch = Mapping[str, Any]
Metrics = dict[str, Any]  # scalars by name, and new moving statistics under STATISTICS
STATISTICS = "statistics"
LossFn = Callable[..., tuple[Float[Array, ""], Metrics]]  # (params, batch, key), and what a run has beside them


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A moving average of a part of the parameters, which the loss gets beside them and no gradient reaches.

    After update t, counted from 1, it becomes m times itself plus 1 - m times that part, with
    m = 1 - (1 - momentum) (1 + cos(pi t / total_steps)) / 2: the first value of m belongs to a start from the
    parameters themselves. Source: Grill et al. 2020, arXiv 2006.07733 (BYOL), section 3.2.

    Attributes:
        of: from the parameters to the part; it changes no values.
        momentum: in [0, 1].
        total_steps: of the run.

    Raises:
        ValueError: a momentum outside [0, 1].
    """

    of: Callable[[PyTree[Array]], PyTree[Array]]
    momentum: float
    total_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum is {self.momentum}; it must be in [0, 1]")

    def momentum_at(self, update: Int[Array, ""] | int) -> Float[Array, ""]:
        """m after so many updates."""
        share = jnp.minimum(jnp.asarray(update, jnp.float32) / self.total_steps, 1.0)
        return 1.0 - (1.0 - self.momentum) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))


@struct.dataclass
class TrainState:
    """The whole of a run but its place in the data: with both, a restarted run repeats the same numbers.

    Attributes:
        step: batches consumed, skipped ones too.
        params: float32 masters as a pure dict; a model computes in whatever type it likes.
        opt_state: of the optimiser.
        ema: moving average of params, or None.
        key: never changes; step t draws from `fold_in(key, t)`.
        skipped: steps without finite gradients so far.
        bad: how many of those came last, without a finite one since.
        teacher: moving average of a part of params that the loss reads, or None.
        controller: state of what steers a weight of the loss, or None.
    """

    step: Int[Array, ""]
    params: PyTree[Array]
    opt_state: PyTree
    ema: PyTree[Array] | None
    key: Key[Array, ""]
    skipped: Int[Array, ""]
    bad: Int[Array, ""]
    teacher: PyTree[Array] | None = None
    controller: PyTree[Array] | None = None

    @classmethod
    def create(
        cls,
        params: PyTree,
        optimiser: optax.GradientTransformation,
        key: Key[Array, ""],
        *,
        ema: bool = False,
        teacher: Teacher | None = None,
        controller: Controller | None = None,
    ) -> Self:
        """A state at step 0 that owns its arrays: a step gives its memory away, the caller's params stay usable.

        Args:
            params: a tree of arrays; floating ones become float32.
            optimiser: as from `make_optimiser`.
            key: a typed key (`jax.random.key`).
            ema: whether to carry a moving average.
            teacher: the teacher to carry, which starts as its part of `params`.
            controller: the controller whose state to carry.

        Raises:
            ValueError: a key of the old, untyped kind.
        """
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(f"key has dtype {key.dtype}; it must be a typed key, as from jax.random.key(0)")

        def own(x: Any) -> jax.Array:
            return jnp.array(x, jnp.float32 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else None, copy=True)

        params = jax.tree.map(own, params)
        # One array each: the same one twice cannot be given away twice.
        step, skipped, bad = (jnp.zeros((), jnp.int32) for _ in range(3))
        average = jax.tree.map(jnp.copy, params) if ema else None
        follower = None if teacher is None else jax.tree.map(jnp.copy, teacher.of(params))
        steered = None if controller is None else controller.init()
        return cls(step, params, optimiser.init(params), average, jnp.copy(key), skipped, bad, follower, steered)

    @property
    def eval_params(self) -> PyTree[Array]:
        """What to evaluate: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def written(params: PyTree[Array], values: Mapping[Any, Any], place: str = "") -> PyTree[Array]:
    """The tree with other values at the places that `values`, a part of it, has.

    Raises:
        ValueError: a place that the tree does not have, or another shape there.
    """
    if not isinstance(values, Mapping):
        if isinstance(params, Mapping) or jnp.shape(params) != jnp.shape(values):
            has = "a tree" if isinstance(params, Mapping) else jnp.shape(params)
            raise ValueError(f"metrics['{STATISTICS}'] has {jnp.shape(values)} at {place!r}, where params have {has}")
        return jnp.asarray(values, params.dtype)
    for name in values:
        if not isinstance(params, Mapping) or name not in params:
            raise ValueError(f"metrics['{STATISTICS}'] has {place + str(name)!r}, which params do not have")
    new = {name: written(params[name], part, f"{place}{name}/") for name, part in values.items()}
    return {**params, **new}


def make_step(
    loss_fn: LossFn,
    optimiser: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    accumulate: int = 1,
    frozen: PyTree[bool] | None = None,
    teacher: Teacher | None = None,
    controller: Controller | None = None,
    constrain: Callable[[PyTree[Array]], PyTree[Array]] | None = None,
    state_sharding: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update as one compiled function, which takes over the memory of the state that it is given.

    A step whose loss or gradients are not finite changes nothing but `step` and the two counts. The moving average
    warms up: its decay at step t, from 0, is min(ema_decay, (1 + t) / (10 + t)), as TensorFlow's moving averages do.

    Args:
        loss_fn: (params, batch, key) -> (loss, metrics), a scalar and a dict of scalars that are means over the batch.
            `metrics["statistics"]`, where there is one, is a part of the tree of params with new values for moving
            statistics (of batch norms), which are written over the parameters after the update, whatever it did there.
        optimiser: as from `make_optimiser`.
        ema_decay: of the moving average; None for a state without one.
        accumulate: split the batch into this many parts, one after the other, and average their gradients and metrics.
            The update is that of the whole batch where every row counts alike; part i draws from `fold_in(key, i)`.
            Moving statistics are averaged too: each part starts from those before the step.
        frozen: a bool per parameter, as from `optimisers.frozen`: their gradients are not computed.
        teacher: what the state's `teacher` is; the loss gets it as a fourth argument. A skipped step leaves it.
        controller: what the state's `controller` is of; the loss gets its weight as the last argument, behind that of a
            teacher. It moves once per step, with the averaged metrics; a skipped step leaves it.
        constrain: params -> params, after every update: keeps some of them in their range.
        state_sharding: of the returned state, one Sharding or a tree of them; None: up to the compiler.

    Returns:
        step(state, batch) -> (state, metrics). `metrics` has loss_fn's and `loss`, `grad_norm` (before clipping, of
        what is trained), `skipped` and `bad`, and with a controller `weight` and what it reports, all still on the
        device.

    Raises:
        UserError: when first called with a batch that does not divide into `accumulate` parts.
        ValueError: when first called, if loss_fn's metrics use one of these names, or if its statistics are not at the
            place and of the shape of parameters.
    """

    def differentiable(params: Any, batch: Batch, key: Any, *beside: Any) -> Any:
        if frozen is not None:
            params = jax.tree.map(lambda p, fixed: jax.lax.stop_gradient(p) if fixed else p, params, frozen)
        return loss_fn(params, batch, key, *beside)

    value_and_grad = jax.value_and_grad(differentiable, has_aux=True)

    def gradients(params: Any, batch: Batch, key: Any, *beside: Any) -> Any:
        if accumulate == 1:
            return value_and_grad(params, batch, key, *beside)

        def split(x: jax.Array) -> jax.Array:
            if x.shape[0] % accumulate:
                raise UserError(f"accumulate is {accumulate}; it must divide the batch, which has {x.shape[0]} rows")
            # Part i has rows i, i + accumulate, ...: rows sharded over devices stay on theirs.
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            index, rows = part
            return jax.tree.map(
                jnp.add, total, value_and_grad(params, rows, jax.random.fold_in(key, index), *beside)
            ), None

        parts = jnp.arange(accumulate), jax.tree.map(split, dict(batch))
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(lambda: value_and_grad(params, first[1], key, *beside))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.tree.map(lambda x: x / accumulate, jax.lax.scan(add, zeros, parts)[0])

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        weight = None if controller is None else controller.weight(state.controller, state.step)
        beside = [x for x, has in ((state.teacher, teacher), (weight, controller)) if has is not None]
        (loss, metrics), grads = gradients(state.params, batch, key, *beside)
        metrics = dict(metrics)
        statistics = metrics.pop(STATISTICS, {})
        grad_norm = optax.tree.norm(grads)
        numbers = [loss, grad_norm, *jax.tree.leaves(statistics)]
        finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()

        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params, ema = written(optax.apply_updates(state.params, updates), statistics), state.ema
        if constrain is not None:
            params = constrain(params)
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            # In this form an average that has arrived stays where it is, bit for bit.
            ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
        follower = state.teacher
        if teacher is not None:
            momentum = teacher.momentum_at(state.step + 1)
            follower = jax.tree.map(lambda t, p: t + (1.0 - momentum) * (p - t), follower, teacher.of(params))
        steered = state.controller
        if controller is not None:
            steered = controller.update(steered, metrics, state.step)
        new = params, opt_state, ema, follower, steered
        old = state.params, state.opt_state, state.ema, state.teacher, state.controller
        params, opt_state, ema, follower, steered = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = state.skipped + ~finite
        bad = jnp.where(finite, 0, state.bad + 1)
        ours = {"loss": loss, "grad_norm": grad_norm, "skipped": skipped, "bad": bad}
        if controller is not None:
            ours |= {"weight": weight, **controller.report(metrics)}
        if taken := sorted(ours.keys() & metrics.keys()):
            raise ValueError(f"loss_fn's metrics have {taken[0]!r}, which the step reports itself")
        after = TrainState(state.step + 1, params, opt_state, ema, state.key, skipped, bad, follower, steered)
        return after, ours | metrics

    if state_sharding is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_sharding, None))
