"""MrT5: a byte-level encoder-decoder that learns to delete bytes after a few layers of its encoder.

Span corruption of bytes (ByT5's pre-training), from scratch on a small model:

python -m tokjax.main --config=configs/mrt5_text.py --workdir=runs/mrt5_text
python -m tokjax.main --config=configs/mrt5_text.py --config.data.path='FOLDER/english_news_{split}.txt' \
    --workdir=runs/mrt5_news

Without a path it reads the text that is embedded in the package. Another rate of deletion is
`--config.control.target=0.3`; no reducer at all, a ByT5, `:small-plain`; the deletion rates of other languages:

python -m tokjax.main --config=configs/mrt5_text.py --mode=eval --workdir=runs/mrt5_news \
    --config.data.path=FOLDER_OF_LANGUAGES --config.data.source=languages --config.data.test_split=all

MrT5 at three rates against what else shortens such an encoder, all trained alike (`:study-short`: minutes):

python -m tokjax.main --config=configs/mrt5_text.py:study --config.data.path='FOLDER/english_news_{split}.txt' \
    --config.study.languages=FOLDER_OF_LANGUAGES --workdir=runs/mrt5_study

Continued pre-training of a published ByT5, with the paper's settings (Kallini et al., ICLR 2025; 5,000 steps of 2^20
bytes on mC4 in 15 languages, one folder of `LANGUAGE.txt` files):

python -m tokjax.main --config=configs/mrt5_text.py:byt5-small --config.init=google/byt5-small \
    --config.data.path=FOLDER --workdir=runs/mrt5_small
"""

import ml_collections

from tokjax.tasks import byte_lm, byte_study
from tokjax.tasks.byte_lm import model_config

PUBLISHED = ("byt5-small", "byt5-base", "byt5-large")
RATES = (0.3, 0.5, 0.7)  # of deletion, in the study


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "small" or a published size, with "-plain" behind it without a reducer; "study" or "study-short"."""
    name = arg or "small"
    if name in ("study", "study-short"):
        return study(name == "study-short")
    size = name.removesuffix("-plain")
    if size not in ("small", *PUBLISHED):
        raise ValueError(f"{arg!r}: must be one of small, {', '.join(PUBLISHED)}, with or without -plain, study")
    config = byte_lm.default_config()
    config.title = "MrT5"
    config.train.optimiser.weight_decay = 0.0
    layer = small(config) if size == "small" else published(config, size)
    if name == size:
        config.reduce = ml_collections.ConfigDict({"name": "mrt5", "layer": layer})
        config.control.target = 0.5
        config.learn.without = 500 if size == "small" else 0
    else:
        config.title = "ByT5 with softmax1"
    return config


def small(config: ml_collections.ConfigDict) -> int:
    """128 bytes, four blocks and two, width 96: ten minutes on two cores. Gives the block before which bytes go."""
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


def study(short: bool) -> ml_collections.ConfigDict:
    """Every method on the small model, from one ByT5 of 4,000 steps; `short`: three of them, one seed, few steps.

    From random weights alone gates close on nearly all bytes: by the time they learn, the decoder hardly reads them.
    """
    config = byte_study.default_config()
    config.title = "Shorter encoders of bytes"
    config.train.optimiser.weight_decay = 0.0
    layer = small(config)

    def method(family: str, name: str = "", rate: float | None = None, /, changes: dict | None = None, **settings):
        label = family if rate is None else f"{family} {rate:g}"
        reduce = {"name": name, "layer": layer, **settings} if name else {"name": ""}
        return {"label": label, "family": family, "reduce": reduce, "changes": changes or {}}

    plain, alone = method("ByT5"), method("decoder alone", changes={"data.decoder_only": True})
    steered = [method("MrT5", "mrt5", rate, {"control.target": rate}) for rate in RATES]
    drawn = [method("random", "byte_random", rate, rate=rate) for rate in RATES]
    fixed = [method("ends of words", "byte_fixed", rate, amount=rate) for rate in RATES]
    pooled = [method("predicted boundaries", "boundary_pooling", rate, prior=round(1 - rate, 1)) for rate in RATES]
    cut = [method("convolution", "conv_pooling", stride, stride=stride) for stride in (2, 3)]
    config.study.methods = (plain, *steered, *drawn, *fixed, *pooled, *cut, alone)
    config.study.start_steps = 4000
    config.train.total_steps = config.train.eval_every = config.train.checkpoint_every = 400
    if short:
        config.study.methods, config.study.seeds, config.study.start_steps = (plain, steered[1], drawn[1]), (0,), 60
        config.train.total_steps = config.train.eval_every = config.train.checkpoint_every = 60
        config.train.optimiser.warmup_steps = 6
        config.data.test_subset = 100
    return config
