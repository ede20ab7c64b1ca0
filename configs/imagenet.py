"""ViT and DeiT on ImageNet at 224 px, from class folders or parquet shards.

Train and sweep:

python -m tokjax.main --config=configs/imagenet.py:s/16 --config.data.path=FOLDER --workdir=runs/s16

Evaluate a published model, at its own image size and in float32 (--config.init_dtype=bfloat16 for speed):

python -m tokjax.main --config=configs/imagenet.py --mode=eval --config.data.path=FOLDER \
    --config.init=facebook/deit-small-patch16-224 --config.reduce.name=tome --config.reduce.r=13
"""

import ml_collections

from tokjax.tasks.classify import default_config, model_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """DeiT's recipe for a preset: `arg` is ti/16, s/16 (the default), b/16, l/16 or h/14; "deit-" before it distils."""
    name = arg or "s/16"
    config = default_config()
    config.title = f"ImageNet: ViT-{name.upper()}, token reduction at equal cost"
    config.batch_size = 1024  # of this process
    config.eval_batch_size = 256
    distilled = name.startswith("deit-")
    config.model = model_config(name.removeprefix("deit-"), distilled=distilled, drop_path=0.1, dtype="bfloat16")

    config.data.image_size = (224, 224)
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.data.resize.crop_pct = 0.875
    config.data.bad_image_limit = 50
    config.data.augment.flip = True
    config.data.augment.crop = "resized"
    config.data.augment.mixup = 0.8
    config.data.augment.cutmix = 1.0
    config.data.augment.label_smoothing = 0.1

    config.train.total_steps = 375_300  # 300 epochs of 1,281,167 images
    config.train.log_every = 100
    config.train.eval_every = config.train.checkpoint_every = 6255
    config.train.ema_decay = 0.9999
    config.train.optimiser.lr = 1e-3
    config.train.optimiser.warmup_steps = 6255
    config.train.optimiser.weight_decay = 0.05
    config.train.optimiser.clip_norm = 1.0

    config.sweep.targets = (0.9, 0.8, 0.7, 0.6, 0.5)
    config.bench.methods = (
        {"name": "tome", "label": "ToMe", "settings": {"r": 13 if config.model.preset[0] in "tsb" else 7}},
        {"name": "evit", "label": "EViT", "settings": {"keep_rate": 0.7}},
    )
    config.bench.batch_sizes = (1, 64)
    return config
