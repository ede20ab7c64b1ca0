"""Writes `golden/lm-checkpoints/t5_*`: T5 1.0 (ReLU, tied head) and 1.1, with texts that transformers goes on with.

Run by hand, with torch and transformers 4 (5 builds T5 models whose head is always tied):

    python tests/oracles/t5.py tests/golden/lm-checkpoints

Arrays as of the other models there; `generate/<how>_ids` are new tokens without the start, padded with 0, and
`generate/beam<K>_<length penalty>_scores` the scores of the K texts of every row.
"""

import json
from pathlib import Path
import sys

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

NEW = 10


def model(**changes) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=16,
        d_model=12,
        d_kv=4,
        d_ff=20,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **changes,
    )
    made = T5ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():  # a tied table has one name
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "layer_norm" in name
            wide = 1.0 if name in ("shared.weight", "lm_head.weight") else 0.6
            parameter.copy_(torch.round((1 + 0.1 * noise if gain else wide * noise) * 64) / 64)
        made.lm_head.weight[1] *= 2  # texts shall end
    return made


def arrays(made: T5ForConditionalGeneration, searches: list[tuple[int, float]]) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 16, (4, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, end in enumerate((9, 5, 7, 1)):
        ids[row, end:], mask[row, end:] = 0, 0
    labels = torch.randint(1, 16, (4, 5), generator=generator)
    labels[2, 3:] = -100
    with torch.no_grad():
        out = made(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    state = made.state_dict()
    aliases = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    aliases += ["lm_head.weight"] * made.config.tie_word_embeddings
    results = {f"param/{name}": value for name, value in state.items() if name not in aliases}
    results |= {"input_ids": ids.int(), "attention_mask": mask.int(), "labels": labels.int()}
    results |= {"logits": out.logits, "loss": out.loss}
    for side in ("encoder", "decoder"):
        results |= {f"{side}_hidden_state_{i}": x for i, x in enumerate(out[f"{side}_hidden_states"])}
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "return_dict_in_generate": True}
    results["generate/greedy_ids"] = padded(made.generate(**given, do_sample=False, num_beams=1).sequences)
    for beams, penalty in searches:
        found = made.generate(
            **given, num_beams=beams, num_return_sequences=beams, length_penalty=penalty, output_scores=True
        )
        name = f"generate/beam{beams}_{penalty}"
        results[f"{name}_ids"] = padded(found.sequences).reshape(len(ids), beams, NEW)
        results[f"{name}_scores"] = found.sequences_scores.reshape(len(ids), beams)
    return {name: value.numpy() for name, value in results.items()}


def padded(sequences: torch.Tensor) -> torch.Tensor:
    """Without the start, and with 0 behind the end: transformers takes the end for filling where padding is 0."""
    new = torch.nn.functional.pad(sequences[:, 1:], (0, NEW + 1 - sequences.shape[1])).int()
    behind = (new == 1).cumsum(-1) - (new == 1).int() > 0
    return new.masked_fill(behind, 0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plain = model(feed_forward_proj="relu")
    gated = model(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    cases = {"t5_relu_tied": (plain, [(2, 2.0)]), "t5_gated_gelu_untied": (gated, [(3, 1.0), (4, 0.0)])}
    for name, (made, searches) in cases.items():
        config = {"model_type": "t5", **{k: v for k, v in made.config.to_diff_dict().items() if k != "architectures"}}
        config["tie_word_embeddings"] = made.config.tie_word_embeddings
        text = json.dumps(config, indent=1).encode()
        stored = arrays(made, searches)
        np.savez_compressed(folder / f"{name}.npz", **stored, config_json=np.frombuffer(text, np.uint8))
