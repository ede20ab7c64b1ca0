"""The training loop: one function that reads top to bottom, and restarts where it was killed.

A run that is killed and started again gives, on one machine, the same numbers as one that was not: the parameters, the
optimiser, the key and the place in the data are all in the checkpoint, and what a step draws depends on its number.
"""

import bisect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
import copy
from pathlib import Path
import signal
import sys
import threading
import time
from typing import Any, Protocol, Self
import warnings

import jax
from jax.experimental import multihost_utils
import numpy as np
from tqdm import tqdm

from tokjax.errors import UserError
from tokjax.train import optimisers
from tokjax.train.checkpoints import Checkpoints, DataState
from tokjax.train.config import TrainConfig
from tokjax.train.controllers import Controller
from tokjax.train.metrics import MetricsWriter
from tokjax.train.state import Batch, LossFn, Metrics, Teacher, TrainState, make_step

# The metrics of a step are read this many steps later, when the device has them anyway, and no more often than this:
# so neither waits for the other, Python does not run far ahead with batches in its hands, and waking up costs nothing
# where steps are short.
LAG_STEPS, LAG_SECONDS = 2, 0.01
TERMINATED = 128 + signal.SIGTERM  # what a shell reports of a process that ended by this signal


class DataIterator(Protocol):
    """Batches, and a place among them that can be kept."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> DataState: ...
    def set_state(self, state: DataState) -> None: ...


class Loader(Protocol):
    """Anything whose iterators are DataIterators; for training they do not end."""

    def __iter__(self) -> DataIterator: ...


def prefetch(data: DataIterator, place: Callable[[Batch], Batch], ahead: int) -> Iterator[tuple[Batch, DataState]]:
    """Batches on the device, `ahead` of them before they are asked for, each with the place in the data just after it.

    The place belongs to the batch that is handed out, not to the last one read: a run that goes on from it sees every
    batch once.
    """
    queue: deque[tuple[Batch, DataState]] = deque()
    ended = False
    while queue or not ended:
        while len(queue) <= ahead and not ended:
            try:
                batch = next(data)
            except StopIteration:
                ended = True
            else:
                queue.append((place(batch), copy.deepcopy(data.get_state())))
        if queue:
            yield queue.popleft()


class Termination:
    """Notes SIGTERM instead of dying of it. With several processes jax's service agrees on a step for all of them."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def _note(self, *_: object) -> None:
        self.received = True

    def at(self, step: int) -> bool:
        """Whether to stop after this step; ask at every step."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self.received

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _hosted(x: Any) -> Any:
    return x if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 else np.asarray(x)


def train(
    cfg: Any,
    workdir: str | Path,
    *,
    init_params: Any,
    loss_fn: LossFn | Sequence[tuple[int, LossFn]],
    train_loader: Loader,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    place_batch: Callable[[Batch], Batch] | None = None,
    teacher: Teacher | None = None,
    controller: Controller | None = None,
    constrain: Callable[[Any], Any] | None = None,
    state_sharding: Callable[[TrainState], Any] | None = None,
) -> TrainState:
    """Trains until `cfg.total_steps`, going on from the last checkpoint in `workdir` if there is one.

    Writes `workdir/metrics.jsonl` (`train/loss`, `train/images_per_s`, ..., `eval/...`) and `workdir/checkpoints/`.
    SIGTERM saves and ends the process with status 143; started again, the run goes on.

    Args:
        cfg: a ConfigDict with the fields of `TrainConfig`; others are not looked at.
        workdir: the run's folder, made if it is not there.
        init_params: parameters of a fresh run, and the shapes of a restarted one; they are copied.
        loss_fn: (params, batch, key) -> (loss, metrics); see `make_step`. Or several of them, each with the number of
            the step, from 0 on, from which it counts: one program each, of the same parameters.
        train_loader: endless batches, dicts of numpy arrays whose first axis is the batch.
        evaluate: params -> a dict of scalars; given the moving average where there is one. It keeps no reference.
        place_batch: puts a batch on the device or devices; None: the first device (a CPU reads it where it is).
        teacher: a moving average that the loss gets as its fourth argument; see `Teacher`.
        controller: steers a weight that the loss gets as its last argument; see `tokjax.train.controllers`.
        constrain: params -> params, after every update; see `make_step`.
        state_sharding: from a TrainState of shapes to the same tree of shardings; None: the first device.

    Returns:
        The state after the last step; at once if the checkpoint is already there.

    Raises:
        UserError: a bad config, a checkpoint of another model, data that end too soon, or `cfg.max_bad_steps` steps in
            a row whose gradients are not finite (the last checkpoint is then from before them).
        SystemExit: after SIGTERM.
    """
    # What runs.
    cfg, workdir = TrainConfig.of(cfg), Path(workdir)
    frozen = optimisers.frozen(cfg.optimiser, init_params)
    optimiser = optimisers.make_optimiser(cfg.optimiser, cfg.total_steps, init_params)
    learning_rate = optimisers.schedule(cfg.optimiser, cfg.total_steps)

    def fresh(params: Any) -> TrainState:
        key, average = jax.random.key(cfg.seed), cfg.ema_decay is not None
        return TrainState.create(params, optimiser, key, ema=average, teacher=teacher, controller=controller)

    target = jax.eval_shape(fresh, init_params)
    sharding = None if state_sharding is None else state_sharding(target)

    def step_of(loss_fn: LossFn) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        return make_step(
            loss_fn,
            optimiser,
            ema_decay=cfg.ema_decay,
            accumulate=cfg.optimiser.accumulate,
            frozen=frozen if any(jax.tree.leaves(frozen)) else None,
            teacher=teacher,
            controller=controller,
            constrain=constrain,
            state_sharding=sharding,
        )

    stages = [(first, step_of(loss)) for first, loss in ([(0, loss_fn)] if callable(loss_fn) else loss_fn)]
    firsts = [first for first, _ in stages]
    if not stages or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise ValueError(f"loss_fn has losses from the steps {firsts} on: the first must be 0, the others ascend")

    # Where it starts.
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_last=cfg.keep_last,
        keep_best=cfg.keep_best,
        metric=cfg.best_metric,
        mode=cfg.best_mode,
    )
    data = iter(train_loader)
    if checkpoints.steps():
        if sharding is not None:
            target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, sharding)
        start, state, data_state, _ = checkpoints.restore(target)
        try:
            data.set_state(data_state)
        except ValueError as error:
            raise UserError(f"{checkpoints.folder / str(start)} does not fit train_loader: {error}") from error
    elif sharding is None:
        start, state = 0, fresh(init_params)
    else:  # from the host's memory, where they are not split already: a device may have a part only
        start, state = 0, jax.jit(fresh, out_shardings=sharding)(jax.tree.map(_hosted, init_params))
    if start >= cfg.total_steps:
        return state

    # What is told on the way.
    terminal, first_process = sys.stderr.isatty(), jax.process_index() == 0
    pending: deque[tuple[int, Metrics]] = deque()
    settled, skipped = time.perf_counter(), int(state.skipped)
    mark: tuple[int, float] | None = None  # a step and when it was done: where the images per second are counted from

    def say(step: int, text: str) -> None:
        if first_process:
            tqdm.write(f"step {step}/{cfg.total_steps}: {text}")
            sys.stdout.flush()

    def settle(behind: int) -> None:
        """Reads the metrics of all steps but the last `behind`: stops at too many bad ones, writes a line where due."""
        nonlocal settled, skipped, mark
        done = [pending.popleft() for _ in range(len(pending) - behind)]
        newest, seen = done[-1][0], int(done[-1][1]["skipped"])
        if seen != skipped:
            skipped = seen
            for step, metrics in done:
                if int(metrics["bad"]) >= cfg.max_bad_steps:
                    checkpoints.wait()
                    kept = checkpoints.latest()
                    raise UserError(
                        f"step {step}: loss or gradients were not finite {cfg.max_bad_steps} times in a row "
                        f"(max_bad_steps); {'no checkpoint' if kept is None else checkpoints.folder / str(kept)} is "
                        f"from before. Lower optimiser.lr or optimiser.clip_norm, or look at the data"
                    )
        settled = time.perf_counter()
        due = [(step, metrics) for step, metrics in done if step % cfg.log_every == 0 or step == cfg.total_steps]
        for step, metrics in due:
            values = jax.device_get(metrics)
            values["lr"] = learning_rate(step - values["skipped"] - (values["bad"] == 0))  # a skipped step is no update
            if mark is not None:
                values["images_per_s"] = (newest - mark[0]) * images / (settled - mark[1])
            writer.write(step, values, "train/")
            shown = {k: f"{float(values[k]):.4g}" for k in ("loss", "accuracy", "images_per_s") if k in values}
            bar.set_postfix(shown, refresh=False)
            if not terminal:
                say(step, ", ".join(f"{name} {value}" for name, value in shown.items()))
        if due or mark is None:
            mark = newest, settled

    # The loop. `step` counts the batches consumed once its own is.
    with (
        checkpoints,
        MetricsWriter(workdir, step=start, tensorboard=cfg.tensorboard) as writer,
        tqdm(total=cfg.total_steps, initial=start, disable=not (terminal and first_process), unit="step") as bar,
        Termination() as termination,
    ):
        if start:
            say(start, f"going on from {checkpoints.folder / str(start)}")
        if place_batch is None:
            place_batch = (lambda batch: batch) if jax.default_backend() == "cpu" else jax.device_put
        batches = prefetch(data, place_batch, cfg.prefetch)
        for step in range(start + 1, cfg.total_steps + 1):
            batch, data_state = next(batches, (None, None))
            if batch is None:
                raise UserError(f"train_loader ended after {step - 1} of {cfg.total_steps} batches; it must not end")
            images = jax.tree.leaves(batch)[0].shape[0]
            state, metrics = stages[bisect.bisect(firsts, step - 1) - 1][1](state, batch)
            pending.append((step, metrics))
            bar.update()

            last, stopping = step == cfg.total_steps, termination.at(step)
            evaluating = evaluate is not None and (last or (cfg.eval_every and step % cfg.eval_every == 0))
            saving = last or stopping or step % cfg.checkpoint_every == 0
            if evaluating or saving:  # all lines up to a checkpoint come before it: a restart does not write them again
                settle(0)
            elif len(pending) > LAG_STEPS and time.perf_counter() - settled > LAG_SECONDS:
                settle(LAG_STEPS)

            scores: Mapping[str, Any] = {}
            if evaluate is not None and evaluating:
                scores = evaluate(state.eval_params)
                writer.write(step, scores, "eval/")
                say(step, ", ".join(f"eval {name} {float(value):.4g}" for name, value in scores.items()))
                if cfg.keep_best and cfg.best_metric not in scores:
                    warnings.warn(
                        f"best_metric is {cfg.best_metric!r}, but evaluate gives {', '.join(scores)}: no checkpoint is "
                        f"kept as the best",
                        stacklevel=2,
                    )
                saving = saving or (cfg.keep_best and checkpoints.improves(scores))
            # In the middle of bad steps the checkpoint before them is the better place to go on from.
            if saving and (last or stopping or int(metrics["bad"]) == 0):
                checkpoints.save(step, state, data_state, scores)
            if evaluating or saving:
                mark = step, time.perf_counter()
            if stopping and not last:
                checkpoints.wait()
                say(step, f"terminated; {checkpoints.folder / str(step)} is where a restart goes on")
                raise SystemExit(TERMINATED)
    return state
