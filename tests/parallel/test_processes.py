"""Several real processes: who they are, the losses of one process, a killed one, and a run that goes on elsewhere."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tokjax import parallel
from tokjax.errors import UserError
from tokjax.parallel import mesh as meshes

ROOT = Path(__file__).parents[2]
STEPS = 6
FLAGS = (
    "--config=configs/digits.py:short",
    "--mode=train",
    "--config.train.log_every=1",
    "--config.train.eval_every=2",
    "--config.train.checkpoint_every=2",
    "--config.train.optimiser.warmup_steps=2",
    "--config.model.depth=1",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.eval_batch_size=90",  # 359 images: neither the processes nor the batches divide them
    "--config.batch_size=24",
)


def start(workdir, count, devices, mesh="", steps=STEPS, **more):
    """The launch file for several processes, the plain command for one."""
    python = Path(sys.executable).parent
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_llvm_disable_expensive_passes=true",
    }
    flags = [*FLAGS, f"--workdir={workdir}", f"--config.train.total_steps={steps}"]
    flags += [f"--config.mesh={mesh}"] if mesh else []
    flags += [f"--config.{name}={value}" for name, value in more.items()]
    script = [str(ROOT / "experiments/launch/local.sh"), str(count)]
    command = script if count > 1 else [sys.executable, "-m", "tokjax.main"]
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def run(*args, **more):
    code, out = finish(start(*args, **more))
    assert code == 0, out
    return out


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def scores(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]


def test_two_processes_give_the_losses_of_one_and_one_goes_on(tmp_path):
    """A mesh that splits everything over both; then the last checkpoint is damaged, and one device goes on."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, 1, 1)
    out = run(two, 2, 4, '{"data": -1, "fsdp": 2, "model": 2}')
    assert out.count("== train") == 1, "more than one process tells what happens"
    assert (two / "model" / "config.json").is_file()
    assert list(losses(two)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses(two).values()), list(losses(one).values()), rtol=1e-5)
    assert scores(two) == scores(one)

    last = damaged(two)
    out = run(two, 1, 1)
    assert f"checkpoint {last} cannot be read" in out
    assert f"step {STEPS - 2}/{STEPS}: going on from {last.with_name(str(STEPS - 2))}" in out
    assert list(losses(two)) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses(two).values()), list(losses(one).values()), rtol=1e-5)


def damaged(workdir):
    """The last checkpoint, whose largest file was cut off."""
    last = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    largest = max((p for p in (last / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    return last


@pytest.mark.long
def test_a_killed_process_ends_all_and_others_go_on(tmp_path):
    """SIGKILL to one of four in the middle; two go on, and from a step before the end one, all on other meshes."""
    one, many, steps = tmp_path / "one", tmp_path / "many", 40
    run(one, 1, 1, steps=steps)
    process = start(many, 4, 2, '{"data": -1, "fsdp": 4}', steps=steps)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if (many / "metrics.jsonl").exists() and len(losses(many)) > 5:
            break
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[2]), signal.SIGKILL)
    killed = time.monotonic()
    code, out = finish(process)
    print(f"the others ended {time.monotonic() - killed:.1f} s later, status {code}")
    reached = max(losses(many))
    assert code != 0 and 5 < reached < steps, out
    assert "going on from" in run(many, 2, 2, "fsdp", steps=steps)
    last = damaged(many)
    assert f"checkpoint {last} cannot be read" in run(many, 1, 4, '{"data": 2, "model": 2}', steps=steps)
    assert list(losses(many)) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(losses(many).values()), list(losses(one).values()), rtol=1e-4)


@pytest.mark.parametrize(
    ("variables", "flags", "found"),
    [
        ({}, (), None),
        ({}, ("h:1", 2, 1), ("h:1", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, (), ("h:1", 3, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "0"}, (), ("h:1", 3, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "2"}, ("i:2", 2, 0), ("i:2", 2, 0)),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, (), None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, (), ()),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (), None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), ()),
    ],
)
def test_who_they_are(monkeypatch, variables, flags, found):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: joined.append(args))
    parallel.initialize(*flags, environment=variables)
    assert joined == ([] if found is None else [found])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("h:1", None, None), "num_processes, process_id: missing; give"),
        ((None, None, 1), "process_id=1: needs coordinator and num_processes"),
        (("h:1", 2, 2), "process_id=2: must be in 0..num_processes - 1, which is 1"),
        (("host", 2, 1), "coordinator='host': must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(flags, told):
    with pytest.raises(UserError, match=told):
        parallel.initialize(*flags, environment={})


def test_processes_that_do_not_meet(monkeypatch):
    def refuse(**_):
        raise RuntimeError("no cluster was detected")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match="the processes did not meet: no cluster"):
        parallel.initialize(pod=True, environment={})


@pytest.mark.parametrize(
    ("owners", "shape", "shares"),
    [
        ((0, 0, 1, 1), (2, 2, 1), [(0, 2), (1, 2)]),
        ((0, 1, 0, 1), (2, 1, 2), [(0, 1), (0, 1)]),  # each has half of every row: both read all
        ((0, 1, 2, 3), (1, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 0), (2, 1, 1), [(1, 2), (0, 2)]),  # devices in another order than processes
        ((0, 0, 1, 0), (2, 1, 2), None),
    ],
)
def test_which_share_a_process_reads(monkeypatch, owners, shape, shares):
    devices = np.array([SimpleNamespace(process_index=owner) for owner in owners]).reshape(shape)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(meshes.AXES, shape, strict=True)))
    for process in sorted(set(owners)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if shares is None:
            with pytest.raises(UserError, match="the devices of a process must hold whole parts of a batch"):
                parallel.data_part(mesh)
        else:
            assert parallel.data_part(mesh) == shares[process]


def test_one_process_waits_for_nobody():
    assert not parallel.several()
    parallel.barrier("here")
    parallel.finish()
    with pytest.raises(SystemExit) as left:
        parallel.leave(3)
    assert left.value.code == 3
