"""Chain: several reducers in one model, one after another at a site or each in its own blocks.

Kind:   whatever its parts are.
Needs:  what its parts need.

Hooks of the parts run in the order in which they are given, so that `(("topk", {...}), ("tome", {...}))` prunes before
it merges wherever both reduce in one block; `layers` in their settings puts them into different blocks. Everything is
made of names and plain values, so that a config can hold it and `tokjax.save` can write it.

`level` turns all parts at once, each by its own knob, which is how a chain meets a budget; a part whose settings have
their knob stays as it is. Counts and rates refer to the tokens at the model's input or at the part's own site, as each
part defines them.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from tokjax.hooks import Hook, ModelInfo

Part = tuple[str, tuple[tuple[str, Any], ...]]


def _fixed(value: Any) -> Any:
    """Lists as tuples and mappings as sorted pairs, all the way down."""
    if hasattr(value, "items"):
        return tuple(sorted((str(key), _fixed(inner)) for key, inner in value.items()))
    return tuple(_fixed(inner) for inner in value) if isinstance(value, list | tuple) else value


def _part(given: Any) -> Part:
    """A name, a name with settings, or settings with a name among them."""
    if isinstance(given, str):
        return given, ()
    if hasattr(given, "items"):
        named = dict(given.items())
        name, settings = named.pop("name", None), named
    else:
        name, settings = given if isinstance(given, list | tuple) and len(given) == 2 else (None, {})
    if not isinstance(name, str) or not (hasattr(settings, "items") or isinstance(settings, tuple)):
        raise ValueError(f"parts: {given!r} must be a name, (name, settings) or a mapping with a name")
    return name, _fixed(dict(settings))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Reducers in the order in which they run.

    Attributes:
        parts: registered reducers: names, (name, settings) pairs, or mappings of settings with a "name".
        level: where the knob of every part stands, from 0, its cheapest value, to 1, its dearest; parts whose settings
            have their knob are left alone. None: all are.
        layers: blocks of every part that can be told and is not; None: each part's own.

    Raises:
        ValueError: no parts, an unknown one, one with parameters of its own (add it with `tokjax.reduce`), settings
            that it refuses, or a level outside [0, 1].
    """

    parts: tuple[Any, ...] = ("topk", "tome")
    level: float | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        from tokjax import reducers  # the registry knows this file

        object.__setattr__(self, "parts", tuple(_part(part) for part in self.parts))
        if not self.parts:
            raise ValueError("parts=(): must be at least one reducer")
        if self.level is not None and not 0 <= self.level <= 1:
            raise ValueError(f"level={self.level}: must be in [0, 1]")
        for name, settings in self.parts:
            if reducers.entry(name).learned:
                raise ValueError(
                    f"parts: {name!r} has parameters of its own; add it with tokjax.reduce, before or after"
                )
            reducers.create(name, **dict(settings))

    def hooks(self, info: ModelInfo) -> list[Hook]:
        """Those of the parts, in their order."""
        from tokjax import reducers

        return [
            hook
            for name, settings in self.parts
            for hook in reducers.create(name, info, **self._turned(name, dict(settings), info)).hooks(info)
        ]

    def _turned(self, name: str, settings: dict[str, Any], info: ModelInfo) -> Mapping[str, Any]:
        from tokjax import reducers

        if self.layers is not None and "layers" in reducers.settings_of(name):
            settings = {"layers": self.layers, **settings}
        knob = reducers.entry(name).knob
        if self.level is None or knob.field in settings:
            return settings
        values = knob.values(info)
        return {**settings, knob.field: values[round(self.level * (len(values) - 1))]}


def levels(info: ModelInfo) -> list[float]:
    """Levels from cheapest to dearest, as many as there are patches."""
    last = max(info.length - info.prefix - 1, 1)
    return [step / last for step in range(last + 1)]
