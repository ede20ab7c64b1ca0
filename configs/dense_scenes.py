"""Segmentation and depth of every patch, on scenes of handwritten digits: a small ViT is trained from scratch, then
linear probes on its features with and without token reduction; minutes on two cores.

python -m tokjax.main --config=configs/dense_scenes.py --workdir=runs/dense_scenes

Probes on a frozen checkpoint and one's own images and masks (`SegmentationFolder`); nothing is trained:

python -m tokjax.main --config=configs/dense_scenes.py:probe --config.data.path=FOLDER \
    --config.init_image_size="(224, 224)" --config.data.patch_size=14 --config.init=facebook/dinov2-small \
    --workdir=runs/dense_probe
"""

import ml_collections

from tokjax.tasks.dense import default_config
from tokjax.tasks.experiment import model_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "short": a few steps and one budget, to see that everything runs; "probe": of a checkpoint, see above."""
    config = default_config()
    config.title = "Scenes of digits: segmentation and depth, token reduction at equal cost"
    config.batch_size = 64
    config.eval_batch_size = 128
    config.model = model_config(patch_size=4, width=64, depth=4, heads=4)
    config.label_weight = 0.5  # the leftmost or uppermost digit

    config.data.image_size = (32, 32)  # 64 patches and CLS
    config.data.patch_size = 4
    config.data.scenes.digits = (1, 2)
    config.data.scenes.colours = False
    config.data.scenes.test_count = 512

    config.train.total_steps = 1500
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 500
    config.train.ema_decay = 0.99
    config.train.optimiser.lr = 2e-3
    config.train.optimiser.warmup_steps = 100
    config.train.optimiser.weight_decay = 0.05

    config.sweep.targets = (0.75, 0.5)
    # Without EViT: the token into which it fuses what it drops stands for no place, and no probe can read it there.
    config.sweep.methods = tuple(
        {**method, "settings": {"layers": (0, 1)}} for method in config.sweep.methods if method["name"] != "evit"
    )
    config.sweep.seconds = 0.1
    config.bench.batch_sizes = (32,)
    config.bench.seconds = 0.2
    if arg == "short":
        config.data.scenes.train_count, config.data.scenes.test_count = 256, 100
        config.train.total_steps = 30
        config.train.optimiser.warmup_steps = 5
        config.train.eval_every = config.train.checkpoint_every = 15
        config.train.log_every = 5
        config.probe.patches = 10_000
        config.sweep.targets = (0.7,)
        config.sweep.repeats = config.bench.repeats = 2
        config.viz.images = 2
    if arg == "probe":
        config.title = "Segmentation by a linear probe, token reduction at equal cost"
        config.targets = ("segmentation",)
        config.data.source = "segmentation"
        config.data.decoded_gb = 0.0
        config.eval_batch_size = 32
        for method in config.sweep.methods:
            del method["settings"]["layers"]
        config.bench.methods = ({"name": "tome", "label": "ToMe", "settings": {"r": 13}},)
    return config
