"""LLaMA and the decoders that are built like it: Mistral, Qwen2, Gemma, Gemma 2 (Hugging Face's `model_type`s).

Source: transformers `models/{llama,mistral,qwen2,gemma,gemma2}`. They share names and layout, and differ in biases,
windows and, for Gemma, in norms, activation and a factor of the embeddings; Gemma 2 also has norms on what its branches
give, soft caps, and windows in every second layer. Rotary settings stand in `rope_parameters` (transformers 5), or as
`rope_theta` and `rope_scaling` beside the others.
"""

from collections.abc import Callable
from typing import Any

from tokjax.errors import UserError
from tokjax.models.decoder import DecoderConfig
from tokjax.pretrained.families.base import Config, Family, Json, Measured, Stated, key_of
from tokjax.pretrained.names import Readable, View, table

_LAYER = "model.layers.*"
_ROWS = table(
    ("array", "embedding", "model.embed_tokens.weight"),
    ("norm", "blocks.*.norm1", f"{_LAYER}.input_layernorm"),
    ("linear", "blocks.*.attn.q", f"{_LAYER}.self_attn.q_proj"),
    ("linear", "blocks.*.attn.kv", f"{_LAYER}.self_attn.k_proj", f"{_LAYER}.self_attn.v_proj"),
    ("linear", "blocks.*.attn.proj", f"{_LAYER}.self_attn.o_proj"),
    ("norm", "blocks.*.norm2", f"{_LAYER}.post_attention_layernorm"),
    ("linear", "blocks.*.mlp.fc1", f"{_LAYER}.mlp.up_proj"),
    ("linear", "blocks.*.mlp.fc2", f"{_LAYER}.mlp.down_proj"),
    ("norm", "norm", "model.norm"),
    ("linear", "head", "lm_head"),
    # What none of these models has, for those of our own that no library knows.
    ("norm", "blocks.*.ls1", f"{_LAYER}.attention_output_layernorm"),
    ("norm", "blocks.*.ls2", f"{_LAYER}.mlp_output_layernorm"),
    ("norm", "norm_kv", "model.norm_swiftkv"),
    ("array", "positions", "model.embed_positions.weight"),
    ("linear", "project_in", "model.project_in"),
    ("linear", "project_out", "model.project_out"),
)
_GATED = table(("linear", "blocks.*.mlp.fc1", f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"))
_GEMMA2 = table(
    ("norm", "blocks.*.ls1", f"{_LAYER}.post_attention_layernorm"),
    ("norm", "blocks.*.norm2", f"{_LAYER}.pre_feedforward_layernorm"),
    ("norm", "blocks.*.ls2", f"{_LAYER}.post_feedforward_layernorm"),
)
_TANH: Json = {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}  # Gemma means the first by both
_ACTIVATIONS: dict[str, Json] = {"gemma": _TANH, "gemma2": _TANH}
_SILU: Json = {"silu": "swiglu"}
_SLIDING, _FULL = "sliding_attention", "full_attention"

# What each class of transformers takes where its configuration is silent.
_DEFAULTS: dict[str, Json] = {
    "llama": {"eps": 1e-6, "theta": 1e4, "positions": 2048, "eos": 2, "bos": 1, "tied": False, "heads": 32},
    "mistral": {"eps": 1e-6, "theta": 1e4, "positions": 131072, "eos": 2, "bos": 1, "tied": False, "heads": 32},
    "qwen2": {"eps": 1e-6, "theta": 1e4, "positions": 32768, "eos": None, "bos": None, "tied": False, "heads": 32},
    "gemma": {"eps": 1e-6, "theta": 1e4, "positions": 8192, "eos": 1, "bos": 2, "tied": True, "heads": 16},
    "gemma2": {"eps": 1e-6, "theta": 1e4, "positions": 8192, "eos": 1, "bos": 2, "tied": True, "heads": 8},
}
# Fields by which each is told from the others.
_FIELDS: dict[str, Json] = {
    "llama": {"feed": "swiglu", "norm": "rms"},
    "mistral": {"feed": "swiglu", "norm": "rms"},
    "qwen2": {"feed": "swiglu", "norm": "rms", "qkv_bias": True},
    "gemma": {"feed": "geglu", "norm": "rms_offset", "embed_scaled": True},
    "gemma2": {"feed": "geglu", "norm": "rms_offset", "embed_scaled": True, "norm_order": "both"},
}


def prefixed(prefix: str, parts: tuple[str, ...]) -> Callable[[Json, Readable], Readable]:
    """A view in which tensors of these parts have the prefix, for files of a backbone alone."""

    def view(config: Json, tensors: Readable) -> Readable:
        if any(name.startswith(prefix) for name in tensors):
            return tensors
        return View(tensors, lambda name: prefix + name if name.startswith(parts) else name)

    return view


def token_ids(value: Any) -> tuple[int, ...]:
    """One id or several, as configurations have them; what no token is (None, -1) is left out."""
    return tuple(i for i in (value if isinstance(value, list | tuple) else [value]) if i is not None and i >= 0)


def first_id(value: Any) -> int | None:
    """One id, or none; the first of several."""
    return next(iter(token_ids(value)), None)


def _rope(config: Json, default: float) -> Json:
    """Fields of rotary positions, from either layout.

    Raises:
        UserError: a kind of scaling that is not known here.
    """
    new = config.get("rope_parameters") or {}
    said = new or config.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in said.values()):
        raise UserError("rope_parameters differ by layer, which is not known here.")
    kind = said.get("rope_type", said.get("type", "default"))
    known = {"default": "none", "linear": "linear", "llama3": "llama3"}
    if kind not in known:
        raise UserError(f"rope_type = {kind!r} is not known here; allowed are {', '.join(known)}.")
    fields = {
        "rope_base": float(new.get("rope_theta") or config.get("rope_theta") or default),
        "rope_scaling": known[kind],
    }
    if kind != "default":
        fields["rope_factor"] = said["factor"]
    if kind == "llama3":
        fields |= {
            "rope_low": said["low_freq_factor"],
            "rope_high": said["high_freq_factor"],
            "rope_length": said["original_max_position_embeddings"],
        }
    return fields


def _window(name: str, config: Json, depth: int) -> Json:
    """Fields of the sliding window."""
    size, kinds = config.get("sliding_window"), config.get("layer_types")
    if name == "llama" or size is None or (name == "qwen2" and not config.get("use_sliding_window", False)):
        return {}
    if name == "mistral":
        return {"window": size}
    if kinds is not None:
        narrow = [layer for layer, kind in enumerate(kinds) if kind == _SLIDING]
    elif name == "qwen2":
        narrow = list(range(config.get("max_window_layers", 28), depth))
    else:
        narrow = list(range(0, depth, 2))
    return {"window": size, "window_layers": tuple(narrow)} if narrow else {}


def _configure(name: str) -> Callable[[Json, Readable], DecoderConfig]:
    usual = _DEFAULTS[name]

    def configure(config: Json, tensors: Readable) -> DecoderConfig:
        measured = Measured({**_ROWS, **_GATED}, tensors)
        stated = Stated(config, measured)
        vocab_size, width = measured.shape("embedding", 2)
        depth, heads = stated.size("num_hidden_layers", "depth"), stated.get("num_attention_heads", usual["heads"])
        positions = stated.get("max_position_embeddings", usual["positions"])
        fields = {**_FIELDS[name], **_rope(config, usual["theta"]), **_window(name, config, depth)}
        if name != "qwen2":
            bias = stated.get("attention_bias", False)
            fields |= {"qkv_bias": bias, "proj_bias": bias}
        if name == "llama":
            fields["mlp_bias"] = stated.get("mlp_bias", False)
        if name == "gemma2":
            fields |= {
                "query_scale": stated.get("query_pre_attn_scalar", 256) ** -0.5,
                "soft_cap": config.get("attn_logit_softcapping", 50.0),
                "logit_cap": config.get("final_logit_softcapping", 30.0),
            }
        activation = "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"
        fields["feed"] = stated.choice(activation, key_of(_activations(name), fields["feed"]), _activations(name))
        return DecoderConfig(
            vocab_size=vocab_size,
            length=min(positions, 1024),
            max_length=positions,
            width=width,
            hidden=stated.size("intermediate_size", "hidden"),
            depth=depth,
            heads=heads,
            kv_heads=stated.get("num_key_value_heads", 8 if name == "mistral" else heads),
            head_width=stated.get("head_dim", 256 if name.startswith("gemma") else width // heads),
            norm_eps=stated.get("rms_norm_eps", usual["eps"]),
            tied=stated.get("tie_word_embeddings", usual["tied"]) or "lm_head.weight" not in tensors,
            bos_id=first_id(config.get("bos_token_id", usual["bos"])),
            eos_ids=token_ids(config.get("eos_token_id", usual["eos"])),
            pad_id=first_id(config.get("pad_token_id", 0 if name.startswith("gemma") else None)),
            **fields,
        )

    return configure


def _activations(name: str) -> Json:
    return _ACTIVATIONS.get(name, _SILU)


def _expresses(name: str) -> Callable[[Config], bool]:
    def expresses(model: Config) -> bool:
        if not isinstance(model, DecoderConfig):
            return False
        plain = {"norm_order": "pre", "embed_scaled": False, "position": "rope", "embed_width": None, "kv_layers": None}
        wanted = {**plain, "mlp_bias": False, **_FIELDS[name]}
        if name == "llama":
            del wanted["mlp_bias"]
        always = name in ("mistral", "gemma2")  # have a window
        fits = (model.window is not None) if always else (model.window is None or name == "qwen2")
        narrow = {"mistral": None, "gemma2": tuple(range(0, model.depth, 2))}
        fits &= model.window_layers == narrow[name] if name in narrow else True
        fits &= model.proj_bias == (model.qkv_bias and name != "qwen2")
        fits &= name != "mistral" or not model.qkv_bias
        if name != "gemma2":
            fits &= model.soft_cap is None and model.logit_cap is None and model.query_scale is None
        return fits and all(getattr(model, field) == value for field, value in wanted.items())

    return expresses


def describe_rope(model: DecoderConfig) -> Json:
    """The inverse of `_rope`, in both layouts."""
    scaling: Json = {}
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": model.rope_low,
            "high_freq_factor": model.rope_high,
            "original_max_position_embeddings": model.rope_length,
        }
    return {
        "rope_theta": model.rope_base,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": model.rope_base},
    }


def _describe(name: str, architecture: str) -> Callable[[DecoderConfig, Any], Json]:
    def describe(model: DecoderConfig, preprocess: Any) -> Json:
        known: Json = {
            "architectures": [architecture],
            "model_type": name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.width,
            "intermediate_size": model.hidden,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_width,
            "max_position_embeddings": model.max_length,
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tied,
            "bos_token_id": model.bos_id,
            "eos_token_id": model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids) or None,
            "pad_token_id": model.pad_id,
            "attention_bias": model.qkv_bias,
            **describe_rope(model),
        }
        if name.startswith("gemma"):
            known |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
        else:
            known["hidden_act"] = "silu"
        if name == "llama":
            known["mlp_bias"] = model.mlp_bias
        else:
            known["sliding_window"] = model.window
        if name == "qwen2":
            layers = [_SLIDING if window is not None else _FULL for window in model.windows]
            first = layers.index(_SLIDING) if _SLIDING in layers else model.depth
            known |= {
                "use_sliding_window": model.window is not None,
                "max_window_layers": first,
                "layer_types": layers,
            }
        if name == "gemma2":
            known |= {
                "query_pre_attn_scalar": 256 if model.query_scale is None else model.query_scale**-2,
                "attn_logit_softcapping": model.soft_cap,
                "final_logit_softcapping": model.logit_cap,
                "layer_types": [_SLIDING if window is not None else _FULL for window in model.windows],
            }
        return known

    return describe


def _family(name: str, architecture: str) -> Family:
    return Family(
        name=name,
        side="hf",
        rows={**_ROWS, **_GEMMA2} if name == "gemma2" else _ROWS,
        configure=_configure(name),
        preprocess=lambda config, processor, model: None,
        describe=_describe(name, architecture),
        expresses=_expresses(name),
        view=prefixed("model.", ("embed_tokens.", "layers.", "norm.")),
        # A copy of a tied embedding, and a table of frequencies that old files have.
        ignored=r"lm_head\.weight|.*rotary_emb\.inv_freq",
        gated=_GATED,
        generates=True,
    )


HF_LLAMA = _family("llama", "LlamaForCausalLM")
HF_MISTRAL = _family("mistral", "MistralForCausalLM")
HF_QWEN2 = _family("qwen2", "Qwen2ForCausalLM")
HF_GEMMA = _family("gemma", "GemmaForCausalLM")
HF_GEMMA2 = _family("gemma2", "Gemma2ForCausalLM")
