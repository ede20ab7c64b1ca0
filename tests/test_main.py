"""The command line: what it prints, and that every mistake of a user ends in one clear line."""

from pathlib import Path

from command_line import DIGITS, ROOT, Result, here, process
import jax
import optax
import pytest

import tokjax
from tokjax.models.vit import ViTConfig
from tokjax.reducers import REGISTRY
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.state import TrainState

# ml_collections still reads files in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """The command line in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return here


def small(width: int = 16) -> tokjax.Model:
    return tokjax.build(ViTConfig((32, 32), 8, width=width, depth=1, heads=2, num_classes=10))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A working directory with a model."""
    workdir = tmp_path_factory.mktemp("saved")
    tokjax.save(small(), workdir / "model")
    return workdir


def assert_refused(result: Result, *words: str) -> None:
    """One line, which has these words; no traceback and no success."""
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert not (missing := [word for word in words if word not in lines[0]]), (missing, lines[0])


def test_list_prints_every_reducer():
    result = process("--list")
    header, *rows = result.out.splitlines()
    assert result.code == 0 and not result.err and header.split()[0] == "name"
    assert [row.split()[0] for row in rows] == sorted(REGISTRY)
    for row in rows:
        entry = REGISTRY[row.split()[0]]
        assert all(part in row for part in (entry.kind, entry.paper, entry.length, entry.knob.field))


def test_help_names_the_flags():
    result = process("--help")
    assert all(f"--{flag}" in result.out for flag in ("config", "workdir", "mode")) and not result.err


def test_process_ends_with_the_line_and_its_code(saved, tmp_path):
    assert_refused(process("--nope=1"), "nope")
    file = tmp_path / "model.safetensors"
    file.write_bytes((saved / "model" / file.name).read_bytes()[:-100])
    result = process(DIGITS, "--mode=eval", f"--workdir={tmp_path / 'run'}", f"--config.init={file}")
    assert_refused(result, str(file), "not a whole safetensors file")


BAD_FLAGS = {
    "no config": ([], ["--config", "configs/digits.py", "--list"]),
    "flag": ([DIGITS, "--wrkdir=x"], ["wrkdir", "workdir"]),
    "argument": ([DIGITS, "train"], ["train", "--config."]),
    "field": ([DIGITS, "--config.nope=1"], ["no field", "nope"]),
    "misspelt field": ([DIGITS, "--config.train.total_stps=1"], ["total_stps", "total_steps"]),
    "type": ([DIGITS, "--config.seed=abc"], ["config.seed", "abc"]),
    "no file": (["--config=configs/missing.py"], ["configs/missing.py", "No such file"]),
    "no file, with a field": (["--config=configs/missing.py", "--config.seed=1"], ["configs/missing.py"]),
    "folder for a file": ([f"--config={ROOT / 'configs'}"], ["configs", "directory"]),
    "mode": ([DIGITS, "--mode=dance"], ["dance", "train", "sweep"]),
    "mode in the config": ([DIGITS, "--config.mode=dance"], ["dance", "train", "sweep"]),
    "task": ([DIGITS, "--config.task=dance"], ["dance", "classify"]),
    "file for a workdir": ([DIGITS, f"--workdir={__file__}/run"], ["--workdir", Path(__file__).name]),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(cli, name):
    args, words = BAD_FLAGS[name]
    assert_refused(cli(*args), *words)


def test_config_that_refuses_its_argument(cli, tmp_path):
    file = tmp_path / "picky.py"
    file.write_text("def get_config(arg):\n    raise ValueError(f'arg={arg}: must be tiny or huge')\n")
    assert_refused(cli(f"--config={file}:medium"), "arg=medium", "tiny or huge")


BAD_VALUES = {
    "reducer": (["--config.reduce.name=tomee"], ["tomee", "did you mean 'tome'"]),
    "r below": (["--config.reduce.name=tome", "--config.reduce.r=-3"], ["r=-3", "at least 0"]),
    "r above": (["--config.reduce.name=tome", "--config.reduce.r=1000"], ["r=1000", "at most 64"]),
    "keep rate": (["--config.reduce.name=evit", "--config.reduce.keep_rate=1.5"], ["keep_rate=1.5", "(0, 1]"]),
    "setting of another": (["--config.reduce.name=evit", "--config.reduce.r=3"], ["r=3", "keep_rate"]),
    "setting of none": (["--config.reduce.r=3"], ["tome", "name"]),
    "image size": (["--config.data.image_size=(30, 30)"], ["(30, 30)", "patch_size=4"]),
    "heads": (["--config.model.heads=5"], ["heads=5", "width=64"]),
    "repeats": (["--config.bench.repeats=0"], ["repeats", "at least 1"]),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values(cli, name):
    args, words = BAD_VALUES[name]
    assert_refused(cli(DIGITS, "--mode=bench", "--config.model.depth=1", *args), *words)


BAD_DATA = {
    "no folder": (["--config.data.source=imagefolder", "--config.data.path=gone/away"], ["gone/away"]),
    "no path": (["--config.data.source=parquet"], ["path"]),
    "source": (["--config.data.source=imagenett"], ["imagenett", "parquet"]),
    "batch": (["--config.batch_size=5000"], ["5000", "1438"]),
    "steps": (["--config.train.total_steps=0"], ["total_steps", "at least 1"]),
    "learning rate": (["--config.train.optimiser.lr=-1.0"], ["lr", "-1.0"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_training(cli, tmp_path, name):
    args, words = BAD_DATA[name]
    assert_refused(cli(DIGITS, "--mode=train", f"--workdir={tmp_path / 'run'}", *args), *words)
    assert not (tmp_path / "run").exists()


BAD_TEXTS = {
    "no file": ("train", ["--config.data.path=gone/away.txt"], ["gone/away.txt"]),
    "vocabulary": ("train", ["--config.vocabulary.kind=words"], ["kind='words'", "bpe, bytes"]),
    "prompt": ("train", ["--config.data.prompt=80"], ["prompt=80", "length=80"]),
    "no model": ("generate", [], ["holds no model", "--mode=train"]),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(cli, name):
    mode, args, words = BAD_TEXTS[name]
    assert_refused(cli(f"--config={ROOT / 'configs' / 'decoder_text.py'}:tiny", f"--mode={mode}", *args), *words)


@pytest.mark.parametrize("mode", ["eval", "sweep", "viz"])
def test_workdir_without_a_model(cli, mode):
    assert_refused(cli(DIGITS, f"--mode={mode}", "--workdir=empty"), "empty holds no model", "--mode=train", "init")
    assert not Path("empty").exists()


def test_size_of_the_data_that_a_checkpoint_cannot_take(cli, saved):
    size = "--config.data.image_size=(30, 30)"
    init = f"--config.init={saved / 'model'}"
    assert_refused(cli(DIGITS, "--mode=eval", f"--workdir={saved}", size), "(30, 30)", "(32, 32)")
    small = "--config.init_image_size=(3, 30)"
    assert_refused(cli(DIGITS, "--mode=eval", init, small), "(3, 30)", "patch_size=8")


def test_data_of_more_classes_than_a_checkpoint(cli, tmp_path):
    config = ViTConfig((32, 32), 8, width=16, depth=1, heads=2, num_classes=3)
    tokjax.save(tokjax.build(config), tmp_path / "three")
    assert_refused(cli(DIGITS, "--mode=eval", f"--config.init={tmp_path / 'three'}"), "10 classes", "the model 3")


@pytest.mark.parametrize("where", ["init", "workdir"])
def test_truncated_checkpoint(cli, saved, tmp_path, where):
    (model := tmp_path / "run" / "model").mkdir(parents=True)
    for file in (saved / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    given = f"--config.init={model}" if where == "init" else f"--workdir={model.parent}"
    assert_refused(cli(DIGITS, "--mode=eval", given), str(weights), "not a whole safetensors file")


def test_checkpoint_that_is_not_there(cli):
    assert_refused(cli(DIGITS, "--mode=eval", "--config.init=gone/away/model"), "gone/away/model")


def test_checkpoint_of_another_model_in_the_workdir(cli, tmp_path):
    state = TrainState.create(small(width=32).params, optax.sgd(0.1), jax.random.key(0), ema=True)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(7, state, metrics={"accuracy": 0.5})
    shape = ["--config.model.patch_size=8", "--config.model.depth=1", "--config.model.heads=2"]
    for mode in ("eval", "train"):
        result = cli(DIGITS, f"--mode={mode}", f"--workdir={tmp_path / 'run'}", "--config.model.width=16", *shape)
        assert_refused(result, str(tmp_path / "run" / "checkpoints" / "7"), "another model", "(32,)", "(16,)")


def test_reducer_of_the_config_replaces_the_saved_one(cli, tmp_path):
    tokjax.save(tokjax.reduce(small(), "tome", r=2), tmp_path / "run" / "model")
    command = [DIGITS, "--mode=eval", f"--workdir={tmp_path / 'run'}"]
    for args, setting in (([], "r=2"), (["2"], "r=2"), (["3"], "r=3")):
        result = cli(*command, *(f"--config.reduce.{x}" for r in args for x in ("name=tome", f"r={r}")))
        assert result.code == 0, result.err
        first, second = (line.split() for line in result.out.splitlines()[-2:])
        assert first[0] == "unreduced" and second[:2] == ["tome", setting]
