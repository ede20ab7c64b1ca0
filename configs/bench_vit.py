"""Speed of real sizes on random input: ViT-S/16 at 224 px by default; random weights unless `config.init` names some.

python -m tokjax.main --config=configs/bench_vit.py --workdir=runs/bench
python -m tokjax.main --config=configs/bench_vit.py:h/14 --config.model.dtype=bfloat16
--config.bench.batch_sizes="(64,)"
python -m tokjax.main --config=configs/bench_vit.py:half --workdir=runs/bench_half    # every reducer at 0.5 of the MACs
"""

import ml_collections

from tokjax import reducers
from tokjax.tasks.classify import default_config, model_config

R = {"ti": 13, "s": 13, "b": 13, "l": 7, "h": 7}  # ToMe's for each size (Bolya et al. 2023)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`arg`: SIZE/PATCH of ti, s, b, l, h, such as s/16 (the default) or h/14; or "half", every reducer on S/16."""
    name = "s/16" if arg in (None, "half") else arg
    config = default_config()
    config.mode = "bench"
    config.title = f"ViT-{name.upper()} at 224 px"
    config.model = model_config(name, num_classes=1000)
    config.data.image_size = (224, 224)
    config.bench.methods = (
        {"name": "tome", "label": "ToMe", "settings": {"r": R.get(name.split("/")[0], 13)}},
        {"name": "topk", "label": "Top-K", "settings": {"keep_rate": 0.7}},
        {"name": "evit", "label": "EViT", "settings": {"keep_rate": 0.7}},
        {"name": "random", "label": "random drop", "settings": {"keep_rate": 0.7}},
        {"name": "avgpool", "label": "average pooling", "settings": {"keep_rate": 0.7}},
    )
    config.bench.batch_sizes = (1, 8, 32)
    config.bench.seconds = 0.5
    if arg == "half":
        config.title = "ViT-S/16 at half of the MACs"
        config.bench.macs = 0.5
        more = {"tomesd": {"merge_mlp": True}}  # its default, attention alone, cannot come so far down
        config.bench.methods = tuple(
            {"name": name, "label": name, "settings": more.get(name, {})}
            for name, entry in reducers.REGISTRY.items()
            if not (entry.guided or entry.text or entry.knob.learned)
        )
        config.bench.batch_sizes = (8, 32)
    return config
