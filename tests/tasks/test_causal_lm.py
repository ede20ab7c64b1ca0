"""Decoder language models: trained and resumed, measured behind reduced prompts, gone on with, refused where wrong."""

import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

from tokjax import api
from tokjax.bench import report
from tokjax.errors import UserError
from tokjax.tasks import causal_lm
from tokjax.tasks.causal_lm import CausalLM
from tokjax.train.checkpoints import Checkpoints


def config_of(**changes) -> ml_collections.ConfigDict:
    config = causal_lm.default_config()
    sizes = {"width": 16, "hidden": 32, "depth": 2, "heads": 2, "kv_heads": 1, "head_width": 8}
    config.model = causal_lm.model_config("", **sizes, tied=True)
    config.vocabulary.size = 500
    config.data.length, config.data.prompt, config.data.test_subset, config.data.num_threads = 64, 48, 4, 0
    config.data.facts.count, config.data.facts.questions, config.data.facts.test_count = 2, 1, 3
    config.batch_size, config.eval_batch_size = 4, 4
    config.train.total_steps, config.train.log_every, config.train.checkpoint_every = 4, 1, 2
    config.generate.max_tokens, config.generate.prompts = 6, ("The old", "A")
    config.bench.batch_sizes, config.bench.repeats, config.bench.seconds = (2,), 1, 0.0
    config.update_from_flattened_dict(changes)
    return config


def reduced(**changes):
    config = config_of(**changes)
    config.reduce = ml_collections.ConfigDict({"name": "fastv", "layer": 1, "keep_rate": 0.4})
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A short training without a reducer; then evaluated, timed and drawn with one."""
    workdir = tmp_path_factory.mktemp("causal_lm")
    CausalLM(config_of(), workdir, "a command").run("train")
    for mode in ("eval", "bench", "viz"):
        CausalLM(reduced(), workdir, "a command").run(mode)
    return workdir


def rows_of(workdir, mode):
    return [row for row in report.read_jsonl(workdir / "results.jsonl") if row["mode"] == mode]


def test_what_is_measured_is_the_loss_of_whole_texts(ran):
    """The tokens behind a prompt by hand, and what an unreduced cache gives."""
    whole, _ = rows_of(ran, "eval")
    assert whole["texts"] == 7
    task = CausalLM(config_of(), ran, "")
    model, nats, count, right = task.model(), 0.0, 0, []
    for batch in task.test_loader():
        logits = np.asarray(jax.nn.log_softmax(model(batch["ids"])))
        for row, labels, group in zip(logits[batch["valid"]], batch["labels"], batch["group"], strict=False):
            places = np.flatnonzero(labels >= 0)
            places = places[(places >= 47) & (places < 63)]
            chances = row[places, labels[places]]
            if group:
                right.append((row[places].argmax(-1) == labels[places]).all())
            else:
                nats, count = nats - chances.sum(), count + len(places)
    assert count == 4 * 16 and len(right) == 3
    assert whole["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    per_byte = nats / count / np.log(2) * task.test_loader().tokens_per_byte
    assert whole["bits_per_byte"] == pytest.approx(per_byte, rel=1e-4) and whole["retrieval"] == np.mean(right)
    logged = [row for row in report.read_jsonl(ran / "metrics.jsonl") if "eval/perplexity" in row][-1]
    assert whole["whole_perplexity"] == pytest.approx(logged["eval/perplexity"], rel=1e-4)


def test_a_reducer_costs_and_saves(ran):
    whole, fast = rows_of(ran, "eval")
    assert (whole["method"], fast["method"]) == ("unreduced", "fastv")
    # Two layers of one head of 8: keys, values, and 10 bytes of every slot's place, order, kind and mask.
    assert whole["cache_bytes"] == 2 * 48 * 2 * 8 * 4 + 48 * 10
    assert fast["cache_bytes"] == (48 + 20) * 2 * 8 * 4 + (48 + 20) * 10
    assert fast["macs"] < whole["macs"] and fast["macs_step"] < whole["macs_step"]
    assert fast["perplexity"] != whole["perplexity"] and "whole_perplexity" not in fast
    first, second = rows_of(ran, "bench")
    assert first["prefill_speedup"] == first["step_speedup"] == 1 and second["batch"] == 2
    assert all(row[name] > 0 for row in (first, second) for name in causal_lm.TIMES)


def test_pictures(ran):
    for path in sorted((ran / "pictures").iterdir()):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5, path
    assert {path.name for path in (ran / "pictures").iterdir()} == {"training.png", "kept.png"}


def test_going_on_with_prompts(ran, capsys, tmp_path):
    task = CausalLM(reduced(), ran, "")
    task.run("generate")
    one, two = report.read_jsonl(ran / "generated.jsonl")
    shown = capsys.readouterr().out
    assert shown == f"== generate\nThe old{one['text']}\nA{two['text']}\n"
    file = tmp_path / "prompts.txt"
    file.write_text("The old\n")
    CausalLM(reduced(**{"generate.file": str(file)}), ran, "").run("generate")
    assert report.read_jsonl(ran / "generated.jsonl")[-1] == one
    assert api.load(ran).preprocess.decode([*task.tokenizer.prompts(["A"])[0]]) == "A"  # it brings its vocabulary


def test_a_run_that_was_stopped_goes_on_bit_for_bit(ran, tmp_path):

    class Killed(Exception):
        pass

    class Stopped(CausalLM):
        def loader(self, split, *, train):
            loader = super().loader(split, train=train)
            if not train:
                return loader
            batch = loader.batch

            def until(step):
                if step == 3:
                    raise Killed
                return batch(step)

            loader.batch = until
            return loader

    config = config_of(**{"train.prefetch": 1})
    with pytest.raises(Killed):
        Stopped(config, tmp_path, "").run("train")
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    CausalLM(config, tmp_path, "").run("train")
    ours, theirs = (api.load(workdir).params for workdir in (ran, tmp_path))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trained_model_starts_another(ran, tmp_path):
    task = CausalLM(config_of(init=str(ran)), tmp_path, "")
    assert task.tokenizer.vocab_size == 500 and not (tmp_path / "vocabulary").exists()
    start, given = task.fresh(), api.load(ran)
    for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(given.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bytes(tmp_path):
    task = CausalLM(config_of(**{"vocabulary.kind": "bytes"}), tmp_path, "")
    api.save(task.fresh(), task.finished)
    assert task.model().config.vocab_size == 384 and task.test_loader().tokens_per_byte == 1
    with pytest.raises(UserError, match=r"vocabulary: a Tokenizer of 500 tokens; the model .* has 384"):
        CausalLM(config_of(), tmp_path, "").model()


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("train", {"data.path": "gone/away"}, "gone/away"),
        ("train", {"vocabulary.kind": "words"}, "kind='words': must be one of bpe, bytes"),
        ("train", {"vocabulary.size": 100}, "vocab_size=100: must be at least 258"),
        ("train", {"model.heads": 3}, "kv_heads|heads=3"),
        ("train", {"model.max_length": 32}, "max_length=32: must be at least config.data.length=64"),
        ("train", {"model.preset": "gpt-9"}, "name='gpt-9'"),
        ("eval", {}, "holds no model"),
    ],
)
def test_bad_configs(tmp_path, mode, changes, message):
    if "model.heads" in changes:
        changes = {**changes, "model.kv_heads": 2}
    with pytest.raises(UserError, match=message):
        CausalLM(config_of(**changes), tmp_path, "").run(mode)


def test_what_a_trained_model_cannot_do(ran, tmp_path):
    with pytest.raises(UserError, match=r"max_tokens=100: .* 64 positions"):
        CausalLM(config_of(**{"generate.max_tokens": 100}), ran, "").run("generate")
    with pytest.raises(UserError, match=r"texts\[0\] has \d+ tokens: must have at most 64"):
        CausalLM(config_of(**{"generate.prompts": ("word " * 99,)}), ran, "").run("generate")
    with pytest.raises(UserError, match=r"cannot read .*nothing\.txt"):
        CausalLM(config_of(**{"generate.file": str(tmp_path / "nothing.txt")}), ran, "").run("generate")
    with pytest.raises(UserError, match=r"length=80: .* has 64 positions"):
        CausalLM(config_of(**{"data.length": 80}), ran, "").run("eval")
    with pytest.raises(UserError, match=r"vocabulary\.size=300: .* has 500 tokens"):
        CausalLM(config_of(**{"vocabulary.size": 300}), ran, "").run("eval")
