"""A BERT on film reviews, trained from scratch or from a published one, and reduced at equal cost.

python -m tokjax.main --config=configs/text_classify.py --workdir=runs/embedded_reviews
python -m tokjax.main --config=configs/text_classify.py --workdir=runs/film_reviews \
    --config.data.path='FOLDER/movie_reviews_{split}.parquet'

Without a path it reads the reviews that are embedded in the package. A published one,
fine-tuned on the same reviews with the settings of Devlin et al. (2019, appendix A.3):

python -m tokjax.main --config=configs/text_classify.py:bert-base --config.init=google-bert/bert-base-uncased \
    --config.data.path='FOLDER/movie_reviews_{split}.parquet' --workdir=runs/film_reviews_base

A model that is somebody's already: `--mode=sweep` (or `eval`) with its id as `--config.init`.
"""

import ml_collections

from tokjax.tasks import text_classify
from tokjax.tasks.text_classify import model_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "small", or "bert-base" for a checkpoint of that size."""
    if arg not in (None, "small", "bert-base"):
        raise ValueError(f"{arg!r}: must be small or bert-base")
    config = text_classify.default_config()
    config.title = "Film reviews: token reduction at equal cost"
    optimiser = config.train.optimiser
    if arg == "bert-base":
        config.data.length = 512
        config.model = model_config("bert-base", dropout=0.1)
        config.batch_size, config.train.total_steps = 16, 350  # four times all reviews
        optimiser.lr, optimiser.warmup_steps, optimiser.weight_decay = 3e-5, 35, 0.01
    else:
        config.data.length = 256
        config.model = model_config("", width=64, depth=4, heads=4, mlp_ratio=2.0)
        config.batch_size, config.train.total_steps = 16, 300
        optimiser.lr, optimiser.warmup_steps, optimiser.weight_decay = 1e-3, 30, 0.1
        for method in config.sweep.methods:  # early, while CLS has not read everything
            method["settings"]["layers"] = (0, 1)
    optimiser.clip_norm = 1.0
    config.train.log_every = 20
    config.train.eval_every = config.train.checkpoint_every = config.train.total_steps // 3
    return config
