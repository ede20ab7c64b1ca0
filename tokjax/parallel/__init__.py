"""Several devices: a mesh of them, where a batch and the parameters go, and a model that runs part by part."""

from tokjax.parallel.mesh import (
    AXES,
    PRESETS,
    batch_sharding,
    by_rows,
    data_mesh,
    data_part,
    fetch,
    make_mesh,
    place,
    row_keys,
)
from tokjax.parallel.processes import barrier, finish, initialize, leave, several
from tokjax.parallel.rules import (
    DEFAULT_RULES,
    Rule,
    of_model,
    parse,
    placing,
    shard,
    shardings,
    specs,
    state_shardings,
)

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "PRESETS",
    "Rule",
    "barrier",
    "batch_sharding",
    "by_rows",
    "data_mesh",
    "data_part",
    "fetch",
    "finish",
    "initialize",
    "leave",
    "make_mesh",
    "of_model",
    "parse",
    "place",
    "placing",
    "row_keys",
    "several",
    "shard",
    "shardings",
    "specs",
    "state_shardings",
]
