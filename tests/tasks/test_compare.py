"""The comparison: cells that are filled once, out of reach, without a form; intervals of paired differences."""

import jax
import numpy as np
import pytest

from tokjax import api, reducers
from tokjax.bench import profile, report
from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.tasks import compare
from tokjax.tasks.compare import bootstrap, default_config, form, training_free

METHODS = (
    {"name": "tome", "label": "ToMe", "settings": {}},
    {"name": "gtp", "label": "GTP", "settings": {"neighbours": 4}},
    {"name": "random", "label": "random drop", "settings": {}},
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A comparison of a small model with random weights on digits: its folder and its config."""
    workdir = tmp_path_factory.mktemp("compare")
    shape = ViTConfig(image_size=(32, 32), patch_size=8, width=16, depth=4, heads=2, num_classes=10)
    api.save(api.build(shape, 0), workdir / "model")
    config = default_config()
    config.data.image_size = (32, 32)
    config.data.test_subset = 60
    config.eval_batch_size = 24
    config.compare.methods = METHODS
    config.compare.targets = (0.8, 0.1)
    config.compare.whole_targets = (0.8,)
    config.compare.images = 40
    config.compare.rounds = config.compare.calls = 1
    config.lengths.methods = ({"name": "ats", "label": "ATS", "settings": {"keep_rate": 0.8, "layers": (1,)}},)
    config.lengths.batch = 12
    config.lengths.rows = 4
    config.lengths.rounds = config.lengths.calls = 1
    config.compare.learned = ({"name": "sit", "label": "SiT", "settings": {}},)
    config.batch_size, config.train.total_steps = 24, 2
    for mode in ("train_methods", "all", "lengths"):
        compare.Compare(config, workdir, "a command").run(mode)
    return workdir, config


@pytest.fixture(scope="module")
def rows(ran):
    read = [row for row in report.read_jsonl(ran[0] / "results.jsonl") if row["mode"] == "compare"]
    return {(row["method"], row.get("placement"), row["target"]): row for row in read}


def test_every_cell_has_a_row(rows):
    cells = {(m["label"], place, target) for m in METHODS for place in compare.PLACEMENTS for target in (0.8, 0.1)}
    assert set(rows) == cells | {("unreduced", None, None), ("SiT", "trained", 0.8)}


def test_what_was_trained_joins_with_the_network_as_it_was(ran, rows):
    row = rows["SiT", "trained", 0.8]
    assert row["macs_relative"] == pytest.approx(0.8, abs=0.05) and row["images_all"] == 60
    timed = [each for each in report.read_jsonl(ran[0] / "results.jsonl") if each["mode"] == "speed"]
    assert any(each["method"] == "SiT" and each["speedup"] > 0 for each in timed)
    trained = api.load(ran[0] / "runs" / "sit_0.8")
    assert trained.methods[0].name == "sit"
    base = api.load(ran[0] / "model").params["model"]
    jax.tree.map(np.testing.assert_array_equal, trained.params["model"], base)


def test_columns_of_a_cell(rows):
    row = rows["ToMe", "per-layer", 0.8]
    assert row["macs_relative"] == pytest.approx(0.8, abs=0.05)
    assert (row["images"], row["images_all"]) == (40, 60)
    assert 0 <= row["agreement"] <= 1
    assert row["settings"]["layers"] == [0, 1, 2, 3]
    assert row["setting"].startswith("layers=(0, 1, 2, 3), r=")
    assert rows["random drop", "staged", 0.8]["control"]
    base = rows["unreduced", None, None]
    assert base["macs_relative"] == base["agreement"] == 1


def test_times_of_what_has_an_accuracy(ran, rows):
    read = [row for row in report.read_jsonl(ran[0] / "results.jsonl") if row["mode"] == "speed"]
    timed = {(row["method"], row["placement"], row["target"]): row for row in read}
    assert set(timed) == {cell for cell, row in rows.items() if "accuracy" in row}
    assert timed["unreduced", None, None]["overhead"] == 0
    row = timed["ToMe", "per-layer", 0.8]
    assert 0 < row["overhead"] < 1
    assert row["speedup"] > 0


def test_what_has_no_numbers_says_why(rows):
    assert rows["GTP", "staged", 0.8]["unreachable"] == "has no staged form"
    assert rows["ToMe", "staged", 0.1]["unreachable"].startswith("reaches 0.")
    assert "accuracy" not in rows["ToMe", "staged", 0.1]


def test_a_part_of_the_images_is_judged_as_among_all(ran, rows):
    """The accuracy on the part is that of the same images in the whole file, whichever way they were predicted."""
    workdir, config = ran
    task = compare.Compare(config, workdir, "")
    model = task.model()
    reduced = api.reduce(model, "tome", r=2)
    (whole, predicted), (part, among) = (task.judged(reduced, "", whole=whole) for whole in (True, False))
    assert {key: whole[key] for key in part} == part
    seen = among >= 0
    assert seen.sum() == 40
    np.testing.assert_array_equal(among[seen], predicted[seen])
    assert rows["unreduced", None, None]["accuracy"] == task.judged(model, "", whole=True)[0]["accuracy"]


def test_lengths_that_depend_on_the_data_are_counted_on_a_batch(ran, monkeypatch):
    seen = {}
    monkeypatch.setattr(compare.budget, "solve", lambda *args, **options: seen.update(options) or [None])
    workdir, config = ran
    task = compare.Compare(config, workdir, "")
    batch = np.ones(3)
    [found] = task.solutions({"name": "ats", "settings": {"variant": "official"}}, "staged", task.model(), [0.5], batch)
    assert found == (0.5, None)
    assert seen == {"macs": [0.5], "inputs": batch, "layers": (1, 2, 3), "variant": "official"}


def test_three_ways_of_a_dynamic_length(ran):
    rows = {row["way"]: row for row in report.read_jsonl(ran[0] / "results.jsonl") if row["mode"] == "lengths"}
    assert list(rows) == ["unreduced", "mask alone", "buckets", "packed"]
    assert rows["mask alone"]["speedup"] == 1
    assert max(rows[way]["largest_difference"] for way in ("buckets", "packed")) < 1e-4
    assert 0.3 < rows["buckets"]["filled"] <= 1
    assert "packed" in (ran[0] / "lengths.md").read_text()


def test_a_second_run_adds_nothing(ran, capsys):
    workdir, config = ran
    before = (workdir / "results.jsonl").read_bytes()
    for mode in ("compare", "speed"):
        compare.Compare(config, workdir, "a command").run(mode)
    assert (workdir / "results.jsonl").read_bytes() == before
    assert (
        "has not trained them: clca, diffrate_search, dynamicvit, patchmerger, sinkhorn, tokenlearner\n"
        in capsys.readouterr().out
    )


def test_report(ran):
    workdir, _ = ran
    table = (workdir / "table.md").read_text()
    assert "has no staged form" in table
    assert "| ToMe | per-layer | r=" in table
    assert table.count("[") == table.count("]") >= 2  # intervals
    for name in ("pareto_per_layer.png", "pareto_staged.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    assert "ToMe" in (workdir / "report.html").read_text()


def test_a_report_needs_rows(ran, tmp_path):
    workdir, config = ran
    config = config.copy_and_resolve_references()
    config.init = str(workdir / "model")
    with pytest.raises(UserError, match="has no comparison of this model yet"):
        compare.Compare(config, tmp_path, "").run("report")


def test_a_method_that_must_be_trained_is_refused(ran, tmp_path):
    workdir, config = ran
    config = config.copy_and_resolve_references()
    config.init = str(workdir / "model")
    config.compare.methods = ({"name": "sit", "label": "SiT", "settings": {}},)
    with pytest.raises(UserError, match="'sit' needs training"):
        compare.Compare(config, tmp_path, "").run("compare")


def test_every_reducer_without_training_is_compared():
    assert {method["name"] for method in default_config().compare.methods} == set(training_free())
    assert {"tome", "gtp", "ats", "random", "avgpool"} < set(training_free()) < set(reducers.REGISTRY)


@pytest.mark.parametrize("name", training_free())
@pytest.mark.parametrize("placement", compare.PLACEMENTS)
def test_forms(name, placement):
    model = api.build(ViTConfig(image_size=(32, 32), patch_size=4, width=16, depth=12, heads=2, num_classes=3), 0)
    settings = form(name, placement, 12)
    if settings is None:
        assert placement == "staged"
        return
    hooks = api.reduce(model, name, **settings).hooks
    layers = {hook.layer for hook in hooks if hook.where in ("before_block", "after_attention", "after_block")}
    assert len(layers) > 5 if placement == "per-layer" else len(layers) <= 5 or name == "evovit"


def test_interval_of_a_paired_difference():
    rng = np.random.default_rng(1)
    theirs = rng.random(2000) < 0.6
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:60]] = True
    found = bootstrap(ours, theirs)
    assert found.difference == pytest.approx(0.03)
    assert found.beyond_noise
    # Sixty of two thousand, each drawn or not: the deviation of their share is sqrt(0.03 * 0.97 / 2000).
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.03 * 0.97 / 2000), rel=0.1)
    assert not bootstrap(theirs, theirs).beyond_noise
    with pytest.raises(ValueError, match="must judge the same images"):
        bootstrap(ours, theirs[:5])
    with pytest.raises(ValueError, match="level=1"):
        bootstrap(ours, theirs, level=1)


def test_share_of_the_reducers_in_a_profile():
    model = api.build(ViTConfig(image_size=(32, 32), patch_size=8, width=16, depth=2, heads=2, num_classes=3), 0)
    images = jax.numpy.ones((8, 32, 32, 3))
    shares = []
    for each in (model, api.reduce(model, "tome", r=4)):
        each(images).block_until_ready()
        shares.append(profile.reducer_share(each.compiled(images), lambda each=each: each(images)))
    assert shares[0] == 0
    assert 0 < shares[1] < 1
