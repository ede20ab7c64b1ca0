"""Learned rates against hand-set schedules on the CIFAR-10 model of the comparison, before and after fine-tuning.

python -m tokjax.main --config=configs/learned_vit.py --config.data.path=FOLDER --workdir=runs/learned_vit

FOLDER holds CIFAR-10 as parquet files. The run may be stopped at any time and goes on where it was.
"""

from pathlib import Path

import ml_collections

from tokjax.tasks.rates import default_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "short": one target, one seed, two methods, few steps: minutes."""
    config = default_config()
    config.title = "Learned rates on CIFAR-10 at equal cost"
    config.init = str(Path(__file__).parents[1] / "experiments/compare_vit/model")
    config.batch_size = 64
    config.eval_batch_size = 250
    config.data.source = "parquet"
    config.data.image_size = (32, 32)
    config.data.augment.flip = True
    config.data.augment.crop = "pad"

    config.train.total_steps = 200  # a quarter of an epoch
    config.train.checkpoint_every = 200
    config.train.log_every = 20
    config.train.optimiser.lr = 3e-4
    config.train.optimiser.warmup_steps = 20
    config.train.optimiser.weight_decay = 0.05
    config.learn.reducer_lr_scale = 10.0
    if arg == "short":
        config.study.targets = (0.4,)
        config.study.seeds = (0,)
        config.study.methods = ("tome", "diffrate")
        config.study.images = 500
        config.study.search.steps = 30
        config.train.total_steps = config.train.checkpoint_every = 30
        config.train.optimiser.warmup_steps = 3
        config.data.test_subset = 500
    return config
