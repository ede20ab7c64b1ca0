"""The digits experiment in its short form, from training to the report, and again after it was killed."""

from html.parser import HTMLParser
import json
import math
from pathlib import Path
import re
import shutil
import signal
import subprocess
import time

from command_line import DIGITS, ROOT, Result, command, here, process
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import tokjax
from tokjax import data
from tokjax.bench import report
from tokjax.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# Timings of a single round, on small batches.
QUICK = [f"--config.{part}.{field}" for part in ("sweep", "bench") for field in ("repeats=1", "seconds=0.01")]
QUICK += ["--config.eval_batch_size=24", "--config.bench.batch_sizes=(8,)"]
METHODS = ["ToMe", "EViT", "Top-K", "random drop", "average pooling"]
FILES = ["tome", "evit", "topk", "random", "avgpool"]


def run(mode: str, workdir: Path, *args: str) -> Result:
    """One mode in this process, which must succeed."""
    result = here(DIGITS, f"--mode={mode}", f"--workdir={workdir}", *QUICK, *args)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Result]:
    """The whole experiment in a process of its own; tests that write work in a copy."""
    workdir = tmp_path_factory.mktemp("digits")
    return workdir, process(DIGITS, f"--workdir={workdir}", *QUICK)


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    return shutil.copytree(finished[0], tmp_path / "digits")


def rows_of(workdir: Path, mode: str) -> list[dict]:
    return [row for row in report.read_jsonl(workdir / "results.jsonl") if row["mode"] == mode]


def curve(workdir: Path) -> list[dict]:
    """All of metrics.jsonl but the clock."""
    return [
        {k: v for k, v in row.items() if k != "train/images_per_s"} for row in read_metrics(workdir / "metrics.jsonl")
    ]


# What the experiment leaves


def test_it_succeeds_and_says_what_it_does(finished):
    workdir, result = finished
    assert result.code == 0, result.err
    assert "Traceback" not in result.err and "Warning" not in result.err, result.err
    steps = [line.removeprefix("== ") for line in result.out.splitlines() if line.startswith("== ")]
    assert steps == ["train", "sweep", "bench", "viz"]
    assert "208,074 parameters" in result.out and str(workdir / "report.html") in result.out
    assert not list(workdir.rglob("*.part")) and not list(workdir.rglob("*.tmp"))


def test_metrics(finished):
    lines = read_metrics(finished[0] / "metrics.jsonl")
    trained = [row for row in lines if "train/loss" in row]
    evaluated = [row for row in lines if "eval/accuracy" in row]
    assert [row["step"] for row in trained] == [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in evaluated] == [15, 30]
    assert all(math.isfinite(row["train/loss"]) and row["train/images_per_s"] > 0 for row in trained)
    assert trained[-1]["train/loss"] < trained[0]["train/loss"]
    assert evaluated[-1]["eval/loss"] < math.log(10)


def test_rows_of_the_sweep(finished):
    base, *rows = rows_of(finished[0], "sweep")
    assert base["method"] == "unreduced" and (base["macs_relative"], base["speedup"], base["agreement"]) == (1, 1, 1)
    evaluated = [row for row in curve(finished[0]) if "eval/accuracy" in row]
    assert base["accuracy"] == pytest.approx(evaluated[-1]["eval/accuracy"])  # the saved model is the one evaluated
    assert [row["method"] for row in rows] == METHODS
    assert [row["control"] for row in rows] == [False, False, False, True, True]
    assert len({row["weights"] for row in (base, *rows)}) == 1
    for row in rows:
        assert row["target"] == 0.7 and abs(row["macs_relative"] - 0.7) < 0.02
        assert row["macs"] == row["macs_relative"] * base["macs"] and 0 <= row["macs_reducer"] < 0.01 * row["macs"]
        assert row["images"] == base["images"] == 359 and 0 <= row["accuracy"] <= 1 and row["agreement"] > 0.5
        assert row["images_per_s"] > 0 and row["speedup"] > 0 and row["mean_tokens"] < 65 and row["setting"]


def test_rows_of_the_benchmark(finished):
    rows = rows_of(finished[0], "bench")
    assert [(row["method"], row["setting"]) for row in rows] == [
        ("unreduced", ""),
        ("ToMe", "r=8"),
        ("EViT", "keep_rate=0.6"),
    ]
    for row in rows:
        assert row["batch"] == 8 and row["weights"] == "trained" and row["dtype"] == "float32"
        assert row["images_per_s"] > 0 and row["first_call_s"] > 0 and row["jax"] == jax.__version__


class References(HTMLParser):
    """Everything that a page would fetch, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched, self.pictures, self.text = [], 0, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
                self.pictures += tag == "img"
                if not value.startswith(("data:", "#")):
                    self.fetched.append((tag, name, value))

    def handle_data(self, data):
        self.text.append(data)


def test_report_holds_everything_itself(finished):
    page = (finished[0] / "report.html").read_text()
    parsed = References(page)
    assert not parsed.fetched
    assert not re.findall(r"@import|url\((?!['\"]?(?:data:|#))|fetch\(|XMLHttpRequest|import\s*\(|<link|<iframe", page)
    assert parsed.pictures >= 3 + len(METHODS) * 2  # plots, and each method on two images
    text = " ".join(parsed.text)
    assert all(name in text for name in (*METHODS, "python -m tokjax.main", "Digits: token reduction", jax.__version__))


def test_pictures_show_something(finished):
    names = sorted(path.name for path in (finished[0] / "pictures").iterdir())
    drawn = [f"{name}_{i}.png" for name in FILES for i in range(2)]
    assert names == sorted([*drawn, "tokens.png", "pareto.png", "training.png"])
    for name in names:
        with Image.open(finished[0] / "pictures" / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) >= 64 and pixels.std() > 5, name


def test_model_of_the_workdir(finished, tmp_path):
    workdir, _ = finished
    model = tokjax.load(workdir)
    test = data.make(_data_config(), "test", batch_size=359, train=False)
    batch = next(iter(test))
    images = jnp.asarray(batch["image"])
    accuracy = float((np.asarray(model(images)).argmax(-1) == batch["label"]).mean())
    assert accuracy == pytest.approx(rows_of(workdir, "sweep")[0]["accuracy"])

    pixels = [Image.fromarray(np.uint8(np.round(np.clip((x + 1) / 2, 0, 1) * 255))) for x in batch["image"][:2]]
    np.testing.assert_allclose(model.preprocess(pixels), batch["image"][:2], atol=1 / 127)

    fast = tokjax.reduce(model, "tome", r=9)
    tokjax.save(fast, tmp_path / "fast")
    loaded = tokjax.load(tmp_path / "fast")
    assert loaded.methods == fast.methods and loaded.preprocess == model.preprocess
    np.testing.assert_array_equal(loaded(images[:2]), fast(images[:2]))
    np.testing.assert_array_equal(loaded.unreduced(images[:2]), model(images[:2]))


def _data_config():
    config = data.default_config()
    config.image_size = (32, 32)
    return config


# Each mode alone


def test_eval_alone(workdir):
    before = (workdir / "results.jsonl").read_bytes()
    run("eval", workdir, "--config.reduce.name=tome", "--config.reduce.r=9")
    assert (workdir / "results.jsonl").read_bytes().startswith(before)
    base, fast = rows_of(workdir, "eval")
    swept = {row["method"]: row for row in rows_of(workdir, "sweep")}
    assert base["accuracy"] == swept["unreduced"]["accuracy"] and base["macs"] == swept["unreduced"]["macs"]
    assert (fast["method"], fast["setting"]) == ("tome", "r=9")
    reduced = tokjax.reduce(tokjax.load(workdir), "tome", r=9)
    assert fast["macs"] == reduced.cost().total < base["macs"]
    batches = list(data.make(_data_config(), "test", batch_size=120, train=False))
    right = [(np.asarray(reduced(b["image"])).argmax(-1) == b["label"])[b["valid"]] for b in batches]
    right = np.concatenate(right)
    assert fast["accuracy"] == pytest.approx(right.mean()) and fast["images"] == len(right)


def test_train_alone_has_nothing_left_to_do(workdir):
    before, weights = (workdir / "metrics.jsonl").read_bytes(), (workdir / "model" / "model.safetensors").read_bytes()
    run("train", workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert (workdir / "model" / "model.safetensors").read_bytes() == weights


def test_sweep_alone_does_nothing_twice(workdir):
    results = workdir / "results.jsonl"
    before = results.read_bytes()
    out = run("sweep", workdir).out
    assert results.read_bytes() == before
    assert all(method in out for method in METHODS)


def test_interrupted_sweep_goes_on(workdir):
    results = workdir / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)[:6]
    assert json.loads(lines[-1])["method"] == "average pooling"
    results.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while it wrote the last row
    with pytest.warns(UserWarning, match="not written to its end"):
        run("sweep", workdir)
    rows = rows_of(workdir, "sweep")
    assert results.read_bytes().startswith(b"".join(lines[:5])) and [row["method"] for row in rows[1:]] == METHODS
    measured = ("images_per_s", "speedup")
    assert {k: v for k, v in rows[-1].items() if k not in measured} == {
        k: v for k, v in json.loads(lines[5]).items() if k not in measured
    }


def test_bench_alone(workdir):
    run("bench", workdir)
    assert [row["method"] for row in rows_of(workdir, "bench")] == ["unreduced", "ToMe", "EViT"] * 2


def test_bench_without_a_model_says_so(tmp_path):
    out = run("bench", tmp_path / "new", "--config.model.depth=1", "--config.bench.methods=()").out
    assert "random weights" in out
    assert [row["weights"] for row in rows_of(tmp_path / "new", "bench")] == ["random"]


def test_viz_alone(workdir):
    pictures, page = workdir / "pictures", workdir / "report.html"
    names = sorted(path.name for path in pictures.iterdir())
    same = (pictures / "tome_1.png").read_bytes()
    shutil.rmtree(pictures)
    page.unlink()
    run("viz", workdir)
    assert sorted(path.name for path in pictures.iterdir()) == names
    assert (pictures / "tome_1.png").read_bytes() == same
    assert not References(page.read_text()).fetched


# Killed


def test_killed_run_gives_the_same_numbers(finished, tmp_path):
    """SIGKILL between two checkpoints; started again, every line is the uninterrupted run's, and the model too."""
    workdir = tmp_path / "killed"
    args = (DIGITS, "--mode=train", f"--workdir={workdir}", *QUICK)
    with subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 300
        while not (workdir / "checkpoints" / "15").exists():
            assert killed.poll() is None and time.monotonic() < deadline, "it never got to a checkpoint"
            time.sleep(0.01)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert not (workdir / "model").exists() and not (workdir / "checkpoints" / "30").exists()

    again = process(*args)
    assert again.code == 0 and f"going on from {workdir / 'checkpoints' / '15'}" in again.out, again.err
    assert curve(workdir) == curve(finished[0])
    for mine, other in zip(*(jax.tree.leaves(tokjax.load(w).params) for w in (workdir, finished[0])), strict=True):
        np.testing.assert_array_equal(mine, other)
