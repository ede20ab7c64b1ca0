"""The study of byte-level encoders: trained once, compared in both forms, costs relative to the first method."""

from pathlib import Path
import runpy

import pytest

from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.reducers import settings_of
from tokjax.tasks import byte_lm, byte_study
from tokjax.tasks.byte_study import ByteStudy

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Three methods with one seed; the second time nothing is left to do."""
    workdir = tmp_path_factory.mktemp("byte_study")
    languages = workdir / "languages"
    languages.mkdir()
    (languages / "german.txt").write_text("Alle Menschen sind frei und gleich an Würde und Rechten geboren.\n" * 4)
    (languages / "french.txt").write_text("Tous les êtres humains naissent libres et égaux en dignité.\n" * 4)
    config = byte_study.default_config()
    sizes = {"width": 16, "hidden": 32, "heads": 2, "head_width": 8, "depth": 2, "decoder_depth": 1}
    config.model = byte_lm.model_config("", **sizes)
    config.data.length, config.data.corruption.mean_span, config.data.test_subset = 32, 2.0, 6
    config.batch_size = config.eval_batch_size = 4
    config.train.total_steps = 2
    config.bench.batch_size = config.bench.batches = 2
    config.bench.repeats, config.bench.seconds = 1, 0.0
    config.study.seeds, config.study.languages, config.study.start_steps = (0,), str(languages), 1

    def method(label, family, name="", **changes):
        reduce = {"name": name, "layer": 1} if name else {"name": ""}
        return {"label": label, "family": family, "reduce": reduce, "changes": changes}

    config.study.methods = (
        method("ByT5", "ByT5"),
        method("MrT5 0.5", "MrT5", "mrt5", **{"control.target": 0.5}),
        method("alone", "decoder alone", **{"data.decoder_only": True}),
    )
    ByteStudy(config, workdir, "a command").run("all")
    before = (workdir / "results.jsonl").read_bytes()
    for mode in ("train_methods", "compare"):
        ByteStudy(config, workdir, "a command").run(mode)
    assert (workdir / "results.jsonl").read_bytes() == before
    return workdir, config


def test_rows(ran):
    workdir, _ = ran
    every = report.read_jsonl(workdir / "results.jsonl")
    rows = {(row["method"], row["form"]): row for row in every if row["mode"] == "compare"}
    assert set(rows) == {("ByT5", "hard"), ("MrT5 0.5", "hard"), ("MrT5 0.5", "soft"), ("alone", "hard")}
    gated = rows["MrT5 0.5", "hard"]
    assert set(gated["languages"]) == {"french", "german"}
    assert gated["macs"] < rows["MrT5 0.5", "soft"]["macs"]
    timed = {row["method"]: row for row in every if row["mode"] == "speed"}
    assert list(timed) == ["ByT5", "MrT5 0.5", "alone"] and timed["ByT5"]["encoder_speedup"] == 1
    assert all(row["encoder_ms"] > 0 and row["ms"] > 0 for row in timed.values())
    assert rows["alone", "hard"]["macs"] < 0.6 * rows["ByT5", "hard"]["macs"]


def test_report(ran):
    workdir, config = ran
    table = {row["method"]: row for row in ByteStudy(config, workdir, "").table()}
    assert table["ByT5"]["macs_relative"] == 1 > table["decoder alone"]["macs_relative"]
    assert table["decoder alone"]["control"] and not table["MrT5"]["control"]
    text = (workdir / "table.md").read_text()
    assert "| MrT5 | 0.5 |" in text and "german" in text
    assert (workdir / "pareto.png").stat().st_size > 2000 < (workdir / "training.png").stat().st_size


def test_all_go_on_from_one_start(ran):
    workdir, config = ran
    study = ByteStudy(config, workdir, "")
    for method in config.study.methods:
        task = study.training(method, 0)
        assert task.config.init == str(workdir / "runs" / "start" / "model")
        assert task.initial is not None and not task.initial.methods


def test_nothing_to_report(ran, tmp_path):
    with pytest.raises(UserError, match="run --mode=compare first"):
        ByteStudy(ran[1], tmp_path, "").run("report")


def test_the_config_of_the_study():
    config = runpy.run_path(str(CONFIGS / "mrt5_text.py"))["get_config"]("study")
    labels = [method["label"] for method in config.study.methods]
    assert labels[0] == "ByT5" and len(set(labels)) == len(labels) == 16
    for method in config.study.methods:
        assert not method["reduce"]["name"] or set(method["reduce"]) - {"name"} <= set(
            settings_of(method["reduce"]["name"])
        )
