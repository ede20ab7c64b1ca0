"""MrT5 on tasks that tell which bytes may go: vowels to leave out, with or without context, and runs to merge.

python -m tokjax.main --config=configs/mrt5_diagnostic.py --workdir=runs/vowels
python -m tokjax.main --config=configs/mrt5_diagnostic.py:contextual_vowels --workdir=runs/contextual_vowels
python -m tokjax.main --config=configs/mrt5_diagnostic.py:merge --workdir=runs/merge

`:vowels-plain` trains a T5 without a gate, `:vowels-paper` has the size and the steps of the paper (Kallini et al.,
ICLR 2025, section 4: 3 and 3 blocks of width 512, 30,000 steps of 128 strings of 64 bytes, gates from step 10,000 on).
"""

import ml_collections

from tokjax.tasks.byte_lm import default_config, model_config

ALPHA = {"vowels": 1e-3, "contextual_vowels": 1e-2, "merge": 1.5e-2}  # published weights of the term `loss/gate`


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: vowels, contextual_vowels or merge, with "-plain", "-paper" or both behind it."""
    task, *options = (arg or "vowels").split("-")
    if task not in ALPHA or not set(options) <= {"plain", "paper"}:
        raise ValueError(f"{arg!r}: must be one of {', '.join(ALPHA)}, with -plain or -paper behind it")
    config = default_config()
    config.title = f"MrT5: {task.replace('_', ' ')}"
    config.data.task = task
    config.data.length = 64
    config.train.optimiser.weight_decay = 0.0
    if "paper" in options:
        sizes = {"width": 512, "hidden": 1024, "heads": 4, "head_width": 128, "depth": 3, "decoder_depth": 3}
        config.batch_size, config.eval_batch_size = 128, 500
        config.train.total_steps = 30_000
        config.train.eval_every = config.train.checkpoint_every = 2000
        config.train.log_every = 100
        config.train.optimiser.lr = 1e-4
        config.control.delay, dropout = 10_000, 0.1
    else:
        sizes = {"width": 96, "hidden": 192, "heads": 4, "head_width": 24, "depth": 3, "decoder_depth": 2}
        config.data.diagnostic.test_count = 1000
        config.batch_size, config.eval_batch_size = 32, 250
        config.train.total_steps = 3000
        config.train.eval_every = config.train.checkpoint_every = 500
        config.train.log_every = 50
        config.train.optimiser.lr = 2e-3
        config.train.optimiser.warmup_steps = 200
        config.control.delay, dropout = 1500, 0.0
        config.learn.without = 1500 * ("plain" not in options)  # a T5 has learned the simple vowels by then
    config.model = model_config("", normaliser="softmax1", dropout=dropout, **sizes)
    if "plain" not in options:
        config.reduce = ml_collections.ConfigDict({"name": "mrt5", "layer": 1, "scores": 0.5})
        config.control.weight = ALPHA[task]
    return config
