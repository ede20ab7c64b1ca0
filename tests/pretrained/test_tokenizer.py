import gzip
import json
from pathlib import Path
import shutil
import string

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from tokjax.errors import UserError
from tokjax.pretrained.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
CLIP = GOLDEN / "clip"


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(CLIP, tmp_path / "model")


def same(first: Tokenizer, second: Tokenizer) -> bool:
    names = ("length", "pad_id", "bos_id", "eos_id", "pad_side")
    return first.backend.to_str() == second.backend.to_str() and all(
        getattr(first, name) == getattr(second, name) for name in names
    )


@pytest.mark.parametrize("name", ["clip", "siglip2"])
class TestPublished:
    def test_ids(self, name):
        expected = json.loads((GOLDEN / name / "ids.json").read_text())
        tokenizer = Tokenizer.load(GOLDEN / name, length=expected["length"])
        got = tokenizer(list(expected["ids"]))
        assert got.dtype == np.int32
        for row, (text, ids) in zip(got, expected["ids"].items(), strict=True):
            assert row.tolist() == ids, text

    def test_saved_and_loaded(self, name, tmp_path):
        tokenizer = Tokenizer.load(GOLDEN / name)
        tokenizer.save(tmp_path / "saved")
        again = Tokenizer.load(tmp_path / "saved")
        assert same(tokenizer, again)
        texts = list(json.loads((GOLDEN / name / "ids.json").read_text())["ids"])
        np.testing.assert_array_equal(tokenizer(texts), again(texts))
        again.save(tmp_path / "saved")
        assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        # In the folder of a SigLIP model nothing is put before it a second time.
        (tmp_path / "saved" / "config.json").write_text('{"model_type": "siglip2"}')
        assert same(tokenizer, Tokenizer.load(tmp_path / "saved"))


class TestClip:
    def test_what_the_files_leave_open(self, folder):
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.length, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (77, 523, 524, 524)
        assert tokenizer.vocab_size == 525
        assert Tokenizer.load(folder / "vocab.json", length=9, pad_id=3)([""])[0].tolist() == [523, 524] + [3] * 7
        (folder / "tokenizer_config.json").write_text('{"model_max_length": 5, "pad_token": {"content": "!"}}')
        assert Tokenizer.load(folder)(["a a a a a", ""]).tolist() == [[523, 320, 320, 320, 524], [523, 524, 0, 0, 0]]

    def test_special_tokens_map(self, folder):
        (folder / "special_tokens_map.json").write_text('{"pad_token": "cat</w>"}')
        assert Tokenizer.load(folder).pad_id == Tokenizer.load(folder).backend.token_to_id("cat</w>")

    def test_openai_vocabulary(self, folder, tmp_path):
        """Built from the merges alone, in OpenAI's order, padded with 0."""
        merges = (folder / "merges.txt").read_text()
        for name, data in (("txt", merges.encode()), ("txt.gz", gzip.compress(merges.encode()))):
            place = tmp_path / name
            place.mkdir()
            (place / f"bpe_simple_vocab_16e6.{name}").write_bytes(data)
            tokenizer = Tokenizer.load(place)
            vocabulary = tokenizer.backend.get_vocab()
            # Facts of the published vocabulary: these symbols and words come first there too.
            assert [vocabulary[token] for token in ("!", '"', "a", "a</w>")] == [0, 1, 64, 320]
            assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.length) == (523, 524, 0, 77)
            assert len(vocabulary) == 256 + 256 + 11 + 2
            other = Tokenizer.load(folder, pad_id=0)
            names = [other.backend.id_to_token(i) for i in other(["they're the Cats!"])[0]]
            assert [tokenizer.backend.id_to_token(i) for i in tokenizer(["they're the Cats!"])[0]] == names
            tokenizer.save(place / "saved")
            assert same(tokenizer, Tokenizer.load(place / "saved"))
            assert "pad_token" not in json.loads((place / "saved" / "tokenizer_config.json").read_text())

    def test_cut_texts_keep_their_end(self, folder):
        tokenizer = Tokenizer.load(folder, length=6)
        got = tokenizer(["a " * 50, "a a a a", "a a a a a"])
        assert got.tolist() == [[523, 320, 320, 320, 320, 524]] * 3

    def test_damage(self, folder):
        (folder / "vocab.json").write_text('{"a": 0}')
        with pytest.raises(UserError, match=r"vocab.json is not a vocabulary of CLIP: it lacks <\|startoftext\|>"):
            Tokenizer.load(folder)
        (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
        with pytest.raises(UserError, match="does not fit its merges"):
            Tokenizer.load(folder)
        (folder / "vocab.json").write_text("{")
        with pytest.raises(UserError, match="is not JSON"):
            Tokenizer.load(folder)
        (folder / "vocab.json").write_text("[]")
        with pytest.raises(UserError, match="must hold an object"):
            Tokenizer.load(folder)
        (folder / "merges.txt").write_text("#version\na b c\n")
        with pytest.raises(UserError, match="two symbols a line, got 'a b c'"):
            Tokenizer.load(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
            Tokenizer.load(folder)


def characters(folder: Path, unknown: str) -> None:
    """A `tokenizer.json` of single characters with T5's or Gemma's special tokens and no post-processor."""
    special = ["<pad>", "</s>", "<unk>"] if unknown == "t5" else ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *map(chr, range(32, 127))]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.save(str(folder / "tokenizer.json"))


class TestSiglip:
    def test_version_1_is_cleaned(self, tmp_path):
        characters(tmp_path, "t5")
        settings = {
            "tokenizer_class": "SiglipTokenizer",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "add_eos_token": True,
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = Tokenizer.load(tmp_path)
        assert (tokenizer.length, tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (64, 1, 1, None)
        for text in (f"  A {string.punctuation}\t\n Photo,  of É ", "x" + string.printable, "", "..."):
            clean = " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
            want = [tokenizer.backend.token_to_id(c) or 2 for c in clean][:63]
            assert tokenizer([text])[0].tolist() == want + [1] * (64 - len(want))

    def test_version_2_is_written_lower(self, tmp_path):
        characters(tmp_path, "gemma")
        (tmp_path / "config.json").write_text('{"model_type": "siglip", "text_config": {"max_position_embeddings": 7}}')
        settings = {"tokenizer_class": "GemmaTokenizerFast", "add_bos_token": False, "add_eos_token": True}
        settings |= {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "model_max_length": 1e30}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = Tokenizer.load(tmp_path)
        lower = [tokenizer.backend.token_to_id(c) for c in "a, b"]
        assert tokenizer(["A, B"]).tolist() == [[*lower, 1, 0, 0]]
        assert (tokenizer.length, tokenizer.bos_id, tokenizer.eos_id) == (7, None, 1)
        assert Tokenizer.load(GOLDEN / "siglip2").length == 64
        # Gemma itself, of no SigLIP model, is left as it is.
        (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
        assert Tokenizer.load(tmp_path, length=7)(["A"])[0, 0] == tokenizer.backend.token_to_id("A")

    def test_sentencepiece_alone_is_an_error(self, tmp_path):
        (tmp_path / "spiece.model").write_bytes(b"\n")
        with pytest.raises(UserError, match=r"as spiece.model only, which needs the sentencepiece package"):
            Tokenizer.load(tmp_path)


class TestWords:
    captions = ("A red three above a blue seven.", "a blue two", "the Blue zero, alone")

    def test_ids(self):
        tokenizer = Tokenizer.train_words(self.captions, 8)
        order = [
            "<pad>",
            "<unk>",
            "a",
            "blue",
            ",",
            ".",
            "above",
            "alone",
            "red",
            "seven",
            "the",
            "three",
            "two",
            "zero",
        ]
        vocabulary = {token: i for i, token in enumerate([*order, "<bos>", "<eos>"])}
        assert tokenizer.backend.get_vocab() == vocabulary and tokenizer.vocab_size == 16
        assert tokenizer(["A blue dog.", "", "a " * 9]).tolist() == [
            [14, 2, 3, 1, 5, 15, 0, 0],
            [14, 15, 0, 0, 0, 0, 0, 0],
            [14, 2, 2, 2, 2, 2, 2, 15],
        ]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (14, 15, 0)

    def test_saved_and_loaded(self, tmp_path):
        tokenizer = Tokenizer.train_words(self.captions, 8)
        tokenizer.save(tmp_path)
        assert same(tokenizer, Tokenizer.load(tmp_path))
        assert Tokenizer.load(tmp_path, length=5)(["a blue two above"]).shape == (1, 5)

    def test_most_frequent(self):
        tokenizer = Tokenizer.train_words(self.captions, 8, max_words=2)
        assert set(tokenizer.backend.get_vocab()) == {"<pad>", "<unk>", "a", "blue", "<bos>", "<eos>"}

    @pytest.mark.parametrize(
        ("captions", "options", "message"),
        [
            ("a cat", {}, "captions must be a list"),
            (["a", 3], {}, "captions must be a list"),
            ([], {}, "no words: got 0 texts"),
            ([" "], {}, "no words"),
            (["a"], {"max_words": 0}, "max_words"),
            (["a"], {"length": 2}, "length must be at least 3, got 2"),
        ],
    )
    def test_wrong_arguments(self, captions, options, message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.train_words(captions, **{"length": 8, **options})


class TestArguments:
    tokenizer = Tokenizer.train_words(["a cat"], 5)

    def test_texts(self):
        assert self.tokenizer([]).shape == (0, 5) and self.tokenizer([]).dtype == np.int32
        assert self.tokenizer(("a", "cat")).shape == (2, 5)
        assert self.tokenizer.decode(self.tokenizer(["a cat"])[0]) == "a cat"
        with pytest.raises(ValueError, match="list of strings, got the string 'a cat'"):
            self.tokenizer("a cat")
        with pytest.raises(ValueError, match=r"texts\[1\] must be a string, got NoneType None"):
            self.tokenizer(["a", None])

    def test_sides(self):
        backend = Backend.from_str(self.tokenizer.backend.to_str())
        left = Tokenizer(backend, length=5, pad_id=0, pad_side="left")
        assert left(["cat"])[0].tolist() == [0, 0, *self.tokenizer(["cat"])[0, :3]]
        with pytest.raises(ValueError, match="pad_side"):
            Tokenizer(backend, length=5, pad_id=0, pad_side="up")
        for pad_id in (-1, 99):
            with pytest.raises(ValueError, match=f"pad_id must be in the vocabulary of 6, got {pad_id}"):
                Tokenizer(backend, length=5, pad_id=pad_id)

    def test_folders(self, tmp_path):
        with pytest.raises(UserError, match="no tokenizer in"):
            Tokenizer.load(tmp_path)
        characters(tmp_path, "t5")
        with pytest.raises(UserError, match="what to pad with"):
            Tokenizer.load(tmp_path)
        with pytest.raises(UserError, match="how long texts are"):
            Tokenizer.load(tmp_path, pad_id=0)
        assert Tokenizer.load(tmp_path, pad_id=0, length=4)(["ab"]).shape == (1, 4)
