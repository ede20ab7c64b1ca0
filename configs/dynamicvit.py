"""DynamicViT: predictors that learn which tokens to prune, with the network that they are put into.

From a checkpoint, from which logits and tokens are distilled; the recipe is the published one for DeiT-S at 224 px:

python -m tokjax.main --config=configs/dynamicvit.py --config.data.path=FOLDER \
    --config.init=facebook/deit-small-patch16-224 --workdir=runs/dynamicvit

In a minute or two, from the model of `configs/digits.py`; then the same with random weights and without a teacher:

python -m tokjax.main --config=configs/digits.py --mode=train --workdir=runs/digits
python -m tokjax.main --config=configs/dynamicvit.py:digits --config.init=runs/digits/model --workdir=runs/dynamicvit
python -m tokjax.main --config=configs/dynamicvit.py:digits-scratch --workdir=runs/dynamicvit_scratch

On CIFAR-10, from the model of `configs/cifar10.py:deep`:

python -m tokjax.main --config=configs/dynamicvit.py:cifar10 --config.data.path=FOLDER \
    --config.init=runs/cifar10_deep/model --workdir=runs/dynamicvit_cifar10
"""

import ml_collections

from tokjax.tasks.classify import model_config
from tokjax.tasks.train_reducer import default_config

EPOCH = 1251  # steps of 1024 of ImageNet's 1,281,167 images


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "digits" or "cifar10" for small models; "-scratch" behind it, or alone, for random weights and no teacher.

    The published training holds the network still for the first five epochs, here it learns slowly from the start: a
    hundredth of the predictors' learning rate.
    """
    scratch = arg is not None and arg.endswith("scratch")
    name = (arg or "").removesuffix("scratch").removesuffix("-")
    config = default_config()
    config.title = "DynamicViT"
    config.reduce = ml_collections.ConfigDict({"name": "dynamicvit", "keep_rate": 0.7, "ratio_weight": 2.0})
    if not scratch:
        config.learn.network_lr_scale = 0.01
        config.learn.logits.weight = 0.5
        config.learn.tokens.weight = 0.5

    config.batch_size = 1024
    config.eval_batch_size = 256
    config.model = model_config("s/16", dtype="bfloat16")
    config.init_dtype = "bfloat16"
    config.data.image_size = (224, 224)
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.resize.crop_pct = 0.875
    config.data.augment.flip = True
    config.data.augment.crop = "resized"
    config.data.augment.mixup = 0.8
    config.data.augment.cutmix = 1.0
    config.data.augment.label_smoothing = 0.1
    config.train.total_steps = 30 * EPOCH
    config.train.eval_every = config.train.checkpoint_every = EPOCH
    config.train.ema_decay = 0.9999
    config.train.optimiser.lr = 1e-3
    config.train.optimiser.final_lr = 1e-6
    config.train.optimiser.warmup_steps = 5 * EPOCH
    config.train.optimiser.weight_decay = 0.05
    if name:
        {"digits": digits, "cifar10": cifar10}[name](config, scratch)
    return config


def digits(config: ml_collections.ConfigDict, scratch: bool) -> None:
    """The model of `configs/digits.py`: 4 blocks, 64 patches."""
    small(config)
    config.batch_size = 64
    config.eval_batch_size = 120
    config.model = model_config(patch_size=4, width=64, depth=4, heads=4)
    config.data.augment.pad = 3
    config.train.total_steps = 600 if scratch else 300
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 100
    config.train.ema_decay = 0.99
    config.train.optimiser.lr = 2e-3
    config.train.optimiser.warmup_steps = 50


def cifar10(config: ml_collections.ConfigDict, scratch: bool) -> None:
    """The model of `configs/cifar10.py:deep`: 12 blocks of width 96, 64 patches."""
    small(config)
    config.batch_size = 64
    config.eval_batch_size = 250
    config.model = model_config(patch_size=4, width=96, depth=12, heads=3)
    config.data.source = "parquet"
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    config.data.augment.flip = True
    config.train.total_steps = 6248 if scratch else 1562  # 8 epochs, or 2
    config.train.eval_every = config.train.checkpoint_every = 781
    config.train.ema_decay = 0.998
    config.train.optimiser.lr = 1.5e-3 if scratch else 1e-3
    config.train.optimiser.warmup_steps = 400 if scratch else 200


def small(config: ml_collections.ConfigDict) -> None:
    """Images of 32 px and light augmentation, in float32."""
    config.init_dtype = "float32"
    config.data.image_size = (32, 32)
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.resize.crop_pct = 1.0
    config.data.augment.flip = False
    config.data.augment.crop = "pad"
    config.data.augment.mixup = config.data.augment.cutmix = 0.0
    config.train.optimiser.final_lr = 0.0
    config.learn.network_lr_scale = 0.1 if config.learn.logits.weight else 1.0  # of a training of a few hundred steps
