"""Several processes: who they are, and an end that keeps none of them waiting."""

from collections.abc import Mapping
import os
import sys

import jax
from jax.experimental import multihost_utils

from tokjax.errors import UserError

# Seconds without a sign of life after which a process counts as dead and the others end too.
HEARTBEAT = 60
# In an Indexed Job of Kubernetes, JobSets among them, the last name has the number of the pod.
COORDINATOR, NUMBER, IDS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    pod: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the processes of a job, before anything else of JAX runs; a job of one process needs nothing.

    The first that holds decides:
    1. the three arguments, or of those that are None the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
       JAX_PROCESS_ID (or, of a Kubernetes JobSet, JOB_COMPLETION_INDEX);
    2. a step of several SLURM tasks (`srun`), a TPU slice of several hosts on GKE, or `pod`: JAX finds the others.

    Args:
        coordinator: HOST:PORT of process 0, where all meet.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        pod: look for the hosts of a Cloud TPU slice, which no variable tells of.
        environment: variables to look at.

    Raises:
        UserError: only some of the three, values out of range, or the processes did not meet.
    """
    found = _plain(coordinator, num_processes, process_id, environment)
    if found is None and not (pod or _known_job(environment)):
        return
    if found is not None and found[1] == 1:
        return
    try:
        if found is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        else:
            jax.distributed.initialize(*found, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes did not meet: {error}") from error


def _plain(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> tuple[str, int, int] | None:
    coordinator = coordinator or environment.get(COORDINATOR)
    count = environment.get(NUMBER) if num_processes is None else num_processes
    ids = (environment[name] for name in IDS if name in environment)
    index = next(ids, None) if process_id is None else process_id
    if coordinator is None and count is None:
        if process_id is not None:
            raise UserError(f"process_id={process_id}: needs coordinator and num_processes too")
        return None
    named = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    if missing := [name for name, value in named.items() if value is None]:
        raise UserError(f"{', '.join(missing)}: missing; give coordinator, num_processes and process_id, or none")
    assert coordinator is not None and count is not None and index is not None
    try:
        n, i = int(count), int(index)
    except ValueError:
        raise UserError(f"num_processes={count!r}, process_id={index!r}: must be whole numbers") from None
    if n < 1 or not 0 <= i < n:
        raise UserError(f"process_id={i}: must be in 0..num_processes - 1, which is {n - 1}")
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator:
        raise UserError(f"coordinator={coordinator!r}: must be HOST:PORT")
    return coordinator, n, i


def _known_job(environment: Mapping[str, str]) -> bool:
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return (tasks.isdecimal() and int(tasks) > 1) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def several() -> bool:
    """Whether this is one of several processes."""
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Waits for all processes."""
    if several():
        multihost_utils.sync_global_devices(name)


def finish() -> None:
    """The end of a job that went well: none leaves before all are here, as the first one holds them together."""
    if several():
        barrier("finish")
        jax.distributed.shutdown()


def leave(code: int) -> None:
    """The end of a job that did not: at once, without waiting for processes that may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)
