"""A decoder (LLaMA's architecture) trained from scratch on a text, with questions about what stands in its prompt.

python -m tokjax.main --config=configs/decoder_text.py --workdir=runs/decoder_text
python -m tokjax.main --config=configs/decoder_text.py --config.data.path='FOLDER/english_news_{split}.txt' \
    --workdir=runs/decoder_news

Without a path it reads the text that is embedded in the package; about a quarter of an hour on two cores. Going on with
prompts of one's own, and what half of the prompt's tokens are worth behind the second block:

python -m tokjax.main --config=configs/decoder_text.py --workdir=runs/decoder_text --mode=generate \
    --config.generate.prompts="('Last summer, my',)" --config.generate.max_tokens=100
python -m tokjax.main --config=configs/decoder_text.py:small,fastv --workdir=runs/decoder_text --mode=eval

Bytes in place of a learned vocabulary are `--config.vocabulary.kind=bytes`. Real sizes, on a folder of text files:

python -m tokjax.main --config=configs/decoder_text.py:125m --config.data.path=FOLDER --workdir=runs/decoder_125m
"""

import ml_collections

from tokjax.tasks import causal_lm
from tokjax.tasks.causal_lm import model_config

# width, hidden, depth, heads, key heads, head width: GPT-3's and LLaMA-3.2's proportions, with gated MLPs
REAL = {
    "125m": (768, 2048, 12, 12, 12, 64),
    "350m": (1024, 2816, 24, 16, 16, 64),
    "1b": (2048, 8192, 16, 32, 8, 64),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: a size, "tiny", "small", "125m", "350m" or "1b"; with ",NAME" behind it a reducer that is on in `eval`."""
    size, _, reducer = (arg or "small").partition(",")
    if size not in ("tiny", "small", *REAL):
        raise ValueError(f"{arg!r}: must be one of tiny, small, {', '.join(REAL)}, with or without a reducer behind it")
    config = causal_lm.default_config()
    config.title = f"A decoder of size {size}"
    if reducer:
        config.reduce = ml_collections.ConfigDict({"name": reducer})
    (real if size in REAL else {"small": small, "tiny": tiny}[size])(config, size)
    return config


def small(config: ml_collections.ConfigDict, size: str) -> None:
    """128 tokens, four blocks of width 64, many questions of few words."""
    sizes = {"width": 64, "hidden": 192, "depth": 4, "heads": 4, "kv_heads": 2, "head_width": 16}
    config.model = model_config("", **sizes, tied=True, init_std=0.1)  # at 0.02 so narrow a model is slow to look back
    config.data.length, config.data.prompt, config.data.test_subset = 128, 96, 200
    config.data.facts.count, config.data.facts.questions, config.data.facts.words = 6, 20, 24
    config.batch_size = 16
    config.train.total_steps = 2000
    config.train.log_every = 100
    config.train.eval_every = config.train.checkpoint_every = 500
    config.train.optimiser.lr = 3e-3
    config.train.optimiser.warmup_steps = 100
    config.train.optimiser.weight_decay = 0.1
    config.train.optimiser.b2 = 0.95


def tiny(config: ml_collections.ConfigDict, size: str) -> None:
    """80 tokens, two blocks of width 32: seconds, to see that everything runs."""
    small(config, size)
    config.model = model_config("", width=32, hidden=64, depth=2, heads=2, kv_heads=1, head_width=16, tied=True)
    config.vocabulary.size = 600
    config.data.length, config.data.prompt, config.data.test_subset = 80, 64, 8
    config.data.facts.count, config.data.facts.questions, config.data.facts.test_count = 2, 1, 8
    config.batch_size = config.eval_batch_size = 8
    config.train.total_steps, config.train.log_every = 20, 5
    config.train.eval_every = config.train.checkpoint_every = 10
    config.train.optimiser.warmup_steps = 2
    config.generate.max_tokens = 16
    config.bench.repeats, config.bench.seconds = 2, 0.05


def real(config: ml_collections.ConfigDict, size: str) -> None:
    """2,048 tokens a text and half a million a step, with GPT-3's learning rates (Brown et al. 2020, table 2.1)."""
    width, hidden, depth, heads, kv_heads, head_width = REAL[size]
    shape = {"width": width, "hidden": hidden, "depth": depth, "heads": heads, "kv_heads": kv_heads}
    config.model = model_config("", **shape, head_width=head_width, tied=True, dtype="bfloat16", scan=True)
    config.vocabulary.size = 32_000
    config.data.length, config.data.prompt = 2048, 1536
    config.data.facts.share, config.data.facts.count, config.data.facts.questions = 0.1, 24, 8
    config.data.test_subset = 1000
    config.batch_size = 256
    config.eval_batch_size = 16
    config.train.total_steps = 20_000
    config.train.eval_every = config.train.checkpoint_every = 1000
    config.train.optimiser.accumulate = 16
    config.train.optimiser.lr = {"125m": 6e-4, "350m": 3e-4, "1b": 2e-4}[size]
    config.train.optimiser.final_lr = config.train.optimiser.lr / 10
    config.train.optimiser.warmup_steps = 1000
    config.train.optimiser.weight_decay = 0.1
    config.train.optimiser.b2 = 0.95
