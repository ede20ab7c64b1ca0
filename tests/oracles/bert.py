"""Writes `golden/lm-checkpoints/bert_*`: BERTs with and without a classifier.

Run by hand, with torch and transformers (5.24 was used):

    python tests/oracles/bert.py vectors tests/golden/lm-checkpoints

With these vectors it also checks that transformers reads what is saved here, in two steps, as neither environment needs
the packages of the other:

    python tests/oracles/bert.py save tests/golden/lm-checkpoints FOLDER     # with tokjax
    python tests/oracles/bert.py check tests/golden/lm-checkpoints FOLDER    # with torch and transformers

Arrays as of the other models there: `param/<name in the file>`, `input_ids`, `token_type_ids`, `attention_mask`,
`hidden_state_<i>`, and `pooled` or `logits`.
"""

import json
from pathlib import Path
import sys
import tempfile
from typing import Any

import numpy as np

try:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel
except ImportError:  # to save
    torch: Any = None

VOCABULARY, ENDS = 23, (9, 6, 3)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "attn_implementation": "eager",
}
NAMES = {"id2label": {0: "negative", 1: "neutral", 2: "positive"}}
CASES = {"bert_classifier": NAMES, "bert_pooled_tanh": {"hidden_act": "gelu_new", "type_vocab_size": 3}}


def model(fields: dict) -> Any:
    kind = BertForSequenceClassification if "id2label" in fields else BertModel
    made = kind(BertConfig(**{**SIZES, **fields})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "LayerNorm" in name and name.endswith("weight")
            wide = 1.0 if "embeddings" in name else 0.4
            parameter.copy_(torch.round((1 + 0.1 * noise if gain else wide * noise) * 64) / 64)
    return made


def arrays(made: Any) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    types = torch.randint(0, made.config.type_vocab_size, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, end in enumerate(ENDS):
        ids[row, end:], types[row, end:], mask[row, end:] = 0, 0, 0
    with torch.no_grad():
        out = made(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    results = {f"param/{name}": value for name, value in made.state_dict().items() if value.is_floating_point()}
    results |= {"input_ids": ids.int(), "token_type_ids": types.int(), "attention_mask": mask.int()}
    results |= {f"hidden_state_{i}": x for i, x in enumerate(out.hidden_states)}
    results |= {"logits": out.logits} if "logits" in out else {"pooled": out.pooler_output}
    return {name: value.numpy() for name, value in results.items()}


def vectors(golden: Path) -> None:
    for name, fields in CASES.items():
        made = model(fields)
        config = {k: v for k, v in made.config.to_diff_dict().items() if not k.startswith("transformers")}
        text = json.dumps({**config, **SIZES, "architectures": [type(made).__name__]}, indent=1).encode()
        np.savez_compressed(golden / f"{name}.npz", **arrays(made), config_json=np.frombuffer(text, np.uint8))


def save(golden: Path, folder: Path) -> None:
    from safetensors.numpy import save_file

    import tokjax

    for name in CASES:
        file = np.load(golden / f"{name}.npz")
        with tempfile.TemporaryDirectory() as there:
            tensors = {key.removeprefix("param/"): file[key] for key in file if key.startswith("param/")}
            save_file(tensors, Path(there) / "model.safetensors")
            (Path(there) / "config.json").write_bytes(file["config_json"].tobytes())
            tokjax.save(tokjax.load(there), folder / name)


def check(golden: Path, folder: Path) -> None:
    for name, fields in CASES.items():
        file = np.load(golden / f"{name}.npz")
        kind = BertForSequenceClassification if "id2label" in fields else BertModel
        made, report = kind.from_pretrained(folder / name, output_loading_info=True)
        assert not any(report.values()), report
        assert made.config.id2label == fields.get("id2label", made.config.id2label)
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.no_grad():
            out = made.eval()(**{key: torch.tensor(file[key]).long() for key in names})
        found, wanted = (out.logits, file["logits"]) if "logits" in out else (out.pooler_output, file["pooled"])
        difference = np.abs(found.numpy() - wanted).max()
        print(name, f"{difference:.1e}")
        assert difference < 2e-6


if __name__ == "__main__":
    {"vectors": vectors, "save": save, "check": check}[sys.argv[1]](*map(Path, sys.argv[2:]))
