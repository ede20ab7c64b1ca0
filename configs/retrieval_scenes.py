"""A small CLIP on scenes of digits ("a three above a seven"): train, then recall@1/5/10 with and without
reduction; no download, minutes on two cores.

python -m tokjax.main --config=configs/retrieval_scenes.py --workdir=runs/retrieval_scenes
"""

import ml_collections

from tokjax.tasks.contrastive import text_config
from tokjax.tasks.experiment import model_config
from tokjax.tasks.retrieval import default_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "short": a few steps and one budget, to see that everything runs; "siglip": that loss and head."""
    config = default_config()
    config.title = "Scenes: image-text retrieval at equal cost"
    config.batch_size = 96
    config.eval_batch_size = 128
    config.model = model_config(patch_size=6, width=48, depth=4, heads=4)
    config.text = text_config(length=20, width=48, depth=2, heads=4)
    config.embed_dim = 32
    if arg == "siglip":
        config.loss = "siglip"
        config.model.update({"class_token": False, "pooling": "map", "gelu": "tanh"})
        config.text.update({"causal": False, "pooling": "last", "gelu": "tanh"})
    config.data.image_size = (48, 48)  # 64 patches and CLS
    config.data.patch_size = 6
    config.data.scenes.digits, config.data.scenes.colours = (1, 2), False
    config.data.scenes.distinct = True  # no two test captions mean the same
    config.data.scenes.train_count = 8192
    config.data.scenes.test_count = 200  # of the 210 that there are

    config.train.total_steps = 1500
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.train.optimiser.lr = 2e-3
    config.train.optimiser.warmup_steps = 100
    config.train.optimiser.weight_decay = 0.05
    config.train.optimiser.clip_norm = 1.0

    config.sweep.targets = (0.75, 0.5)
    config.bench.batch_sizes = (32,)
    if arg == "short":
        config.batch_size = 32
        config.data.scenes.train_count, config.data.scenes.test_count = 256, 64
        config.train.total_steps, config.train.eval_every, config.train.checkpoint_every = 12, 6, 6
        config.train.log_every, config.train.optimiser.warmup_steps = 3, 2
        config.sweep.targets, config.sweep.repeats, config.bench.repeats = (0.75,), 2, 2
        config.viz.images = 2
    return config
