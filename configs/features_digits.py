"""k-NN accuracy of a frozen encoder's features on scikit-learn's digits; a small ViT is trained first, in minutes on
two cores.

python -m tokjax.main --config=configs/features_digits.py --workdir=runs/features_digits

The encoder of a classification run, or any checkpoint, instead of a new one; nothing is trained:

python -m tokjax.main --config=configs/features_digits.py --config.init=runs/digits --workdir=runs/features_init
"""

import ml_collections

from tokjax.tasks.experiment import model_config
from tokjax.tasks.features import default_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "short": a few steps and one budget, to see that everything runs."""
    config = default_config()
    config.title = "Digits: k-NN on frozen features, token reduction at equal cost"
    config.batch_size = 64
    config.eval_batch_size = 120  # 359 test images in three
    config.model = model_config(patch_size=4, width=64, depth=4, heads=4)

    config.data.image_size = (32, 32)  # 64 patches and CLS
    config.data.augment.crop = "pad"
    config.data.augment.pad = 3
    config.data.augment.label_smoothing = 0.1

    config.train.total_steps = 600
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 200
    config.train.ema_decay = 0.99
    config.train.optimiser.lr = 2e-3
    config.train.optimiser.warmup_steps = 100
    config.train.optimiser.weight_decay = 0.05

    config.sweep.targets = (0.75, 0.5)
    for method in config.sweep.methods:  # early, while CLS has not read everything
        method["settings"]["layers"] = (0, 1)
    config.sweep.seconds = 0.1
    config.bench.batch_sizes = (32,)
    config.bench.seconds = 0.2
    if arg == "short":
        config.train.total_steps = 30
        config.train.optimiser.warmup_steps = 5
        config.train.eval_every = config.train.checkpoint_every = 15
        config.train.log_every = 5
        config.sweep.targets = (0.7,)
        config.sweep.repeats = config.bench.repeats = 2
        config.viz.images = 2
    return config
