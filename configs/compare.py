"""Every training-free reducer on one ViT for CIFAR-10, at equal multiply-accumulates.

python -m tokjax.main --config=configs/compare.py --config.data.path=FOLDER --workdir=runs/compare_vit

FOLDER holds CIFAR-10 as parquet files. The model is the one in experiments/compare_vit, trained with
configs/cifar10.py:deep; --config.init names another. The run may be stopped at any time and goes on where it was.
Reducers that learn join in once --mode=train_methods has trained them, with the same command before this one.

python -m tokjax.main --config=configs/compare.py:lengths --config.data.path=FOLDER --workdir=runs/lengths

runs reducers whose counts vary by image (ATS) with a mask alone, in buckets, and packed: 64 images of 64 x 64 pixels,
257 tokens, half of the images made simple.
"""

from pathlib import Path

import ml_collections

from tokjax.tasks.compare import default_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "short": four methods, two targets, few images; "lengths": see above."""
    config = default_config()
    config.title = "Token reduction on CIFAR-10 at equal cost"
    config.init = str(Path(__file__).parents[1] / "experiments/compare_vit/model")
    config.eval_batch_size = 100
    config.data.source = "parquet"
    config.data.image_size = (32, 32)
    config.data.augment.flip = True
    config.train.total_steps = config.train.checkpoint_every = 781  # of reducers that learn: an epoch
    config.train.optimiser.lr = 1e-3
    config.train.optimiser.warmup_steps = 50
    config.train.optimiser.weight_decay = 0.0
    if arg == "lengths":
        config.mode = "lengths"
        config.init_image_size = (64, 64)
    if arg == "short":
        some = ("tome", "evit", "random", "gtp")
        config.compare.methods = tuple(method for method in config.compare.methods if method["name"] in some)
        config.compare.targets = (0.8, 0.5)
        config.compare.images = 200
        config.compare.whole_targets = (0.8,)
        config.compare.rounds = 2
        config.compare.calls = 1
    return config
