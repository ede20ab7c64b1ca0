"""A byte-level model fine-tuned on a task of texts, with the deletion gate that it brings.

Film reviews, whose class is written as a text, and spelling correction:

python -m tokjax.main --config=configs/mrt5_finetune.py --config.init=runs/mrt5_news \
    --config.data.path='FOLDER/movie_reviews_{split}.parquet' --workdir=runs/mrt5_reviews
python -m tokjax.main --config=configs/mrt5_finetune.py:spelling --config.init=runs/mrt5_news \
    --config.data.path='FOLDER/english_news_{split}.txt' --workdir=runs/mrt5_spelling

Behind a `-`, a published size with the paper's sequence lengths, such as `:reviews-byt5-small`. A starting model
without a gate (`google/byt5-small`) gets a new one. The learning rates of the paper's fine-tuning are not published;
these are ours.
"""

import ml_collections

from tokjax.tasks.byte_lm import default_config, model_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: "reviews" or "spelling", and behind a "-" nothing (the small model of `mrt5_text.py`) or a size."""
    task, _, size = (arg or "reviews").partition("-")
    if task not in ("reviews", "spelling"):
        raise ValueError(f"{arg!r}: must be reviews or spelling, and a size such as reviews-byt5-small")
    config = default_config()
    config.title = f"MrT5: {task}"
    config.model = model_config(size, normaliser="softmax1")
    config.reduce = ml_collections.ConfigDict({"name": "mrt5", "layer": 3 if size else 1})
    config.control.target = 0.5
    config.data.task = "classify" if task == "reviews" else "spelling"
    if size:
        config.data.length = 1024 if task == "reviews" else 64
        config.batch_size, config.eval_batch_size = 128, 64
        config.train.total_steps, config.train.log_every = 5000, 20
        config.train.optimiser.lr, config.train.optimiser.warmup_steps = 1e-4, 100
        config.train.optimiser.accumulate = 8 if task == "reviews" else 1
    else:
        config.data.length = 512 if task == "reviews" else 128
        config.batch_size, config.eval_batch_size = 16, 50
        config.train.total_steps, config.train.log_every = 600, 20
        config.train.optimiser.lr, config.train.optimiser.warmup_steps = 1e-3, 50
        config.control.k_p, config.control.k_i = 1.0, 1e-3
    config.train.optimiser.weight_decay = 0.0
    config.train.eval_every = config.train.checkpoint_every = config.train.total_steps // 3
    return config
