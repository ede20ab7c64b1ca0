"""Texts, the tasks made of them and their batches."""

import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokjax.data import text, texts
from tokjax.data.bytes import CLASSES, byte_classes, decode, to_ids
from tokjax.data.text import TextLoader, default_config, make
from tokjax.data.text_tasks import Classify, DecoderOnly, Diagnostic, SpanCorruption, Spelling
from tokjax.data.texts import Texts, files, languages, open_texts, parquet
from tokjax.errors import UserError


def documents(*lines, labels=None) -> Texts:
    group = np.zeros(len(lines), np.int32)
    labels = None if labels is None else np.array(labels, np.int32)
    return Texts([line.encode() for line in lines], group, ("text",), labels, ("0", "1") if labels is not None else ())


def config_of(**fields):
    config = default_config()
    config.num_threads = 0
    for name, value in fields.items():
        config[name] = value
    return config


def loader(task, batch_size=4, train=True, **options):
    return TextLoader(task, batch_size=batch_size, train=train, num_threads=options.pop("num_threads", 0), **options)


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


NEWS = documents(
    *(f"Document number {index} says something of its own, {'long ' * (index % 7)}." for index in range(60))
)


class TestFiles:
    def test_lines_paragraphs_and_the_whole(self, tmp_path):
        (tmp_path / "train.txt").write_bytes("\ufeffone\r\ntwo  \n\n \nthrée\n".encode())
        assert files(tmp_path, "train").documents == [b"one", b"two", "thrée".encode()]
        assert files(tmp_path, "train", "paragraph").documents == [b"one\ntwo", "thrée".encode()]
        assert files(tmp_path, "train", "file").documents == ["one\ntwo  \n\n \nthrée".encode()]

    def test_what_is_no_utf8_is_replaced(self, tmp_path):
        (tmp_path / "train.txt").write_bytes(b"a\xff\xfe\nb\xc3")
        assert [d.decode() for d in files(tmp_path, "train").documents] == ["a\ufffd\ufffd", "b\ufffd"]

    def test_splits_by_name_folder_and_pattern(self, tmp_path):
        for name in ("train", "valid"):
            (tmp_path / f"{name}.txt").write_text(name)
            (tmp_path / "in" / name).mkdir(parents=True)
            (tmp_path / "in" / name / "x.txt").write_text(f"{name} folder")
            (tmp_path / f"news_{name}.txt").write_text(f"{name} news")
        assert files(tmp_path, "test").documents == [b"valid"]
        assert files(tmp_path / "in", "validation").documents == [b"valid folder"]
        assert files(f"{tmp_path}/news_{{split}}.txt", "test").documents == [b"valid news"]

    def test_the_end_is_held_out(self, tmp_path):
        file = tmp_path / "book.txt"
        file.write_text("\n".join(map(str, range(20))))
        assert files(file, "train", held_out=0.1).documents == [str(n).encode() for n in range(18)]
        assert files(file, "test", held_out=0.1).documents == [b"18", b"19"]
        assert len(files(file, "all")) == 20
        assert len(files(tmp_path, "train")) == 19

    def test_languages(self, tmp_path):
        (tmp_path / "deu.txt").write_text("eins\nzwei\ndrei")
        (tmp_path / "fra.txt").write_text("un\ndeux")
        every = languages(tmp_path, "all")
        assert every.groups == ("deu", "fra") and every.group.tolist() == [0, 0, 0, 1, 1]
        assert languages(tmp_path, "test").documents == [b"drei", b"deux"]
        assert languages(tmp_path, "train").group.tolist() == [0, 0, 1]
        assert open_texts(config_of(path=str(tmp_path)), "all").groups == ("deu", "fra")

    def test_errors(self, tmp_path):
        empty, one = tmp_path / "empty", tmp_path / "one.txt"
        empty.mkdir()
        one.write_text("\n \none\n")
        (empty / "sub").mkdir()
        for call, message in [
            (lambda: files(tmp_path / "no", "train"), "no such folder"),
            (lambda: files(empty, "train"), r"no \*.txt files in"),
            (lambda: languages(empty, "train"), r"no \*.txt files in"),
            (lambda: files(one, "train"), "has 1 documents, too few for train and test: use split 'all'"),
            (lambda: files(one, "nowhere"), "no split 'nowhere' in .*: it has train, test and all"),
            (lambda: files(f"{tmp_path}/{{split}}/x.txt", "train"), "must have {split} once, in its last part"),
            (lambda: files(f"{tmp_path}/{{split}}.dat", "train"), "no split 'train'"),
        ]:
            with pytest.raises(UserError, match=message):
                call()
        one.write_text(" \n")
        with pytest.raises(UserError, match="no text in"):
            files(one, "all")
        with pytest.raises(ValueError, match="document must be line, paragraph or file, got 'word'"):
            list(files(one, "all", "word").documents)
        one.write_text("a\nb")
        with pytest.raises(ValueError, match=r"held_out must be above 0 and below 1, got 1\.0"):
            files(one, "test", held_out=1.0)


class TestParquet:
    @pytest.fixture
    def folder(self, tmp_path):
        table = {"text": ["good film", " ", "bad film"], "premise": ["a", "b", "c"], "label": [1, 1, 0]}
        pq.write_table(pa.table(table), tmp_path / "train.parquet")
        return tmp_path

    def test_text_and_label(self, folder):
        found = parquet(folder, "train")
        assert found.documents == [b"good film", b"bad film"]
        assert found.labels.tolist() == [1, 0] and found.class_names == ("0", "1")
        assert parquet(f"{folder}/{{split}}.parquet", "train", labelled=False).labels is None

    def test_template(self, folder):
        found = parquet(folder, "train", template="P: {premise} T: {text}", labelled=False)
        assert found.documents == [b"P: a T: good film", b"P: b T:", b"P: c T: bad film"]

    def test_errors(self, folder):
        pq.write_table(pa.table({"text": ["a", None], "label": [0, 1]}), folder / "test.parquet")
        for options, message in [
            ({"split": "nowhere"}, "no split 'nowhere'"),
            ({"split": "test"}, "row 1 of split 'test' of .* has no text in column 'text'"),
            ({"text_column": "label"}, "text_column 'label' of .* has type int64"),
            ({"template": "{nothing}"}, "a column of the template 'nothing' is not in"),
            ({"template": "all the same"}, "names no column"),
            ({"label_column": "text"}, "label_column 'text'"),
        ]:
            with pytest.raises(UserError, match=message):
                parquet(folder, **{"split": "train"} | options)


class TestEmbedded:
    def test_needs_nothing_and_repeats_nothing(self):
        train, test = texts.embedded("train"), texts.embedded("valid")
        assert len(train) == 4000 and len(test) == 400
        assert not set(train.documents) & set(test.documents) and len(set(train.documents)) == 4000
        assert not any(re.search(rb"[{}]", document) for document in train.documents)
        assert abs(train.labels.mean() - 0.5) < 0.05
        with pytest.raises(UserError, match="it has train, test"):
            texts.embedded("other")

    def test_samples_are_of_their_scripts(self):
        scripts = {
            "russian": "cyrillic",
            "hindi": "devanagari",
            "chinese": "han",
            "japanese": "kana",
            "korean": "hangul",
        }
        for language, script in scripts.items():
            classes = {CLASSES[c] for c in byte_classes(to_ids(texts.SAMPLES[language]))}
            assert f"{script} first" in classes and "broken" not in classes


class TestSpanCorruption:
    def test_documents_are_packed(self):
        task = SpanCorruption(NEWS, 64, mean_span=5.0)
        stream = "\x00".join([*(d.decode() for d in NEWS.documents), ""])
        shown = "".join(
            "".join("\x00" if token == 1 else chr(token - 3) for token in task.raw(index)) for index in range(len(task))
        )
        assert len(task) == len(stream) // task.tokens and stream.startswith(shown)
        assert len(stream) - len(shown) < task.tokens

    def test_batches_are_full(self):
        task = SpanCorruption(NEWS, 64, mean_span=5.0)
        for batch in take(loader(task), 5):
            assert (batch["ids"] > 0).all() and (batch["labels"] > 0).all()
            assert (batch["ids"][:, -1] == 1).all() and (batch["labels"][:, 0] == 258).all()
            assert np.array_equal(batch["decoder_ids"][:, 1:], batch["labels"][:, :-1])
            assert not batch["decoder_ids"][:, 0].any()
            assert {name: array.dtype.name for name, array in batch.items()} == {
                **dict.fromkeys(("ids", "decoder_ids", "labels", "group"), "int32"),
                "valid": "bool",
            }

    def test_a_document_alone_may_be_short(self):
        task = SpanCorruption(documents("a", "abc", "long " * 30), 32, mean_span=3.0, pack=False)
        (batch,) = take(loader(task, 3, train=False), 1)
        assert batch["ids"][0].tolist() == [100, 258, 1] + [0] * 29  # its end is the span
        assert batch["labels"][0].tolist() == [258, 1, 1] + [-100] * (task.target_length - 3)
        assert batch["decoder_ids"][0].tolist() == [0, 258, 1, 1] + [0] * (task.target_length - 4)
        assert (batch["ids"][2] > 0).all()

    def test_groups_are_packed_apart_and_balanced(self):
        lines = ["eins zwei drei vier"] * 60 + ["un deux trois"] * 20
        group = np.repeat([0, 1, 2], [60, 15, 5]).astype(np.int32)
        task = SpanCorruption(Texts([line.encode() for line in lines], group, ("a", "b", "c")), 32, mean_span=3.0)
        counts = np.bincount(task.group)
        assert counts[0] > 4 * counts[1] > 0
        assert all(("un" in decode(task.raw(i))) == (task.group[i] > 0) for i in range(len(task)))
        balanced = loader(task, 8, balance=True, num_epochs=4)
        shown = np.bincount(np.concatenate([batch["group"] for batch in balanced]))
        assert shown.max() - shown.min() <= 4 * 8
        alike = loader(task, 8, num_epochs=4)
        assert np.bincount(np.concatenate([batch["group"] for batch in alike]))[0] > shown[0]

    def test_too_little(self):
        with pytest.raises(UserError, match=r"an example needs 72 bytes of text, the longest group has 6"):
            SpanCorruption(documents("short"), 64, mean_span=5.0)
        with pytest.raises(ValueError, match="length=33 has 6 bytes to cut out, less than half a span of 20"):
            SpanCorruption(NEWS, 33)


class TestDiagnostics:
    def test_targets(self):
        for index in range(50):
            before, after = Diagnostic("vowels").texts(index)
            assert (
                len(before) == 63 and before[0] == "#" and after == "".join(c for c in before if c not in "aeiouAEIOU")
            )
            before, after = Diagnostic("contextual_vowels").texts(index)
            kept = [
                c
                for last, c in zip(" " + before, before, strict=False)
                if not (c in "aeiouAEIOU" and last in "bcdfghjklmnpqrstvwxyz")
            ]
            assert after == "".join(kept) and len(after) < len(before)
            before, after = Diagnostic("merge").texts(index)
            assert "ABC" in before and after == before.replace("ABC", "D")

    def test_as_many_as_published(self):
        pairs = [sum(a != b for a, b in zip(*Diagnostic("merge").texts(i), strict=False)) > 0 for i in range(20)]
        assert all(pairs)
        merged = [Diagnostic("merge").texts(i)[0].count("ABC") for i in range(400)]
        assert 4.5 < np.mean(merged) < 5.6 and min(merged) >= 1
        shorter = [len(a) - len(b) for a, b in (Diagnostic("contextual_vowels").texts(i) for i in range(200))]
        assert 8 < np.mean(shorter) < 16

    def test_batches_and_splits(self):
        config = config_of(task="vowels", length=64)
        config.diagnostic.train_count, config.diagnostic.test_count = 100, 10
        train, test = (make(config, s, batch_size=4, train=s == "train") for s in ("train", "test"))
        batches = list(test)
        assert [batch["valid"].sum() for batch in batches] == [4, 4, 2]
        assert not batches[-1]["ids"][2:].any() and (batches[-1]["labels"][2:] == -100).all()
        shown = [{decode(row) for batch in b for row in batch["ids"]} for b in (take(train, 25), batches)]
        assert len(shown[0]) == 100 and not shown[0] & shown[1]

    @pytest.mark.parametrize("change", [{"kind": "odd"}, {"length": 7}, {"count": 0}, {"seed": -1}])
    def test_errors(self, change):
        with pytest.raises(ValueError, match=next(iter(change))):
            Diagnostic(**{"kind": "vowels"} | change)


class TestSpelling:
    def test_every_text_has_an_error_and_its_correct_form(self):
        task = Spelling(NEWS, 40)
        rng = np.random.default_rng(0)
        kinds = set()
        for index in range(len(task)):
            wrong, right = (decode(ids) for ids in task(index, rng))
            assert wrong != right and any(right in document.decode() for document in NEWS.documents)
            assert len(wrong.encode()) < 40
            kinds.add(len(wrong) - len(right))
        assert {-1, 0, 1} <= kinds
        together = " ".join(decode(task(i, rng)[1]) for i in range(len(task)))
        assert together == " ".join(d.decode() for d in NEWS.documents)

    def test_one_word_in_brackets(self):
        task = Spelling(NEWS, 40, target="word")
        rng = np.random.default_rng(0)
        for index in range(40):
            wrong, word = (decode(ids) for ids in task(index, rng))
            before, bad, after = re.fullmatch(r"(.*)\[(.*)\](.*)", wrong).groups()
            assert bad != word and word.isalpha()
            assert any(before + word + after in document.decode() for document in NEWS.documents)

    def test_letters_of_other_scripts_stay_whole(self):
        task = Spelling(documents(texts.SAMPLES["russian"], texts.SAMPLES["greek"]), 64, noise=1.0)
        rng = np.random.default_rng(0)
        for index in [*range(len(task))] * 20:
            wrong, right = (decode(ids) for ids in task(index, rng))
            assert wrong != right and "\ufffd" not in wrong

    def test_texts_without_words(self):
        task = Spelling(documents("12 34", "x" * 80 + " but short"), 40)
        assert [decode(task(i, np.random.default_rng(0))[1]) for i in range(len(task))] == ["12 34", "but short"]
        with pytest.raises(UserError, match="no words of at most 35 bytes"):
            Spelling(documents("x" * 80), 40)
        with pytest.raises(UserError, match="no words of three letters"):
            Spelling(documents("12 34"), 40, target="word")

    @pytest.mark.parametrize("change", [{"target": "odd"}, {"length": 15}, {"noise": 0.0}])
    def test_errors(self, change):
        with pytest.raises(ValueError, match=next(iter(change))):
            Spelling(NEWS, **change)


class TestClassify:
    def test_text_and_class(self):
        task = Classify(documents("good film", "a very bad film", labels=[1, 0]), 8)
        (batch,) = take(loader(task, 3, train=False), 1)
        assert [decode(row) for row in batch["ids"]] == ["good fi", "a very ", ""]
        assert batch["labels"].tolist() == [[52, 1], [51, 1], [-100, -100]]
        assert batch["label"].tolist() == [1, 0, 0] and batch["valid"].tolist() == [True, True, False]

    def test_errors(self):
        with pytest.raises(ValueError, match="texts must have labels"):
            Classify(NEWS)
        with pytest.raises(ValueError, match="length must be at least 2, got 1"):
            Classify(documents("a", labels=[0]), 1)


def test_decoder_only_reads_nothing():
    task = SpanCorruption(NEWS, 64, mean_span=5.0)
    plain, alone = (take(loader(t), 2) for t in (task, DecoderOnly(task)))
    for full, nothing in zip(plain, alone, strict=True):
        assert nothing["ids"].tolist() == [[1]] * 4
        assert np.array_equal(full["labels"], nothing["labels"])


class TestLoader:
    task = SpanCorruption(NEWS, 64, mean_span=5.0)

    def test_an_epoch_shows_each_example_once_and_the_next_one_differs(self):
        n = loader(self.task).batches_per_epoch
        batches = take(loader(self.task), 2 * n)
        assert not same(batches[:n], batches[n:])
        order = loader(self.task).order(0)
        assert sorted(order.tolist()) == list(range(len(self.task)))
        assert same(batches[:n], take(loader(self.task), n))
        assert not same(batches[:n], take(loader(self.task, seed=1), n))

    def test_evaluation_is_always_the_same(self):
        first, second = list(loader(self.task, 16, train=False)), list(loader(self.task, 16, train=False, num_epochs=2))
        assert same(first + first, second)
        assert sum(int(batch["valid"].sum()) for batch in first) == len(self.task)

    @pytest.mark.parametrize("threads", [0, 2])
    @pytest.mark.parametrize("at", [3, 20])
    def test_resumes_exactly(self, at, threads):
        iterator = iter(loader(self.task, num_threads=threads))
        take(iterator, at)
        state = json.loads(json.dumps(iterator.get_state()))
        expected = take(iterator, 12)
        resumed = iter(loader(self.task, num_threads=threads))
        resumed.set_state(state)
        assert same(take(resumed, 12), expected)
        with pytest.raises(ValueError, match="saved position counts batches of"):
            iter(loader(self.task, seed=9)).set_state(state)

    def test_processes_share_the_batches_of_one(self):
        whole = take(loader(self.task, 8), 12)
        parts = [take(loader(self.task, 4, process_index=p, process_count=2), 12) for p in range(2)]
        joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]} for i in range(12)]
        assert same(joined, whole)


class TestMake:
    def test_every_task_runs_without_files(self):
        for task in text.TASKS:
            for decoder_only in (False, True):
                config = config_of(task=task, length=64, decoder_only=decoder_only)
                config.corruption.mean_span = 5.0
                config.diagnostic.train_count = 50
                (batch,) = take(make(config, "train", batch_size=2, train=True), 1)
                assert batch["ids"].shape == (2, 1 if decoder_only else 64)
                assert batch["decoder_ids"].shape == batch["labels"].shape

    def test_the_default_is_as_published(self):
        found = make(config_of(), "test", batch_size=2, train=False)
        assert (found.task.length, found.task.target_length, found.groups) == (1024, 189, ("english",))

    def test_subset(self):
        config = config_of(task="classify", length=32, subset=30, test_subset=7)
        train, test = (make(config, s, batch_size=4, train=False) for s in ("train", "test"))
        assert (train.examples, test.examples, train.num_classes) == (30, 7, 2)
        assert sum(int(batch["valid"].sum()) for batch in test) == 7

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"task": "odd"}, "unknown text task 'odd': choose from span_corruption"),
            ({"source": "odd"}, "unknown text source 'odd'"),
            ({"source": "files"}, "text source 'files' needs a path"),
            ({"length": 1}, "data config: length must be at least 3, got 1"),
            ({"length": 30}, "data config: length=30 has"),
            ({"subset": 0}, "data config: a subset must have 1 to"),
            ({"held_out": "x"}, "data config: .*held_out"),
            ({"num_threads": -1}, "data config: num_threads must not be negative, got -1"),
        ],
    )
    def test_errors(self, fields, message):
        config = default_config().to_dict() | fields
        with pytest.raises(UserError, match=message):
            make(text.ml_collections.ConfigDict(config), "train", batch_size=2, train=True)

    def test_unknown_fields_and_missing_labels(self, tmp_path):
        with pytest.raises(UserError, match="unknown field 'lenght'"):
            make(text.ml_collections.ConfigDict({"lenght": 3}), "train", batch_size=2, train=True)
        with pytest.raises(UserError, match="unknown field of corruption 'rate'"):
            make(text.ml_collections.ConfigDict({"corruption": {"rate": 3}}), "train", batch_size=2, train=True)
        (tmp_path / "a.txt").write_text("a\nb\nc")
        config = config_of(task="classify", path=str(tmp_path))
        with pytest.raises(UserError, match="text source 'files' has no labels"):
            make(config, "train", batch_size=2, train=True)
        with pytest.raises(UserError, match="no split 'other'"):
            make(config_of(), "other", batch_size=2, train=True)
