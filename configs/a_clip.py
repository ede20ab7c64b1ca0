"""A-CLIP: contrastive training on the halves of images that a teacher attends to, with SimCLR and BYOL beside.

The published recipe, ViT-B/16 on 15 million pairs, on your images and captions (`captions.jsonl` or `captions.csv`):
python -m tokjax.main --config=configs/a_clip.py --config.data.path=FOLDER

A small one on scenes of digits, no download, minutes on two cores; and plain CLIP at the same steps, to compare with:
python -m tokjax.main --config=configs/a_clip.py:scenes --workdir=runs/a_clip --mode=train
python -m tokjax.main --config=configs/a_clip.py:plain --workdir=runs/a_clip_plain --mode=train

Stopped or killed, the same command goes on. Zero-shot classes of what was trained:
python -m tokjax.main --config=configs/zero_shot_scenes.py --config.init=runs/a_clip/model --mode=sweep
"""

import ml_collections

from configs import retrieval_scenes
from tokjax.tasks.a_clip import default_config
from tokjax.tasks.contrastive import text_config
from tokjax.tasks.experiment import model_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg` "small": a ViT-S with 12 heads; "scenes": towers of retrieval_scenes on its scenes; "short": a few steps of
    that, to see that everything runs; "plain": CLIP alone on the same scenes, one view, all patches.
    """
    if arg == "plain":
        config = retrieval_scenes.get_config()
        config.title = "Scenes: CLIP"
        return scenes(config)
    config = default_config()
    config.title = "A-CLIP"
    if arg in ("scenes", "short"):
        config.title = "Scenes: A-CLIP"
        for name, value in retrieval_scenes.get_config("short" if arg == "short" else None).items():
            if name not in ("task", "title"):
                config[name] = value
        config.a_clip.hidden, config.a_clip.embedding = 128, 32
        config.a_clip.scale = (0.8, 1.0)  # a caption names every digit of its scene: crops must not lose one
        config.a_clip.jitter = config.a_clip.grey = config.a_clip.solarise = 0.0  # scenes are grey on black
        config.a_clip.momentum = 0.99  # for hundreds of steps, not tens of thousands
        # In few steps small towers learn no captions beside the full weights, nor from a teacher that looks at black.
        config.a_clip.simclr_weight, config.a_clip.byol_weight = 0.1, 0.2
        config.a_clip.whole_steps = 6 if arg == "short" else 300
        return config if arg == "short" else scenes(config)

    config.model = model_config("s/16" if arg == "small" else "b/16", heads=12)
    config.text = text_config(length=77, width=512, depth=12, heads=8)
    config.embed_dim = 512
    config.batch_size = 4096  # of all devices; the loss contrasts them all
    config.data.source = "captions"
    config.data.image_size = (224, 224)
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.train.total_steps = 91_600  # 25 epochs of 15 million pairs
    config.train.eval_every = config.train.checkpoint_every = 3_664  # an epoch
    optimiser = config.train.optimiser
    optimiser.lr, optimiser.final_lr, optimiser.warmup_steps = 5e-4, 1e-5, 3_664
    optimiser.weight_decay, optimiser.b1, optimiser.b2, optimiser.eps = 0.5, 0.9, 0.98, 1e-8
    optimiser.clip_norm = None
    return config


def scenes(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The steps that both of a comparison have."""
    config.train.total_steps, config.train.eval_every, config.train.checkpoint_every = 600, 200, 200
    return config
