"""Byte-level language models: trained, steered to a rate, evaluated in both forms, taken to other texts, drawn."""

import dataclasses

import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

from tokjax import api
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.models.t5 import T5Config
from tokjax.tasks import byte_lm
from tokjax.tasks.byte_lm import ByteLM


def config_of(**changes) -> ml_collections.ConfigDict:
    config = byte_lm.default_config()
    sizes = {"width": 16, "hidden": 32, "heads": 2, "head_width": 8, "depth": 2, "decoder_depth": 1}
    config.model = byte_lm.model_config("", normaliser="softmax1", **sizes)
    config.reduce = ml_collections.ConfigDict({"name": "mrt5", "layer": 1})
    config.data.length = 32
    config.data.corruption.mean_span = 2.0
    config.data.test_subset = 6
    config.data.num_threads = 0
    config.batch_size, config.eval_batch_size = 4, 4
    config.train.total_steps, config.train.log_every, config.train.checkpoint_every = 5, 1, 2
    config.control.target, config.control.k_p = 0.9, 20.0
    config.learn.without = 1
    config.viz.texts = 2
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A short training, evaluated and drawn."""
    workdir, config = tmp_path_factory.mktemp("byte_lm"), config_of()
    task = ByteLM(config, workdir, "a command")
    for mode in ("train", "eval", "viz"):
        task.run(mode)
    return workdir, config


def rows_of(workdir, key):
    return [row for row in report.read_jsonl(workdir / "metrics.jsonl") if key in row]


def test_the_weight_follows_the_rate(ran):
    workdir, config = ran
    weight = integral = proportional = 0.0
    first, *rows = rows_of(workdir, "train/weight")
    assert first["train/deleted"] == first["train/weight"] == 0 and "train/loss/gate" not in first  # it has not joined
    for row in rows:
        assert row["train/weight"] == pytest.approx(weight, rel=1e-5, abs=1e-7)
        assert (row["train/loss/gate"] == 0) == (weight == 0)
        error = config.control.target - row["train/deleted"] / row["train/tokens"]
        proportional = 0.9 * proportional + 0.1 * config.control.k_p * error
        integral += config.control.k_i * error
        weight = max(0.0, proportional + integral)
    assert weight > 0.1
    last = rows_of(workdir, "train/weight")[-1]
    assert last["train/loss"] == pytest.approx(last["train/loss/cross_entropy"] + last["train/loss/gate"], rel=1e-5)
    assert last["train/loss/gate"] < 0


def test_both_forms_are_evaluated(ran):
    workdir, config = ran
    hard, soft = [row for row in report.read_jsonl(workdir / "results.jsonl") if row["mode"] == "eval"]
    assert (hard["form"], soft["form"]) == ("hard", "soft")
    assert hard["texts"] == soft["texts"] == 6
    assert hard["deleted"] == soft["deleted"]
    task = ByteLM(config, workdir, "")
    model = task.model()
    tokens = np.concatenate([(batch["ids"] != 0).sum(1)[batch["valid"]] for batch in task.test_loader()])
    left = tokens.sum() * (1 - hard["deleted"])
    assert left == pytest.approx(round(left), abs=1e-6)
    last = rows_of(workdir, "eval/bits_per_byte")[-1]
    assert hard["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-5)
    # Teacher forcing by hand.
    nats = count = 0.0
    for batch in task.test_loader():
        logits = model(task.inputs(model, batch))
        chances = np.asarray(jax.nn.log_softmax(logits))
        for row, labels in zip(chances, batch["labels"], strict=True):
            there = labels >= 0
            nats -= row[np.flatnonzero(there), labels[there]].sum()
            count += there.sum()
    assert hard["bits_per_byte"] == pytest.approx(nats / count / np.log(2), rel=1e-5)


def test_cost_is_that_of_what_is_left(ran):
    workdir, config = ran
    task = ByteLM(config, workdir, "")
    model = task.model()
    fixed = [api.reduce(model.unreduced, "mrt5", layer=1, capacity=tokens).cost().total for tokens in (11, 20)]
    assert task.macs(model, np.array([11.0, 20.0])) == pytest.approx(np.mean(fixed), rel=1e-6)
    assert task.macs(model.unreduced, np.array([8.0])) == model.unreduced.cost().total


def test_pictures(ran):
    workdir, config = ran
    for name in ("deleted", "training"):
        with Image.open(workdir / "pictures" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    task = ByteLM(config, workdir, "")
    for _, data, kept in task.deletions(task.model()):
        assert len(data) == len(kept) > 0


def test_other_texts_by_language(ran, tmp_path):
    workdir, _ = ran
    (tmp_path / "german.txt").write_text("Alle Menschen sind frei und gleich an Würde und Rechten geboren.\n" * 4)
    (tmp_path / "hindi.txt").write_text("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता है।\n" * 2)
    changes = {"data.path": str(tmp_path), "data.source": "languages", "data.test_split": "all"}
    task = ByteLM(config_of(**changes), workdir, "")
    row = task.evaluate(task.model(), "")
    assert set(row["by_group"]) == {"german", "hindi"}
    low, high = sorted(part["deleted"] for part in row["by_group"].values())
    assert low <= row["deleted"] <= high
    assert [name for name, _, _ in task.deletions(task.model())] == ["german", "hindi"]


def test_a_trained_model_starts_another_task(ran):
    workdir, _ = ran
    changes = {"init": str(workdir), "data.task": "classify", "data.length": 24, "data.test_subset": 4}
    task = ByteLM(config_of(**changes), workdir / "other", "")
    start, given = task.fresh(), api.load(workdir)
    assert (start.config.length, start.config.normaliser) == (24, "softmax1")
    for ours, theirs in zip(jax.tree.leaves(start.params), jax.tree.leaves(given.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    row = task.evaluate(start, "")
    assert 0 <= row["sequence_accuracy"] <= 1 and row["texts"] == 4


def test_decoder_alone_reads_nothing(tmp_path):
    config = config_of(
        **{"data.decoder_only": True, "control.target": None, "train.total_steps": 1, "learn.without": 0}
    )
    config.reduce = ml_collections.ConfigDict({"name": ""})
    task = ByteLM(config, tmp_path, "")
    task.run("train")
    assert task.model().config.length == 1
    assert task.evaluate(task.model(), "")["deleted"] == 0


def test_bad_configs(tmp_path):
    with pytest.raises(UserError, match="no term 'gate'"):
        config = config_of()
        config.reduce = ml_collections.ConfigDict({"name": "tome", "r": 2})
        ByteLM(config, tmp_path, "").run("train")
    with pytest.raises(UserError, match=r"target=1\.5"):
        ByteLM(config_of(**{"control.target": 1.5}), tmp_path, "").run("train")
    with pytest.raises(UserError, match="without=5"):
        ByteLM(config_of(**{"learn.without": 5}), tmp_path, "").run("train")
    with pytest.raises(UserError, match="heads=0"):
        ByteLM(config_of(**{"model.heads": 0}), tmp_path, "").run("train")
    with pytest.raises(UserError, match="unknown text task 'poems'"):
        ByteLM(config_of(**{"data.task": "poems"}), tmp_path, "").run("train")


def test_a_config_changes_only_what_has_no_parameters():
    model = api.build(T5Config(width=16, hidden=32, heads=2, head_width=8, depth=1, decoder_depth=1, length=8), 0)
    longer = model.with_config(length=16)
    assert longer.config == dataclasses.replace(model.config, length=16) and longer.params is model.params
    assert model.with_config(length=8) is model
    with pytest.raises(ValueError, match="other parameters"):
        model.with_config(width=32)
