"""A small CLIP on scenes of digits, then zero-shot classification of single digits with an ensemble of sentences, with
and without reduction; no download, minutes on two cores.

python -m tokjax.main --config=configs/zero_shot_scenes.py --workdir=runs/zero_shot_scenes

With a model that is trained already: --config.init=runs/retrieval_scenes/model --mode=sweep
"""

import ml_collections

from configs.retrieval_scenes import get_config as retrieval
from tokjax.tasks.zero_shot import default_config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: as of retrieval_scenes."""
    config, trained = default_config(), retrieval(arg)
    for name, value in trained.items():
        if name not in ("task", "title"):
            config[name] = value
    config.title = "Scenes: zero-shot classification at equal cost"
    test = config.zero_shot.data
    test.source, test.image_size = "scenes", config.data.image_size
    test.scenes.digits, test.scenes.test_count, test.scenes.seed = (1, 1), 1000, 1
    test.scenes.colours = False
    config.zero_shot.templates = ("a picture of a {}", "only a {}", "a {} alone")
    if arg == "short":
        test.scenes.test_count = 64
    return config
