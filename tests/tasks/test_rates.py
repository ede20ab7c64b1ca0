"""The study of learned rates: courses become each method's settings, costs are met, parts are done once."""

import dataclasses
import itertools
import json

import pytest

from tokjax import api
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.tasks import rates

SHAPE = ViTConfig(image_size=(32, 32), patch_size=8, width=16, depth=4, heads=2, num_classes=10)
SHALLOW = dataclasses.replace(SHAPE, depth=3)


@pytest.fixture(scope="module")
def model():
    return api.build(SHAPE, 0)


@pytest.mark.parametrize("name", rates.METHODS)
@pytest.mark.parametrize("left", [(14, 11, 9, 6), (16, 10, 10, 5), (16, 16, 16, 16), (15, 13, 7, 4)])
def test_settings_leave_the_counts_of_the_course(model, name, left):
    settings = rates.settings_for(name, left, 16, 1)
    assert api.reduce(model, name, **settings).token_counts() == tuple(1 + n for n in left)


def test_pitome_halves_at_most():
    assert rates.settings_for("pitome", (8,), 16, 1)["keep_rate"] == (0.5,)
    with pytest.raises(ValueError, match="gone=9: PiToMe merges at most half of 16"):
        rates.settings_for("pitome", (7,), 16, 1)


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="name='gtp'"):
        rates.settings_for("gtp", (8,), 16, 1)


@pytest.mark.parametrize("kind", rates.COURSES)
def test_a_course_meets_its_cost(model, kind):
    reduced, settings, left = rates.at_cost("topk", kind, model, 0.6)
    assert reduced.cost().total / model.cost().total == pytest.approx(0.6, abs=0.05)  # 16 patches: coarse steps
    assert settings == rates.settings_for("topk", left, 16, 1)
    assert all(a >= b for a, b in itertools.pairwise((16, *left)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The whole study on a tiny model with random weights, twice: the second time nothing is left to do."""
    workdir = tmp_path_factory.mktemp("rates")
    api.save(api.build(SHALLOW, 0), workdir / "start")
    config = rates.default_config()
    config.init = str(workdir / "start")
    config.data.image_size = (32, 32)
    config.data.test_subset = 60
    config.batch_size = config.eval_batch_size = 20
    config.train.total_steps = 2
    config.study.targets = (0.85,)
    config.study.seeds = (0,)
    config.study.methods = ("topk",)
    config.study.courses = ("falling", "staged")
    config.study.predictors = ("dynamicvit",)
    config.study.images = 40
    config.study.search.steps = 3
    config.study.search.batch_size = 20
    study = rates.Rates(config, workdir, "a command")
    study.run("all")
    before = (workdir / "results.jsonl").read_bytes()
    rates.Rates(config, workdir, "a command").run("all")
    assert (workdir / "results.jsonl").read_bytes() == before
    return workdir, config, report.read_jsonl(workdir / "results.jsonl")


def of(rows, mode):
    return [row for row in rows if row["mode"] == mode]


def test_every_seed_has_rates_of_its_own_run(ran):
    workdir, _, rows = ran
    assert [row["seed"] for row in of(rows, "search")] == [0]
    for row in of(rows, "search"):
        table = json.loads((workdir / "runs" / f"search_0.85_{row['seed']}" / "rates.json").read_text())
        assert row["settings"]["merge_kept"] == table["merge_kept"]


def test_every_course_is_judged_and_one_is_chosen_on_training_images(ran):
    workdir, config, rows = ran
    judged = [row for row in of(rows, "schedules") if row["method"] == "topk" and row["course"] != rates.SEARCHED]
    assert [row["course"] for row in judged] == ["falling", "staged"]
    best = rates.Rates(config, workdir, "").chosen(0.85, "topk")
    assert best["choosing_loss"] == min(row["choosing_loss"] for row in judged if "loss" in row)


def test_all_are_tuned_once_a_seed(ran):
    tuned = of(ran[2], "finetune")
    cells = {(row["method"], row["course"] == rates.SEARCHED, row["seed"]) for row in tuned}
    assert len(tuned) == len(cells)
    learned = {("diffrate", True), ("topk", False), ("dynamicvit", False), ("unreduced", False)}
    assert cells == {(*what, 0) for what in learned}


def test_report(ran):
    workdir = ran[0]
    table = (workdir / "table.md").read_text()
    assert "DiffRate, searched" in table
    assert (workdir / "before.png").is_file()
    assert (workdir / "after.png").is_file()
    assert (workdir / "search_0.85_0.png").is_file()
    assert (workdir / "tokens_0.85.png").is_file()


def test_spread_over_seeds():
    found = rates._spread([{"accuracy": 0.5}, {"accuracy": 0.6}, {"unreachable": "far"}], "before")
    assert found["before"] == "55.00 ± 7.07"
    assert rates._spread([{"accuracy": 0.5}], "before") == {"before": "50.00", "before_mean": 0.5, "before_sd": None}
    assert rates._spread([], "before") == {}


def test_a_study_needs_a_model_to_start_from(tmp_path):
    with pytest.raises(UserError, match=r"config\.init is empty"):
        rates.Rates(rates.default_config(), tmp_path, "").run("search")
