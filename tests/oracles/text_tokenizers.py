"""Writes tests/golden/tokenizers: what published tokenizers make of a few texts, with small vocabularies of our own.

By hand, where transformers 5 is installed; nothing is downloaded:

    python tests/oracles/text_tokenizers.py

- `clip`: a folder with `vocab.json` and `merges.txt`, read by `CLIPTokenizer`.
- `siglip2`: a folder as the converted checkpoints have it, a Gemma tokenizer without a start token, and the ids of
  `Siglip2Tokenizer`, which writes lowercase first.

`ids.json` in each has the texts, the length and the ids, filled up and cut to it.
"""

import json
from pathlib import Path

from tokenizers import pre_tokenizers
import transformers

FOLDER = Path(__file__).parents[1] / "golden" / "tokenizers"
TEXTS = [
    "",
    "a photo of a cat.",
    "A  PHOTO\tof the\n other Cats!",
    "they're the cat's; it isn't 2024",
    "naïve café 猫 🐈 cafe\u0301",
    "the cat the cat the cat the cat the cat the cat",
    "a <|endoftext|> in the middle",
    "a-b_c, (d) #1 \"e\" 'f'",
]
CLIP_MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "ca t", "p h", "o t", "ph ot", "phot o</w>", "o f</w>", "' s</w>"]
GEMMA_MERGES = ["t h", "th e", "▁ the", "c a", "ca t", "▁ cat", "▁ a", "p h", "o t", "ph ot", "phot o", "o f"]


def clip() -> None:
    folder = FOLDER / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(m.replace(" ", "") for m in CLIP_MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *CLIP_MERGES]) + "\n", "utf-8")
    write(folder, transformers.CLIPTokenizer.from_pretrained(folder), 16)


def siglip2() -> None:
    folder = FOLDER / "siglip2"
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [*map(chr, range(33, 127)), *(merge.replace(" ", "") for merge in GEMMA_MERGES)]
    settings = {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [tuple(merge.split()) for merge in GEMMA_MERGES],
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
    }
    transformers.GemmaTokenizer(**settings).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": {"vocab_size": 512}}))
    write(folder, transformers.Siglip2Tokenizer(**settings), 20)


def write(folder: Path, tokenizer, length: int) -> None:
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length)["input_ids"]
    lines = ",\n".join(f"  {json.dumps(text)}: {json.dumps(row)}" for text, row in zip(TEXTS, ids, strict=True))
    (folder / "ids.json").write_text(f'{{"length": {length}, "ids": {{\n{lines}\n}}}}\n')


clip()
siglip2()
