import json
from pathlib import Path

from image_files import encode, plain
import numpy as np
import pytest

from tokjax.data.captions import Captions, Tokenized
from tokjax.data.scenes import Scenes
from tokjax.data.sources import Digits, subset
from tokjax.data.transforms import ImageError
from tokjax.errors import UserError

ROWS = [
    {"file": "images/b.png", "caption": ["first of b", "second of b"]},
    {"file": "images/a.png", "caption": "only of a"},
    {"file": "images/b.png", "caption": "third of b"},
]


def write(folder: Path, rows=ROWS, images=("a", "b")) -> Path:
    (folder / "images").mkdir(parents=True)
    for index, name in enumerate(images):
        (folder / "images" / f"{name}.png").write_bytes(encode(plain(index)))
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def letters(texts):
    """A tokenizer of sorts: the first four characters."""
    return np.array([[ord(c) for c in text[:4].ljust(4)] for text in texts], np.int32).reshape(-1, 4)


class TestCaptions:
    def test_images_with_all_their_captions(self, tmp_path):
        source = Captions(write(tmp_path), None)
        assert source.captions == [("first of b", "second of b", "third of b"), ("only of a",)]
        assert source.class_names == ("images/b.png", "images/a.png") and source.labels.tolist() == [0, 1]
        assert source[0]["caption"] == "first of b"
        np.testing.assert_array_equal(source[0]["image"], plain(1))
        np.testing.assert_array_equal(source[1]["image"], plain(0))
        assert source.name_of(1) == str(tmp_path / "images" / "a.png")

    def test_pairs(self, tmp_path):
        source = Captions(write(tmp_path), None, pairs=True)
        examples = [source[i] for i in range(len(source))]
        assert [(e["label"], e["caption"]) for e in examples] == [
            (0, "first of b"),
            (0, "second of b"),
            (0, "third of b"),
            (1, "only of a"),
        ]
        assert all(e["image"][0, 0, 0] == 1 - e["label"] for e in examples)
        assert [source.captions[i] for i in range(4)] == [(e["caption"],) for e in examples]

    def test_csv(self, tmp_path):
        write(tmp_path)
        (tmp_path / "captions.jsonl").unlink()
        (tmp_path / "captions.csv").write_text('\ufefffile,caption\nimages/a.png,"one, two"\nimages/b.png,ö\n', "utf-8")
        assert Captions(tmp_path, None).captions == [("one, two",), ("ö",)]

    def test_splits_in_folders(self, tmp_path):
        write(tmp_path / "train")
        write(tmp_path / "test", ROWS[1:2])
        assert (len(Captions(tmp_path, "train")), len(Captions(tmp_path, "val"))) == (2, 1)
        with pytest.raises(UserError, match=r"no split 'more' in .*: it has test, train"):
            Captions(tmp_path, "more")

    def test_splits_in_a_field(self, tmp_path):
        write(tmp_path, [{**row, "split": name} for row, name in zip(ROWS, ("train", "test", "train"), strict=True)])
        assert Captions(tmp_path, "train").captions == [("first of b", "second of b", "third of b")]
        assert Captions(tmp_path, "test").captions == [("only of a",)]
        assert len(Captions(tmp_path, None)) == 2
        with pytest.raises(UserError, match=r"no split 'more'"):
            Captions(tmp_path, "more")

    @pytest.mark.parametrize(
        "line",
        [
            "[1]",
            '{"file": "images/a.png"}',
            '{"file": "images/a.png", "caption": []}',
            '{"file": "images/a.png", "caption": ["a", 3]}',
            '{"file": "", "caption": "a"}',
            '{"file": "a", "caption": "a", "split": 3}',
        ],
    )
    def test_wrong_lines(self, tmp_path, line):
        write(tmp_path)
        with (tmp_path / "captions.jsonl").open("a") as file:
            file.write("\n" + line + "\n")
        with pytest.raises(UserError, match=r"captions.jsonl, line 5: needs `file` and `caption`"):
            Captions(tmp_path, None)

    def test_wrong_folders(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            Captions(tmp_path / "none", None)
        with pytest.raises(UserError, match=r"no captions.jsonl or captions.csv in"):
            Captions(tmp_path, "test")
        write(tmp_path)
        with pytest.raises(UserError, match="entry 1 has no `split`"):
            Captions(tmp_path, "test")
        (tmp_path / "captions.jsonl").write_text("{")
        with pytest.raises(UserError, match="cannot read"):
            Captions(tmp_path, None)
        (tmp_path / "captions.jsonl").write_text("")
        with pytest.raises(UserError, match="no captions in"):
            Captions(tmp_path, None)

    def test_a_missing_image_is_bad(self, tmp_path):
        source = Captions(write(tmp_path, images=("a",)), None)
        with pytest.raises(ImageError, match="No such file"):
            source[0]
        assert source[1]["label"] == 1


class TestTokenized:
    def test_adds_ids(self, tmp_path):
        folder = Captions(write(tmp_path), None, pairs=True)
        source = Tokenized(folder, letters)
        assert source.fields == {"ids": ((4,), "int32")}
        for i in range(4):
            np.testing.assert_array_equal(source[i]["ids"], letters([folder[i]["caption"]])[0])
        assert source.captions == folder.captions and source.name_of(2) == folder.name_of(2)
        assert subset(source, 2).fields == source.fields

    def test_keeps_other_fields(self):
        scenes = Scenes("test", count=3)
        source = Tokenized(scenes, letters)
        assert set(source.fields) == {"segmentation", "depth", "ids"} and source.dense and source.in_memory
        np.testing.assert_array_equal(source[1]["depth"], scenes[1]["depth"])

    def test_needs_captions(self):
        with pytest.raises(UserError, match="Digits has no captions"):
            Tokenized(Digits("test"), letters)
