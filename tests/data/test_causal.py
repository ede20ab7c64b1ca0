"""Windows of a text and facts in it: what is predicted, where the answers stand, what training and tests see."""

import itertools
import re

import ml_collections
import numpy as np
import pytest

from tokjax.data import causal, texts
from tokjax.data.bytes import EOS, ByteTokenizer, decode
from tokjax.data.causal import Facts, NextToken, make, token_stream
from tokjax.data.corruption import IGNORE
from tokjax.errors import UserError
from tokjax.pretrained.tokenizer import Tokenizer

BYTES = ByteTokenizer(128)
WORDS = ["lamp", "boat", "stone", "pear", "key"]


def config_of(**changes) -> ml_collections.ConfigDict:
    config = causal.default_config()
    config.length, config.prompt, config.num_threads = 200, 160, 0
    config.facts.count, config.facts.questions, config.facts.test_count = 3, 2, 5
    config.update_from_flattened_dict(changes)
    return config


def loader(split="train", tokenizer=BYTES, batch_size=4, **changes):
    return make(config_of(**changes), split, tokenizer, eos_id=EOS, batch_size=batch_size, train=split == "train")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe((text.decode() for text in texts.embedded("train").documents), 128, 500)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return BYTES if request.param == "bytes" else bpe


def test_every_token_is_predicted_once_by_those_before_it():
    stream = np.arange(100, 131, dtype=np.int32)
    task = NextToken(stream, 10)
    pairs = [task(index, np.random.default_rng(0)) for index in range(len(task))]
    assert np.concatenate([ids for ids, _ in pairs]).tolist() == list(range(100, 130))
    assert np.concatenate([labels for _, labels in pairs]).tolist() == list(range(101, 131))
    moved = NextToken(stream, 10, moved=True)
    drawn = [moved(index, np.random.default_rng(seed))[0][0] - 100 for seed in range(40) for index in range(3)]
    assert min(drawn) == 0 and max(drawn) == 20 and len(set(drawn)) > 15
    with pytest.raises(UserError, match="needs 32 tokens of text, there are 31"):
        NextToken(stream, 31)


def test_documents_end(tokenizer):
    documents = texts.Texts([b"One, two.", "Füße".encode()], np.zeros(2, np.int32), ("text",))
    stream = token_stream(documents, tokenizer, EOS)
    ends = np.flatnonzero(stream == EOS)
    assert len(ends) == 2 and ends[-1] == len(stream) - 1
    assert [tokenizer.decode(part) for part in np.split(stream, ends + 1)[:2]] == ["One, two.", "Füße"]


def read_facts(text: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The facts of an example, and its questions with their answers, as they can be read."""
    pieces = re.findall(r" (\w+)= (\w+);", text)
    return dict(pieces[:3]), pieces[3:]


@pytest.mark.parametrize("train", [True, False])
def test_answers_stand_in_the_text(tokenizer, train):
    stream = token_stream(texts.embedded("test"), tokenizer, EOS)
    options = {"questions": 2} if train else {"prompt": 160}
    task = Facts(stream, tokenizer, WORDS, 200, examples=20, facts=3, **options)
    seen = set()
    for index in range(len(task)):
        ids, labels = task(index, np.random.default_rng(index))
        whole = np.append(ids, labels[-1])
        answers = np.flatnonzero(labels != IGNORE)
        np.testing.assert_array_equal(labels[answers], whole[answers + 1])
        facts, asked = read_facts(tokenizer.decode(whole))
        assert len(facts) == 3 and asked == [(key, facts[key]) for key, _ in asked]
        assert tokenizer.decode(labels[answers]) == "".join(f" {value};" for _, value in asked)
        assert len(asked) == (2 if train else 1)
        if train:
            assert len(ids) == 200
        else:
            assert answers[0] == 160 and len(ids) <= 200 and tokenizer.decode(ids[160:161]) == "="  # behind 160 tokens
        seen.add(tuple(facts))
    assert len(seen) > 10


def test_text_around_facts_is_whole():
    stream = token_stream(texts.embedded("test"), BYTES, EOS)
    task = Facts(stream, BYTES, WORDS, 200, examples=9, facts=2, prompt=160)
    for index in range(len(task)):
        text = decode(task(index, np.random.default_rng(index))[0])
        *_, question = re.finditer(r" \w+=", text)
        assert re.sub(r" \w+= \w+;", "", text[: question.start()]) in decode(stream)  # they stand between words


def test_batches_of_both_kinds_and_resuming(bpe):
    train = loader(tokenizer=bpe, length=60, prompt=50, **{"facts.count": 1, "facts.questions": 1})
    batches = list(itertools.islice(iter(train), 6))
    groups = np.concatenate([batch["group"] for batch in batches])
    assert train.groups == ("text", "facts") and 0 < groups.mean() < 1
    for batch in batches:
        counted = (batch["labels"] != IGNORE).sum(1)
        assert (counted[batch["group"] == 0] == 60).all() and (counted[batch["group"] == 1] < 10).all()
    again = iter(train)
    for _ in range(3):
        next(again)
    state, fresh = again.get_state(), iter(train)
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["ids"], batches[3]["ids"])
    assert 0.15 < train.tokens_per_byte < 0.6 < loader().tokens_per_byte == 1


def test_tests_are_the_same_every_time():
    first, second = ([batch["ids"] for batch in loader("test", test_subset=4)] for _ in range(2))
    assert len(first) == 3  # four texts and five questions
    assert all(map(np.array_equal, first, second))
    assert loader("test", **{"facts.share": 0.0}).groups == ("text",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 200}, r"prompt=200: must be at least 1 and below length=200"),
        ({"facts.share": 1.0}, r"facts\.share=1\.0: must be in \[0, 1\)"),
        ({"facts.questions": 0}, "questions=0: must be at least 1"),
        ({"facts.count": 9, "facts.questions": 9}, "facts=9, questions=9: take up to .* of 201 tokens"),
        ({"facts.words": 2}, "facts=3: the text has 2 words"),
        ({"path": "gone/away.txt"}, "gone/away"),
        ({"length": 10**9}, "needs 1000000001 tokens"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(UserError, match=message):
        loader(**changes)


def test_bad_tests():
    with pytest.raises(UserError, match="test_subset=1000000"):
        loader("test", test_subset=10**6)
    with pytest.raises(UserError, match="prompt=198: answers have up to"):
        loader("test", prompt=198)


def test_a_learned_vocabulary_writes_everything(bpe, tmp_path):
    texts_ = ["Last summer, my cousin sold a map.", "Füße\n\t 🙂 \x00", ""]
    ids = bpe.prompts(texts_)
    assert [bpe.decode(row) for row in ids] == texts_ and len(ids[0]) < 20
    assert (bpe.vocab_size, bpe.pad_id, bpe.eos_id, bpe.bos_id) == (500, 0, EOS, None)
    assert bpe(["a"])[0][:4].tolist()[1:] == [EOS, 0, 0]
    bpe.save(tmp_path)
    other = Tokenizer.load(tmp_path, length=64)
    assert other.prompts(texts_) == ids and (other.length, other.eos_id, other.pad_id) == (64, EOS, 0)
    with pytest.raises(ValueError, match="vocab_size=257: must be at least 258"):
        Tokenizer.train_bpe(["a"], 8, 257)
