"""Tokenizers of decoders: prompts as they are, OPT's files, chat templates."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

import tokjax
from tokjax.errors import UserError
from tokjax.models.decoder import DecoderConfig
from tokjax.pretrained.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'none' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
VOCABULARY = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz[]", "Ġ"]


def backend(end=False) -> Backend:
    made = Backend(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(VOCABULARY[:3])
    frame = "<s> $A </s>" if end else "<s> $A"
    made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


def tokenizer(end=False, **fields) -> Tokenizer:
    return Tokenizer(backend(end), length=8, pad_id=0, bos_id=1, eos_id=2 if end else None, **fields)


@pytest.mark.parametrize("end", [False, True])
def test_prompts_are_neither_padded_nor_cut_nor_ended(end):
    made = tokenizer(end)
    assert made.prompts(["abc", "", "abcdefghij", "<s>a"]) == [
        [1, 3, 4, 5],
        [1],
        [1, *range(3, 13)],
        [1, 3],
    ]
    assert made.prompts(["a"], special=False) == [[3]]
    assert made(["abcdefghij"]).shape == (1, 8)  # as before


def test_strings_with_a_model():
    cfg = DecoderConfig(vocab_size=31, width=8, hidden=8, depth=1, heads=2, kv_heads=1, head_width=4, max_length=100)
    model = tokjax.build(cfg, preprocess=tokenizer())
    going = model.begin(["abc", "a"], max_tokens=2)
    np.testing.assert_array_equal(going.state.groups[0].count(), [4, 2])


def test_chats(tmp_path, monkeypatch):
    tokens = {"bos_token": "<s>"}
    made = tokenizer(template=TEMPLATE, tokens=tokens)
    made.save(tmp_path)
    made = Tokenizer.load(tmp_path)
    assert made.template == TEMPLATE
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(UserError, match="needs the jinja2 package"):
            made.chat([])
    with pytest.raises(UserError, match="has no chat template"):
        tokenizer().chat([])
    text = made.chat([{"role": "user", "content": "hi"}])
    assert text == "<s>[user]hi[assistant]"
    assert made.chat([{"role": "user", "content": "hi"}], answer=False) == "<s>[user]hi"
    assert made.prompts([text])[0][:3] == [1, VOCABULARY.index("["), VOCABULARY.index("u")]
    with pytest.raises(UserError, match="does not take these messages: no none"):
        made.chat([{"role": "none", "content": ""}])
    with pytest.raises(UserError, match="does not take these messages"):
        Tokenizer.load(_with_template(tmp_path, "{% if %}")).chat([])


def _with_template(folder, template):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    listed = [{"name": "tools", "template": ""}, {"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": listed}))
    return folder


def test_files_of_opt(tmp_path):
    """A vocabulary and merges that are not CLIP's; the start of a text is its end's token."""
    merges = [("a", "b"), ("Ġ", "c")]
    vocabulary = ["<s>", "<pad>", "</s>", *"abc", "Ġ", "ab", "Ġc"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    settings = {"add_bos_token": True, "bos_token": {"content": "</s>"}, "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    made = Tokenizer.load(tmp_path, length=6)
    assert made.prompts(["ab c", ""]) == [[2, 7, 8], [2]]
    np.testing.assert_array_equal(made(["ab c"]), [[2, 7, 8, 1, 1, 1]])
    assert made.decode([2, 7, 8, 2]) == "ab c"
