"""MrT5: a byte-level encoder-decoder that learns to delete bytes after a few layers of its encoder.

Span corruption of bytes (ByT5's pre-training), from scratch on a small model:

python -m tokjax.main --config=configs/mrt5_text.py --workdir=runs/mrt5_text
python -m tokjax.main --config=configs/mrt5_text.py --config.data.path='FOLDER/english_news_{split}.txt' \
    --workdir=runs/mrt5_news

Without a path it reads the text that is embedded in the package. Another rate of deletion is
`--config.control.target=0.3`; no reducer at all, a ByT5, `:small-plain`; the deletion rates of other languages:

python -m tokjax.main --config=configs/mrt5_text.py --mode=eval --workdir=runs/mrt5_news \
    --config.data.path=FOLDER_OF_LANGUAGES --config.data.source=languages --config.data.test_split=all

Continued pre-training of a published ByT5, with the paper's settings (Kallini et al., ICLR 2025; 5,000 steps of 2^20
bytes on mC4 in 15 languages, one folder of `LANGUAGE.txt` files):

python -m tokjax.main --config=configs/mrt5_text.py:byt5-small --config.init=google/byt5-small \
    --config.data.path=FOLDER --workdir=runs/mrt5_small
"""

import ml_collections

from tokjax.tasks.byte_lm import default_config, model_config

PUBLISHED = ("byt5-small", "byt5-base", "byt5-large")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "small" (two cores), or a published size; "-plain" behind it: without a reducer."""
    name = arg or "small"
    size = name.removesuffix("-plain")
    if size not in ("small", *PUBLISHED):
        raise ValueError(f"{arg!r}: must be one of small, {', '.join(PUBLISHED)}, with or without -plain")
    config = default_config()
    config.title = "MrT5"
    config.train.optimiser.weight_decay = 0.0
    config.train.optimiser.clip_norm = 1.0
    layer = small(config) if size == "small" else published(config, size)
    if name == size:
        config.reduce = ml_collections.ConfigDict({"name": "mrt5", "layer": layer})
        config.control.target = 0.5
    else:
        config.title = "ByT5 with softmax1"
    return config


def small(config: ml_collections.ConfigDict) -> int:
    """128 bytes, four blocks and two, width 96: a few minutes. Gives the block before which bytes go."""
    config.model = model_config(
        "", width=96, hidden=256, heads=4, head_width=24, depth=4, decoder_depth=2, normaliser="softmax1"
    )
    config.data.length = 128
    config.data.corruption.mean_span = 5.0
    config.data.test_subset = 500
    config.batch_size = 32
    config.train.total_steps = 1500
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 500
    config.train.optimiser.lr = 2e-3
    config.train.optimiser.warmup_steps = 100
    config.control.k_i = 1e-3  # so much faster than published, as there are so many fewer steps
    config.control.k_p = 1.0
    return 1


def published(config: ml_collections.ConfigDict, size: str) -> int:
    """The paper's: 1,024 sequences of 1,024 bytes, learning rate 1e-4 falling to 0, no warm-up, no weight decay."""
    config.model = model_config(size, normaliser="softmax1", dropout=0.1)
    config.data.length = 1024
    config.data.source = "languages"
    config.data.balance = True
    config.data.test_subset = 16_000
    config.batch_size = 1024
    config.eval_batch_size = 64
    config.train.total_steps = 5000
    config.train.log_every = 10
    config.train.eval_every = config.train.checkpoint_every = 500
    config.train.optimiser.lr = 1e-4
    config.train.optimiser.accumulate = 16
    return 3
