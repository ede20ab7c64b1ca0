"""Reducers of prompts and caches at equal cost, a distilled SwiftKV among them; a second run has nothing to do."""

import jax
import ml_collections
import numpy as np
import pytest
from test_causal_lm import config_of as decoder

from configs import kv_compare as recipe
from configs import swiftkv as distillation
from tokjax import api, reducers
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.reducers.llm import swiftkv
from tokjax.tasks import kv_compare
from tokjax.tasks.causal_lm import TIMES, CausalLM
from tokjax.tasks.kv_compare import KVCompare
from tokjax.train import optimisers
from tokjax.train.config import OptimiserConfig

SIZES = {"vocabulary.kind": "bytes", "data.length": 80, "data.facts.words": 10, "model.depth": 3}
SWIFT = {"name": "swiftkv", "layer": 1}


def config_of(**changes) -> ml_collections.ConfigDict:
    config = decoder(**SIZES)
    config.compare = kv_compare.default_config().compare
    config.compare.budgets = (("cache", 0.75), ("cache", 0.1), ("macs", 0.8))
    config.compare.timed = (("cache", 0.75),)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A decoder with random weights that are not the small initial ones."""
    task = CausalLM(decoder(**SIZES), tmp_path_factory.mktemp("start"), "")
    model, rng = task.fresh(), np.random.default_rng(0)
    api.save(model.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape), model.params)), task.finished)
    return task.finished


@pytest.fixture(scope="module")
def swift(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("swift")
    config = decoder(**SIZES, init=str(start), **{"train.total_steps": 8, "train.optimiser.lr": 1e-2})
    config.reduce, config.distil.on = ml_collections.ConfigDict(SWIFT), True
    CausalLM(config, workdir, "").run("train")
    return workdir


@pytest.fixture(scope="module")
def ran(start, swift, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("kv_compare")
    others = ({"label": "SwiftKV", "path": str(swift)},)
    config = config_of(init=str(start), **{"compare.others": others})
    for mode in ("compare", "speed", "report"):
        KVCompare(config, workdir, "a command").run(mode)
    before = (workdir / "results.jsonl").read_bytes()
    KVCompare(config, workdir, "a command").run("compare")
    assert (workdir / "results.jsonl").read_bytes() == before
    return workdir


def test_distillation_trains_what_is_shared(start, swift):
    first, *_, last = [row for row in report.read_jsonl(swift / "metrics.jsonl") if "train/loss/logits" in row]
    assert last["train/loss"] < 0.8 * first["train/loss"]
    made, given = api.load(swift), api.reduce(api.load(start), "swiftkv", layer=1)
    assert [(m.name, dict(m.settings)) for m in made.methods] == [("swiftkv", {"layer": 1})]
    patterns = tuple(f"model/{pattern}" for pattern in swiftkv.frozen(1))
    frozen = optimisers.frozen(OptimiserConfig(frozen=patterns), made.params)
    for a, b, fixed in zip(*map(jax.tree.leaves, (made.params, given.params, frozen)), strict=True):
        assert np.array_equal(a, b) == fixed


def test_rows(ran):
    rows = {(r["method"], r["budget"], r["target"]): r for r in report.read_jsonl(ran / "results.jsonl")[:5]}
    whole, swift = rows["unreduced", "", None], rows["SwiftKV", "own", None]
    half, less = rows["FastV", "cache", 0.75], rows["FastV", "macs", 0.8]
    assert whole["cache_relative"] == whole["macs_relative"] == whole["macs_step_relative"] == 1
    assert half["cache_relative"] == pytest.approx(0.75, abs=0.02) and half["setting"].startswith("keep_rate=")
    assert less["macs_relative"] == pytest.approx(0.8, abs=0.02)
    assert (
        "reaches 0.3" in rows["FastV", "cache", 0.1]["unreachable"]
        and "cache" in rows["FastV", "cache", 0.1]["unreachable"]
    )
    assert swift["macs_relative"] < 0.8 and swift["cache_relative"] == 1
    assert all(np.isfinite(row["perplexity"]) for row in (whole, swift, half, less))
    timed = [row for row in report.read_jsonl(ran / "results.jsonl") if row["mode"] == "speed"]
    assert [row["method"] for row in timed] == ["unreduced", "FastV", "SwiftKV"]
    assert all(row[name] > 0 for row in timed for name in TIMES)


def test_report(ran):
    text = (ran / "table.md").read_text()
    assert "**target 0.75**" in text and "not reachable: reaches" in text and "Times at 0.75 of the cache" in text
    for name in ("perplexity_cache", "perplexity_macs", "retrieval_cache"):
        assert (ran / f"{name}.png").stat().st_size > 2000


def test_what_cannot_be(start, tmp_path):
    with pytest.raises(UserError, match="run --mode=compare first"):
        KVCompare(config_of(init=str(start)), tmp_path, "").run("report")
    config = decoder(**SIZES, init=str(start), **{"distil.on": True})
    with pytest.raises(UserError, match=r"distil\.on=True: needs config\.reduce\.name='swiftkv', got ''"):
        CausalLM(config, tmp_path, "").run("train")
    config.reduce = ml_collections.ConfigDict({"name": "swiftkv", "layer": 3})
    with pytest.raises(UserError, match="leaves all 3 blocks as they are"):
        CausalLM(config, tmp_path, "").run("train")


def test_configs():
    config = recipe.get_config("tiny")
    assert config.task == "kv_compare" and config.data.length == 80
    for method in config.compare.methods:
        known = reducers.settings_of(method["name"])
        assert set(method["settings"]) <= set(known) - {reducers.entry(method["name"]).knob.field}
    assert distillation.get_config("tiny,2").reduce.group == 2
    assert distillation.get_config("llama").data.length == 8192
    with pytest.raises(ValueError, match="'huge': must be one of tiny, small, 125m"):
        recipe.get_config("huge")
