"""A ViT on CIFAR-10, read from a folder of parquet files as Hugging Face datasets publishes it.

python -m tokjax.main --config=configs/cifar10.py --config.data.path=FOLDER --workdir=runs/cifar10
python -m tokjax.main --config=configs/cifar10.py:small --config.data.path=FOLDER   # for two cores: minutes, not hours
python -m tokjax.main --config=configs/cifar10.py:deep --config.data.path=FOLDER --workdir=runs/cifar10_deep
"""

import ml_collections

from tokjax.tasks.classify import default_config, model_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Ti/4 at 32 px with DeiT's recipe; `arg` "small": 6 blocks of width 96 and 6 epochs with light augmentation;
    "deep": 12 blocks of width 96 and 8 epochs, an hour of two cores, the model of `configs/compare.py`."""
    config = default_config()
    config.title = "CIFAR-10: token reduction at equal cost"
    config.batch_size = 128
    config.eval_batch_size = 250
    config.model = model_config("ti/4", drop_path=0.1)

    config.data.source = "parquet"
    config.data.image_size = (32, 32)  # 64 patches and CLS
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.247, 0.2435, 0.2616)
    config.data.augment.flip = True
    config.data.augment.crop = "pad"
    config.data.augment.mixup = 0.8
    config.data.augment.cutmix = 1.0
    config.data.augment.label_smoothing = 0.1

    config.train.total_steps = 78_000  # 200 epochs
    config.train.eval_every = 3900
    config.train.checkpoint_every = 3900
    config.train.ema_decay = 0.9998
    config.train.optimiser.lr = 1e-3
    config.train.optimiser.warmup_steps = 3900
    config.train.optimiser.weight_decay = 0.05
    config.train.optimiser.clip_norm = 1.0

    config.bench.methods = (
        {"name": "tome", "label": "ToMe", "settings": {"r": 4}},
        {"name": "evit", "label": "EViT", "settings": {"keep_rate": 0.7}},
    )
    config.bench.batch_sizes = (1, 128)
    if arg in ("small", "deep"):
        config.data.augment.mixup = config.data.augment.cutmix = 0.0
    if arg == "small":
        config.model = model_config(patch_size=4, width=96, depth=6, heads=3)
        config.data.test_subset = 1000
        config.train.total_steps = 2340  # 6 epochs
        config.train.eval_every = config.train.checkpoint_every = 780
        config.train.ema_decay = 0.998
        config.train.optimiser.warmup_steps = 200
        config.bench.methods[0]["settings"]["r"] = 8
    if arg == "deep":
        config.batch_size = 64
        config.model = model_config(patch_size=4, width=96, depth=12, heads=3)
        config.train.total_steps = 6248  # 8 epochs
        config.train.eval_every = config.train.checkpoint_every = 781
        config.train.ema_decay = 0.998
        config.train.optimiser.lr = 1.5e-3
        config.train.optimiser.warmup_steps = 400
    return config
