"""Text as bytes: ids there and back, and what kind of byte each is."""

import json

import numpy as np
import pytest

from tokjax.data import bytes as by
from tokjax.data.bytes import CLASSES, ByteTokenizer, byte_classes, decode, encode, show, to_ids
from tokjax.errors import UserError

TEXTS = ["", "a", "Grüße, Ωμέγα", "你好 नमस्ते", "🙂 ok\n", "x" * 40]


def names(text) -> list[str]:
    return [CLASSES[index] for index in byte_classes(to_ids(text))]


class TestEncode:
    def test_bytes_are_shifted_and_closed(self):
        assert encode(["ab", ""], 5).tolist() == [[100, 101, 1, 0, 0], [1, 0, 0, 0, 0]]
        assert encode(["ab"], 5).dtype == np.int32 and encode([], 5).shape == (0, 5)

    def test_a_long_text_keeps_its_end_of_sequence(self):
        assert encode(["abcdef"], 4).tolist() == [[100, 101, 102, 1]]
        assert encode(["abcdef"], 1).tolist() == [[1]]

    @pytest.mark.parametrize("text", TEXTS)
    def test_there_and_back(self, text):
        assert decode(encode([text], 64)[0]) == text

    def test_a_character_cut_through_is_replaced(self):
        assert decode(encode(["aé"], 3)[0]) == "a\ufffd"

    def test_bytes_that_are_no_utf8(self):
        ids = encode([b"a\xff\x00b"], 6)
        assert ids.tolist() == [[100, 258, 3, 101, 1, 0]]
        assert decode(ids[0]) == "a\ufffd\x00b"
        assert decode(encode(["a\ud800"], 4)[0]) == "a?"

    def test_ids_that_are_no_bytes_are_left_out(self):
        assert decode(np.array([0, 1, 2, 100, 259, 383, 5000, -100])) == "a"

    def test_show_marks_what_is_no_text(self):
        assert show(np.array([100, 258, 101, 257, 1, 198, 172, 1, 0, 300])) == "a<0>b<1></s>é</s>"
        assert show(np.array([], int)) == ""

    def test_errors(self):
        with pytest.raises(ValueError, match="texts must be a list"):
            encode("abc", 4)
        with pytest.raises(ValueError, match=r"texts\[1\] must be a string or bytes, got int 3"):
            encode(["a", 3], 4)
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            encode(["a"], 0)
        with pytest.raises(ValueError, match=r"ids must be integers \[n\], got int64 \[1, 1\]"):
            decode(np.array([[5]]))


class TestClasses:
    def test_ascii(self):
        assert (
            names("aZ0 \t.~\x00\x7f")
            == ["letter"] * 2 + ["digit"] + ["space"] * 2 + ["punctuation"] * 2 + ["control"] * 2
        )

    @pytest.mark.parametrize(
        ("text", "script", "count"),
        [
            *[("é", "latin", 2), ("Ω", "greek", 2), ("ж", "cyrillic", 2), ("ש", "hebrew", 2), ("ع", "arabic", 2)],
            *[("म", "devanagari", 3), ("ก", "thai", 3), ("か", "kana", 3), ("한", "hangul", 3), ("世", "han", 3)],
            *[("€", "other", 3), ("🙂", "other", 4), ("𠀀", "han", 4)],
        ],
    )
    def test_characters_of_several_bytes(self, text, script, count):
        character = [f"{script} first"] + [f"{script} later"] * (count - 1)
        assert names(f"a{text}{text}.") == ["letter", *character, *character, "punctuation"]

    def test_every_character_agrees_with_python(self):
        points = np.random.default_rng(0).integers(0x80, 0x110000, 3000)
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        classes = byte_classes(to_ids(text))
        lengths = [len(character.encode()) for character in text]
        firsts = np.cumsum([0, *lengths[:-1]])
        assert np.array_equal(np.flatnonzero([CLASSES[c].endswith("first") for c in classes]), firsts)
        assert not (classes == CLASSES.index("broken")).any()

    @pytest.mark.parametrize(
        "data", [b"\xc3", b"\xa9", b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8"]
    )
    def test_what_is_no_utf8_is_broken(self, data):
        with pytest.raises(UnicodeDecodeError):
            data.decode()
        assert names(b"a" + data + b"b") == ["letter", *["broken"] * len(data), "letter"]

    def test_what_is_no_byte(self):
        ids = np.array([[0, 1, 2, 258, 248, 247], [259, 383, 100, 0, 0, 0]])
        wanted = [["pad", "special", "special", "sentinel", "sentinel", "broken"], ["special"] * 2 + ["letter"]]
        found = [[CLASSES[c] for c in row] for row in byte_classes(ids)]
        assert found == [wanted[0], wanted[1] + ["pad"] * 3]

    def test_rows_do_not_meet(self):
        ids = to_ids("世世").reshape(2, 3)
        assert byte_classes(ids).tolist() == [byte_classes(ids[0]).tolist()] * 2
        assert names(b"\xe4\xb8")[-1] == "broken"
        with pytest.raises(ValueError, match="ids must be integers"):
            byte_classes(np.zeros(3))


class TestTokenizer:
    def test_interface(self):
        tokenizer = ByteTokenizer(6)
        assert tokenizer(["ab"]).tolist() == encode(["ab"], 6).tolist()
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, None, 1, 384)
        assert tokenizer.decode(tokenizer(["ab"])[0]) == "ab"
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            ByteTokenizer(0)

    def test_save_and_load(self, tmp_path):
        ByteTokenizer(17).save(tmp_path)
        assert ByteTokenizer.load(tmp_path).length == 17
        assert ByteTokenizer.load(tmp_path, length=9).length == 9

    def test_load_tells_what_is_wrong(self, tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            ByteTokenizer.load(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
        with pytest.raises(UserError, match="tokenizer_class 'T5Tokenizer'"):
            ByteTokenizer.load(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "ByT5Tokenizer", "model_max_length": 1e30})
        )
        with pytest.raises(UserError, match="give length"):
            ByteTokenizer.load(tmp_path)


def test_sentinels_are_no_utf8():
    assert by.FIRST_SENTINEL == 258 and by.LAST_SENTINEL == 248
    for sentinel in range(by.LAST_SENTINEL, by.FIRST_SENTINEL + 1):
        assert decode(np.array([sentinel])) == "\ufffd"
