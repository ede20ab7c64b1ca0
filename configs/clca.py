"""CLCA: a reducer with a cache around it and a head that reads several depths, for classes that differ in detail.

Fine-tunes a checkpoint on class folders or parquet files of a fine-grained split; the published recipe, at 448 px:

python -m tokjax.main --config=configs/clca.py --config.data.path=FOLDER --config.init=facebook/deit-base-patch16-224 \
    --workdir=runs/clca

In a minute or two from random weights, on the digits that are easily taken for each other:

python -m tokjax.main --config=configs/clca.py:digits --workdir=runs/clca_digits

On the four-legged animals of CIFAR-10, from the model of `configs/cifar10.py:deep`:

python -m tokjax.main --config=configs/clca.py:cifar10 --config.data.path=FOLDER \
    --config.init=runs/cifar10_deep/model --workdir=runs/clca_cifar10
"""

import ml_collections

from tokjax.tasks.classify import model_config
from tokjax.tasks.train_reducer import default_config

EPOCH = 187  # steps of 32 of 6,000 images, as in CUB-200-2011; set train.total_steps for data of another size


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "digits" or "cifar10" for small models. Other reducers inside: --config.reduce.reducer=tome.

    The published schedule warms up for 2 epochs, decays for 43 and stays at its last rate for 5; the cosine here takes
    all 50.
    """
    config = default_config()
    config.title = "CLCA"
    config.reduce = ml_collections.ConfigDict({"name": "clca", "reducer": "evit", "keep_rate": 0.7, "num_clr": 1})

    config.batch_size = 32
    config.eval_batch_size = 64
    config.model = model_config("b/16", dtype="bfloat16")
    config.init_image_size = config.data.image_size = (448, 448)
    config.init_dtype = "bfloat16"
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.resize.mode = "square"
    config.data.resize.crop_pct = 0.875
    config.data.augment.flip = True
    config.data.augment.crop = "resized"  # a square of 0.875 of the side
    config.data.augment.scale = (0.766, 0.766)
    config.data.augment.ratio = (1.0, 1.0)
    config.train.total_steps = 50 * EPOCH
    config.train.eval_every = config.train.checkpoint_every = 5 * EPOCH
    config.train.optimiser.lr = 1e-4
    config.train.optimiser.final_lr = 1e-5
    config.train.optimiser.warmup_steps = 2 * EPOCH
    config.train.optimiser.weight_decay = 0.05
    if arg:
        {"digits": digits, "cifar10": cifar10}[arg](config)
    return config


def digits(config: ml_collections.ConfigDict) -> None:
    """3, 5, 8 and 9; 6 blocks, 64 patches."""
    small(config)
    config.batch_size = 64
    config.eval_batch_size = 150
    config.model = model_config(patch_size=4, width=64, depth=6, heads=4)
    config.data.only = ("3", "5", "8", "9")
    config.data.augment.flip = False
    config.data.augment.pad = 3
    config.train.total_steps = 300
    config.train.eval_every = config.train.checkpoint_every = 100
    config.train.optimiser.lr = 2e-3
    config.train.optimiser.warmup_steps = 50


def cifar10(config: ml_collections.ConfigDict) -> None:
    """Cat, deer, dog and horse; 12 blocks of width 96, 64 patches."""
    small(config)
    config.batch_size = 64
    config.eval_batch_size = 250
    config.model = model_config(patch_size=4, width=96, depth=12, heads=3)
    config.data.source = "parquet"
    config.data.only = ("3", "4", "5", "7")
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    config.train.total_steps = 1560  # 5 epochs of 20,000 images
    config.train.eval_every = config.train.checkpoint_every = 312
    config.train.optimiser.lr = 5e-4
    config.train.optimiser.warmup_steps = 100


def small(config: ml_collections.ConfigDict) -> None:
    """Images of 32 px, shifted, in float32."""
    config.data.image_size = (32, 32)
    config.init_image_size = None
    config.init_dtype = "float32"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.resize.crop_pct = 1.0
    config.data.augment.crop = "pad"
    config.data.augment.pad = 4
    config.train.optimiser.final_lr = 0.0
