"""Fine-tunes a trained ViT with a reducer without parameters (EViT, ToMe, any other), whose knob is lowered on the way.

python -m tokjax.main --config=configs/digits.py --mode=train --workdir=runs/digits
python -m tokjax.main --config=configs/finetune_reduced.py --config.init=runs/digits --workdir=runs/finetune_evit
python -m tokjax.main --config=configs/finetune_reduced.py:tome --config.init=runs/digits --workdir=runs/finetune_tome

or on CIFAR-10, a folder of parquet files, from what configs/cifar10.py:deep or :small has trained:

python -m tokjax.main --config=configs/finetune_reduced.py:evit,cifar10 --config.data.path=FOLDER \
    --config.init=runs/cifar10 --workdir=runs/finetune_evit_cifar10

Both print the accuracy of the result with and without its reducer. `--config.learn.logits.weight=0.5` distils from the
model at the start as well, `--config.ramp.knob="(1.0,0.8,0.6)"` sets other keep rates. EViT (Liang et al., ICLR 2022,
section 4.1) lowers its keep rate by a cosine over the first hundred epochs of a training; here it falls in steps, each
of which is a program of its own.
"""

import ml_collections

from tokjax.tasks.train_reducer import default_config

RATES, REMOVED = (1.0, 0.85, 0.7, 0.6, 0.5), (0, 2, 4, 6, 8)  # keep rates; tokens that go in every block
KNOBS = {"evit": RATES, "topk": RATES, "tome": REMOVED, "pitome": (1.0, 0.95, 0.9, 0.85)}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: the reducer, "evit" (the default), "topk", "tome" or "pitome"; ",cifar10" behind it: on CIFAR-10."""
    name, _, data = (arg or "evit").partition(",")
    if name not in KNOBS or data not in ("", "digits", "cifar10"):
        raise ValueError(f"{arg!r}: must be one of {', '.join(KNOBS)}, alone or with ',cifar10' behind it")
    config = default_config()
    config.title = "Fine-tuning with fewer tokens"
    config.reduce.name = name
    config.ramp.knob = KNOBS[name]
    config.batch_size = 64
    config.data.image_size = (32, 32)
    config.data.augment.crop = "pad"
    config.data.augment.label_smoothing = 0.1
    config.train.ema_decay = 0.99
    config.train.optimiser.lr = 3e-4
    config.train.optimiser.weight_decay = 0.05
    if data == "cifar10":
        config.eval_batch_size = 250
        config.data.source = "parquet"
        config.data.augment.flip = True
        config.train.total_steps = 1562  # 2 epochs
        config.train.eval_every = config.train.checkpoint_every = 781
        config.train.optimiser.warmup_steps = 50
        config.ramp.start, config.ramp.steps = 100, 800
    else:
        config.eval_batch_size = 120
        config.data.augment.pad = 3
        config.train.total_steps = 200
        config.train.log_every = 20
        config.train.eval_every = config.train.checkpoint_every = 100
        config.train.optimiser.warmup_steps = 10
        config.ramp.start, config.ramp.steps = 20, 100
    return config
