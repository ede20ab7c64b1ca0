import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.train.metrics import MetricsWriter, read_metrics


def write(folder, steps, **options):
    with MetricsWriter(folder, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 10}, "train/")


def test_lines(tmp_path):
    with MetricsWriter(tmp_path / "deep" / "run") as writer:
        writer.write(3, {"loss": jnp.float32(0.1), "count": np.int64(4)}, "train/")
        assert read_metrics(writer.path) == [{"step": 3, "train/loss": float(np.float32(0.1)), "train/count": 4}]
        writer.write(3, {"accuracy": 0.5}, "eval/")
    assert [sorted(row) for row in read_metrics(writer.path)][1] == ["eval/accuracy", "step"]


def test_what_is_not_finite_becomes_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": jnp.nan, "grad_norm": np.inf})

    def refuse(token):
        raise AssertionError(token)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "grad_norm": None}


def test_restart_drops_later_lines_and_a_torn_one(tmp_path):
    write(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    write(tmp_path, [5, 6], step=4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_fresh_run_drops_what_another_left(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_no_file_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard(tmp_path):
    write(tmp_path, [1, 2], tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboardX: pip install .tokjax\[tensorboard\]"):
        MetricsWriter(tmp_path, tensorboard=True)
