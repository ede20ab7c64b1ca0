"""Texts with classes: trained with a learned vocabulary, swept over budgets, gone on with from a checkpoint."""

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest

import tokjax
from tokjax.bench import report
from tokjax.data import text
from tokjax.errors import UserError
from tokjax.models.bert import BertConfig
from tokjax.models.decoder import DecoderConfig
from tokjax.pretrained.tokenizer import Tokenizer
from tokjax.tasks import text_classify
from tokjax.tasks.text_classify import TextClassify


def config_of(**changes) -> ml_collections.ConfigDict:
    config = text_classify.default_config()
    config.model = text_classify.model_config("", width=16, depth=2, heads=2, mlp_ratio=1.0)
    config.vocabulary.size = 300
    config.data.length, config.data.subset, config.data.test_subset, config.data.num_threads = 24, 40, 10, 0
    config.batch_size, config.eval_batch_size = 4, 10
    config.train.total_steps, config.train.log_every = 4, 1
    config.train.eval_every = config.train.checkpoint_every = 4
    config.train.optimiser.warmup_steps = 1
    config.sweep.targets, config.sweep.methods = (0.8,), config.sweep.methods[:1]
    config.sweep.repeats, config.sweep.seconds = 1, 0.0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A training from random weights, and a sweep of it."""
    folder = tmp_path_factory.mktemp("text_classify")
    TextClassify(config_of(), folder, "a command").run("all")
    return folder


def test_trained_and_swept(workdir):
    losses = [line["train/loss"] for line in report.read_jsonl(workdir / "metrics.jsonl") if "train/loss" in line]
    assert len(losses) == 4 and np.isfinite(losses).all()
    rows = report.read_jsonl(workdir / "results.jsonl")
    assert [row["method"] for row in rows] == ["unreduced", "ToMe"]
    assert all(row["texts"] == 10 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert abs(rows[1]["macs_relative"] - 0.8) < 0.1


def test_the_saved_model_reads_texts(workdir):
    model = tokjax.load(workdir)
    assert model.config.labels == ("negative", "positive")
    ids = model.preprocess(["We went to the harbour.", "Nobody painted the boat. " * 9])
    assert ids.shape == (2, 24) and (ids[:, 0] == 2).all()
    assert ids[1, -1] == 1 and ids[0, -1] == 0  # a text that is too long keeps its end token, a short one is padded
    assert model(ids).shape == (2, 2)


def test_a_checkpoint_brings_vocabulary_and_other_classes_a_new_head(workdir, tmp_path):
    """It is read at the length of the data; its classifier stays where the classes are as many."""
    config = config_of(init=str(workdir / "model"), **{"data.length": 12})
    config.reduce = ml_collections.ConfigDict({"name": "topk", "keep_rate": 0.5, "layers": (0,)})
    task = TextClassify(config, tmp_path, "a command")
    batch = next(iter(task.test_loader()))
    assert batch["ids"].shape == (10, 12) and (batch["ids"][:, -1] == 1).all()
    task.run("eval")
    rows = report.read_jsonl(tmp_path / "results.jsonl")
    assert [row["method"] for row in rows] == ["unreduced", "topk"]
    assert rows[1]["macs"] < rows[0]["macs"] == task.model().unreduced.cost().total
    start = task.fresh().unreduced
    assert task.headed(start, 2) is start
    other = tokjax.build(dataclasses.replace(start.config, num_classes=3, labels=()))
    headed = task.headed(other, 2)
    assert headed.config == start.config
    for name in ("token_embed", "pooler"):
        jax.tree.map(np.testing.assert_array_equal, headed.params["model"][name], other.params["model"][name])


def test_what_is_refused(workdir, tmp_path):
    tiny = {"vocab_size": 9, "length": 8, "max_length": 8, "width": 8, "depth": 1, "heads": 1}
    tokjax.save(tokjax.build(DecoderConfig(**tiny, hidden=8, kv_heads=1, head_width=8)), tmp_path / "decoder")
    tokjax.save(tokjax.build(BertConfig(**tiny)), tmp_path / "bare")
    for changes, message in (
        ({"init": str(tmp_path / "decoder")}, "holds a DecoderConfig; task 'text_classify' takes a BERT"),
        ({"init": str(tmp_path / "bare")}, "config.data.length=24: .* has 8 positions"),
        ({"init": str(tmp_path / "bare"), "data.length": 8}, "has no tokenizer beside it"),
        ({"data.task": "spelling"}, "task='spelling': is of bytes"),
    ):
        with pytest.raises(UserError, match=message):
            TextClassify(config_of(**changes), tmp_path / "run", "a command").test_loader()
    with pytest.raises(UserError, match=r"vocabulary.size=290: .* has 300 tokens"):
        TextClassify(config_of(**{"vocabulary.size": 290}), workdir, "a command").test_loader()


def test_ids_of_a_tokenizer_in_batches():
    tokenizer = Tokenizer.train_words(["we went to the harbour"], 8)
    config = config_of().data
    config.length = 8
    batch = next(iter(text.make(config, "test", batch_size=3, train=False, tokenizer=tokenizer)))
    assert batch["ids"].shape == (3, 8)
    assert set(np.unique(batch["ids"])) <= set(range(tokenizer.vocab_size))
    assert batch["label"].dtype == np.int32
