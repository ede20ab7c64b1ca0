"""Reducers of prompts and KV caches on one decoder, at equal cache and at equal multiply-accumulates of reading.

python -m tokjax.main --config=configs/decoder_text.py --mode=train --workdir=runs/decoder_text
python -m tokjax.main --config=configs/kv_compare.py --config.init=runs/decoder_text --workdir=runs/kv_compare

Data are those of configs/decoder_text.py, of the size that is named (`:125m`): give the same `--config.data.path`. Any
other decoder is `--config.init=FOLDER_OR_HUB_ID`; a distilled one (configs/swiftkv.py) joins with

    --config.compare.others="({'label': 'SwiftKV', 'path': 'runs/swiftkv'},)"

The run may be stopped at any time and goes on where it was.
"""

import ml_collections

from configs import decoder_text
from tokjax.reducers import REGISTRY
from tokjax.tasks import kv_compare

METHODS = (
    {"name": "snapkv", "label": "SnapKV", "settings": {}},
    {"name": "h2o", "label": "H2O", "settings": {}},
    {"name": "streaming_llm", "label": "StreamingLLM", "settings": {}},
    {"name": "recency_cache", "label": "the last tokens", "settings": {}},
    {"name": "random_cache", "label": "random tokens", "settings": {}},
    {"name": "fastv", "label": "FastV", "settings": {"layer": 1}},
    {"name": "prompt_merging", "label": "prompt merging", "settings": {"layers": (1, 2)}},
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: a size of configs/decoder_text.py, whose model and data these are; "small" by default."""
    config = decoder_text.get_config(arg)
    config.compare = kv_compare.default_config().compare
    config.task, config.title = "kv_compare", "Fewer tokens in prompts and caches"
    config.compare.methods = tuple(method for method in METHODS if method["name"] in REGISTRY)
    return config
