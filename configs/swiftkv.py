"""SwiftKV: prompts that leave a decoder half-way, distilled from the decoder as it was (Qiao et al. 2024).

python -m tokjax.main --config=configs/decoder_text.py --mode=train --workdir=runs/decoder_text
python -m tokjax.main --config=configs/swiftkv.py --config.init=runs/decoder_text --workdir=runs/swiftkv

Data and sizes are those of configs/decoder_text.py (`:125m`, ...); give the same `--config.data.path`. Blocks from the
middle on make keys and values of what enters the first of them, by projections that begin as their own; these and the
norm before them are trained, and nothing else. Neighbours share them with `:small,2`; another depth is
`--config.reduce.layer=0.75`. A published decoder, with the published settings:

python -m tokjax.main --config=configs/swiftkv.py:llama --config.init=meta-llama/Llama-3.1-8B-Instruct \
    --config.data.path=FOLDER --workdir=runs/swiftkv_llama
"""

import ml_collections

from configs import decoder_text


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: a size of configs/decoder_text.py, "small" by default, or "llama"; ",G" behind it: blocks that share."""
    size, _, group = (arg or "small").partition(",")
    config = decoder_text.get_config("1b" if size == "llama" else size)
    config.title = "SwiftKV"
    config.reduce = ml_collections.ConfigDict({"name": "swiftkv", "layer": 0.5, "group": int(group or 1)})
    config.distil.on = True
    config.train.optimiser.weight_decay = 0.0
    config.train.optimiser.b2 = 0.999
    config.train.optimiser.warmup_steps = 0
    config.train.optimiser.warmup_fraction = 0.05
    if size == "small":
        config.train.total_steps = config.train.checkpoint_every = config.train.eval_every = 500
        config.train.optimiser.lr = 2e-3
    elif size == "llama":
        config.init_dtype = "bfloat16"
        config.data.length, config.data.prompt, config.data.facts.share = 8192, 6144, 0.0
        config.batch_size, config.eval_batch_size = 8, 1
        config.train.optimiser.accumulate = 8
        config.train.optimiser.lr, config.train.optimiser.final_lr = 2e-4, 0.0
    return config
