"""DiffRate: how many tokens every block prunes and merges is learned by gradient, at a target of MACs.

The network stays as it is; only the rates learn. After the training `workdir/rates.json` holds the counts of every
block, and what is evaluated is the model with them, as `diffrate` runs it.

python -m tokjax.main --config=configs/digits.py --mode=train --workdir=runs/digits
python -m tokjax.main --config=configs/diffrate.py --config.init=runs/digits --workdir=runs/diffrate

python -m tokjax.main --config=configs/diffrate.py:cifar10 --config.data.path=FOLDER \
    --config.init=experiments/compare_vit/model --workdir=runs/diffrate_cifar10
python -m tokjax.main --config=configs/diffrate.py:imagenet --config.data.path=FOLDER \
    --config.init=facebook/deit-small-patch16-224 --workdir=runs/diffrate_imagenet

`--config.reduce.target=0.5` sets another share of the full model's MACs. The rates then serve anywhere:
`tokjax.reduce(model, "diffrate", rates="runs/diffrate/rates.json")`, or config.reduce of configs/finetune_reduced.py.
"""

import ml_collections

from tokjax.tasks.train_reducer import default_config

EPOCH = 1251  # steps of 1024 of ImageNet's 1,281,167 images


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "cifar10": on a folder of parquet files; "imagenet": the published recipe; else digits."""
    if arg not in (None, "digits", "cifar10", "imagenet"):
        raise ValueError(f"{arg!r}: must be one of digits, cifar10, imagenet")
    config = default_config()
    config.title = "DiffRate: learned rates"
    config.reduce = ml_collections.ConfigDict(
        {"name": "diffrate_search", "target": 0.6, "weight": 5.0, "granularity": 4}
    )
    config.learn.network = config.learn.head = False
    config.batch_size = 64
    config.data.image_size = (32, 32)
    config.data.augment.crop = "pad"
    config.train.keep_best = False  # what the network can do at first is better than at the target
    config.train.optimiser.lr = 0.01
    config.train.optimiser.final_lr = 0.001
    config.train.optimiser.weight_decay = 0.0
    config.train.optimiser.clip_norm = None
    config.train.log_every = 20
    if arg == "imagenet":
        config.batch_size, config.eval_batch_size = 1024, 256
        config.data.image_size = (224, 224)
        config.data.augment.flip = True
        config.data.augment.crop = "resized"
        config.data.augment.mixup, config.data.augment.cutmix = 0.8, 1.0
        config.data.augment.label_smoothing = 0.1
        config.train.total_steps = 3 * EPOCH
        config.train.eval_every = config.train.checkpoint_every = EPOCH
    elif arg == "cifar10":
        config.eval_batch_size = 250
        config.data.source = "parquet"
        config.data.augment.flip = True
        config.reduce.chord = True  # the published gradient explodes on this model, see experiments/learned_vit
        config.train.total_steps = 781  # an epoch
        config.train.eval_every, config.train.checkpoint_every = 781, 100
    else:
        config.eval_batch_size = 120
        config.data.augment.pad = 3
        config.train.total_steps = 300
        config.train.eval_every, config.train.checkpoint_every = 300, 100
    return config
