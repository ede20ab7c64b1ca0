"""BERT: padding, reduction that leaves [CLS], training, bad input, files both ways."""

import dataclasses
import functools
import json

from contract_setup import QUICK
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tokjax
from tokjax.errors import UserError
from tokjax.models import bert
from tokjax.models.bert import BertConfig, Encoding
from tokjax.pretrained.tokenizer import Tokenizer

TINY = BertConfig(
    vocab_size=20, length=12, max_length=12, width=16, depth=3, heads=2, num_classes=3, labels=("a", "b", "c")
)
ENDS = (12, 7, 9)


@functools.cache
def model(**changes):
    made = tokjax.build(dataclasses.replace(TINY, **changes))
    rng = np.random.default_rng(0)
    return made.with_params(jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), made.params))


@functools.cache
def program(**changes):
    made = model(**changes)
    return jax.jit(lambda inputs: made.forward(made.params, inputs).logits, compiler_options=QUICK)


def ids():
    """Texts of `ENDS` tokens."""
    out = np.random.default_rng(0).integers(1, 20, (len(ENDS), TINY.length)).astype(np.int32)
    return np.where(np.arange(TINY.length) < np.array(ENDS)[:, None], out, 0)


def test_padding_is_told_by_id_or_mask_and_changes_nothing():
    text, run = ids(), program()
    logits = run(text)
    assert logits.shape == (3, 3)
    np.testing.assert_allclose(run(text[1:2, : ENDS[1]]), logits[1:2], atol=1e-5)
    filled = np.where(text == 0, 5, text)
    np.testing.assert_allclose(run(Encoding(filled, valid=text != 0)), logits, atol=1e-6)
    assert np.abs(run(filled) - logits).max() > 1e-3
    assert np.isfinite(run(np.zeros_like(text))).all()


def test_types_of_pairs_count():
    text, second = ids(), np.broadcast_to(np.arange(12) > 4, (3, 12)).astype(np.int32)
    np.testing.assert_array_equal(program()(Encoding(text, np.zeros_like(text))), program()(text))
    assert np.abs(program()(Encoding(text, second)) - program()(text)).max() > 1e-3


@pytest.mark.parametrize("name", ["tome", "pitome", "topk", "random", "avgpool"])
def test_reducers_leave_cls_and_padding(name):
    """[CLS] stays in front, places travel with their tokens, and a padded text is reduced as it is alone."""
    settings = {
        "tome": {"r": 2},
        "pitome": {"keep_rate": 0.7, "variant": "text", "layers": (0, 1)},
        "avgpool": {"keep_rate": 0.6, "layers": (0,)},
    }
    small = tokjax.reduce(model(), name, **settings.get(name, {"keep_rate": 0.6, "layers": (0, 1)}))
    text = ids()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(text):
        return small.forward(small.params, text, trace=True)

    out = run(text)
    assert out.tokens.length < TINY.length
    assert (np.asarray(out.trace[-1].origin)[:, 0] == 0).all()
    assert (np.asarray(out.tokens.position)[:, 0] == 0).all()
    assert np.isfinite(out.logits).all()
    assert small.cost().total < model().cost().total
    if name != "random":  # which draws for every slot
        alone = run(text[1:2, : ENDS[1]])
        np.testing.assert_allclose(alone.logits, out.logits[1:2], atol=1e-5)


def test_dropout_is_of_training_and_of_every_row_alone():
    dropped = model(dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 3)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, text):
        found = dropped.forward(params, text, key=keys, train=True).logits
        return found.sum(), found

    (_, logits), gradient = loss(dropped.params, jnp.asarray(ids()))
    assert np.abs(logits - program()(ids())).max() > 1e-2
    np.testing.assert_array_equal(program(dropout=0.5)(ids()), program()(ids()))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    unused = ("pos_embed", "type_embed", "token_embed")
    slopes = {name: np.abs(jax.tree.leaves(part)[0]).max() for name, part in gradient["model"].items()}
    assert all(slope > 0 for name, slope in slopes.items() if name not in unused)


def test_stacked_blocks_give_the_same():
    made = {scan: tokjax.build(dataclasses.replace(TINY, depth=5, scan=scan)) for scan in (False, True)}
    logits = [jax.jit(m.forward, compiler_options=QUICK)(m.params, ids()).logits for m in made.values()]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_published_sizes():
    base = nnx.eval_shape(lambda: bert.Bert(bert.preset("bert-base", depth=1), rngs=nnx.Rngs(0)))
    block = sum(x.size for x in jax.tree.leaves(nnx.state(base.blocks)))
    rest = sum(x.size for x in jax.tree.leaves(nnx.state(base))) - block
    assert rest + 12 * block == 109_482_240  # google-research/bert, uncased_L-12_H-768_A-12
    with pytest.raises(ValueError, match="name='huge': must be one of bert-tiny"):
        bert.preset("huge")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 13), np.int32), r"ids has shape \(2, 13\): must be \(batch, 1 to 12 tokens\)"),
        (np.zeros((2, 3), np.float32), "ids has type float32: must be an integer type"),
        (np.full((2, 3), 20, np.int32), r"ids lie in 20\.\.20: must be in \[0, 20\)"),
        (Encoding(np.ones((1, 2), np.int32), np.full((1, 2), 2)), r"types lie in 2\.\.2: must be in \[0, 2\)"),
        (Encoding(np.ones((1, 2), np.int32), valid=np.ones((1, 3), bool)), r"valid has shape \(1, 3\): must be that"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        model()(inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": 0}, "types=0: must be at least 1"),
        ({"length": 13}, "length=13: must be at most max_length=12"),
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"pooler": False}, "pooler=False: must be True with num_classes=3"),
        ({"labels": ("a",)}, r"labels=\('a',\): must be num_classes=3 names, or none"),
        ({"num_classes": -1, "labels": ()}, "num_classes=-1: must be at least 0"),
        ({"pad_id": 20}, r"pad_id=20: must be in \[0, 20\)"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    "changes", [{}, {"num_classes": 0, "labels": ()}, {"num_classes": 0, "labels": (), "pooler": False}]
)
def test_saved_and_loaded(tmp_path, changes):
    made = tokjax.build(dataclasses.replace(TINY, **changes))
    tokjax.save(tokjax.reduce(made, "tome", r=1), tmp_path)
    again = tokjax.load(tmp_path)
    assert again.config == made.config
    assert [method.name for method in again.methods] == ["tome"]
    for ours, theirs in zip(jax.tree.leaves(again.params), jax.tree.leaves(made.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    said, classes = json.loads((tmp_path / "config.json").read_text()), made.config.num_classes
    assert said["architectures"] == ["BertForSequenceClassification" if classes else "BertModel"]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert all(name.startswith(("bert.", "classifier.")) == bool(classes) for name in names)
    # As others write it: without our own part, with old names of norms, positions, and pre-training's head.
    said.pop("tokjax")
    (tmp_path / "config.json").write_text(json.dumps(said))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {functools.reduce(lambda n, pair: n.replace(*pair), old.items(), k): v for k, v in tensors.items()}
    tensors |= {"cls.predictions.bias": np.zeros(20, np.float32), "bert.embeddings.position_ids": np.zeros((1, 12))}
    save_file(tensors, tmp_path / "model.safetensors")
    foreign = tokjax.load(tmp_path)
    assert foreign.config == made.config
    np.testing.assert_array_equal(jax.tree.leaves(foreign.params)[0], jax.tree.leaves(made.params)[0])


def test_what_files_say_that_is_not_known(tmp_path):
    tokjax.save(tokjax.build(TINY), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said.pop("tokjax")
    for change, message in (
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not known here"),
        ({"is_decoder": True}, "is_decoder = True: a BERT that writes"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not known here"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**said, **change}))
        with pytest.raises(UserError, match=message):
            tokjax.load(tmp_path)


def test_the_vocabulary_beside_a_model(tmp_path):
    """A `vocab.txt` is BERT's WordPiece; padding is the configuration's where the tokenizer's files are silent."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "##ness", "film", "!", "cafe"]
    made = tokjax.build(dataclasses.replace(TINY, length=6))
    tokjax.save(made, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = tokjax.load(tmp_path).preprocess
    expected = [[2, 4, 5, 7, 8, 3], [2, 1, 6, 3, 0, 0]]
    np.testing.assert_array_equal(tokenizer(["Goodness! Café", "bad film"])[:, :6], expected)
    assert tokenizer(["film"]).shape == (1, 12)
    assert tokenizer.decode(np.array(expected[0])) == "goodness! cafe"
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    again = Tokenizer.load(tmp_path, length=6)
    np.testing.assert_array_equal(again(["Goodness! Café", "bad film"]), expected)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.load(tmp_path, length=6)(["film Film"]).tolist() == [[2, 6, 1, 3, 0, 0]]
    (tmp_path / "vocab.txt").write_text("good\nfilm\n")
    with pytest.raises(UserError, match=r"vocab.txt lacks \[UNK\], \[CLS\], \[SEP\], \[PAD\]"):
        Tokenizer.load(tmp_path, length=6)
