"""Reducers of prompts and caches on one decoder, at equal cache and at equal multiply-accumulates.

Every method's knob is turned until the cache that it leaves of a prompt, or the reading of it, costs the same share of
the unreduced model's. What is compared is the perplexity of the tokens behind the prompt, the answers to questions
about it (`tokjax.tasks.causal_lm`), and time. Models that were trained to cost less join at the cost that they have.
Rows go to `results.jsonl`; what is there is not done again.
"""

from collections.abc import Mapping
import functools
from typing import Any, ClassVar

import ml_collections
from tqdm import tqdm

from tokjax import api, budget, reducers, viz
from tokjax.bench import report, timing
from tokjax.errors import UserError
from tokjax.tasks import causal_lm
from tokjax.tasks.causal_lm import COSTS, TIMES, CausalLM
from tokjax.tasks.experiment import RESULTS, short, user_input

RELATIVE = tuple(f"{name.removesuffix('_bytes')}_relative" for name in COSTS)


def default_config() -> ml_collections.ConfigDict:
    """Fields of the comparison beside those of the decoder and its data."""
    config = causal_lm.default_config()
    config.task = "kv_compare"
    config.title = "Fewer tokens in prompts and caches"
    config.compare = compare = ml_collections.ConfigDict()
    compare.budgets = (("cache", 0.5), ("cache", 0.25), ("macs", 0.75), ("macs", 0.5))
    # name: registered; label: in tables; settings: all but the knob that reaches the budget
    compare.methods = ({"name": "fastv", "label": "FastV", "settings": {"layer": 1}},)
    compare.others = ()  # trained models: {"label": ..., "path": what `tokjax.load` reads, "reduce": (name, settings)}
    compare.timed = (("cache", 0.5), ("macs", 0.75))  # budgets at which methods are timed
    return config


class KVCompare(CausalLM):
    """The comparison; each mode is one part of it."""

    modes: ClassVar[tuple[str, ...]] = ("train", "compare", "speed", "report")

    @property
    def steps(self) -> tuple[str, ...]:
        return self.modes

    @functools.cached_property
    def base(self) -> api.Model:
        """The unreduced model, whose costs are those of a prompt."""
        return self.model().unreduced.with_config(length=self.config.data.prompt)

    def solve(self, method: Mapping[str, Any], model: api.Model, target: Any) -> budget.Solution:
        """A method at a budget, ("cache" or "macs", share)."""
        unit, share = target
        options: dict[str, Any] = {"cached" if unit == "cache" else unit: share, **dict(method["settings"])}
        return budget.solve(method["name"], model, phase="prefill" if unit == "macs" else None, **options)

    def compare(self) -> None:
        """Every method at every budget, beside the unreduced model."""
        config, model = self.config.compare, self.base
        stamp = self._stamp("compare", model)
        done = {(row["method"], row["budget"], row["target"]): row for row in self._rows("compare", model)}
        whole: dict[str, int] = {}

        def measured(each: api.Model, label: str) -> dict[str, Any]:
            row = self.evaluate(each, label)
            return row | {name: row[key] / whole.get(key, row[key]) for name, key in zip(RELATIVE, COSTS, strict=True)}

        def row_of(method: Mapping[str, Any] | None, unit: str, target: float | None) -> dict[str, Any]:
            if method is None:
                return measured(model, "unreduced")
            if unit == "own":
                return measured(self.other(method), method["label"])
            found = self.solve(method, model, (unit, target))
            field = reducers.entry(method["name"]).knob.field
            control = reducers.entry(method["name"]).control
            row = {"setting": f"{field}={short(found.settings[field])}", "control": control}
            if found.unreachable:
                return row | {"unreachable": found.unreachable}
            return row | measured(found.model, method["label"])

        work: list[tuple[Any, str, Any]] = [(None, "", None)]
        work += [(method, *target) for target in config.budgets for method in config.methods]
        work += [(method, "own", None) for method in config.others]
        with user_input(), tqdm(work, desc="compare", unit="row", disable=None) as bar:
            for method, unit, target in bar:
                label = "unreduced" if method is None else method["label"]
                bar.set_postfix_str(f"{label} {unit} {target}")
                if (label, unit, target) not in done:
                    row = {"method": label, "budget": unit, "target": target, **row_of(method, unit, target)}
                    done[label, unit, target] = row
                    report.append_jsonl(self.workdir / RESULTS, {**stamp, **report.plain(row)})
                if method is None:
                    whole = {name: done[label, unit, target][name] for name in COSTS}
        print(self.table())

    def other(self, entry: Mapping[str, Any]) -> api.Model:
        """A trained model that joins."""
        model = self._loaded(entry["path"]).with_config(length=self.config.data.prompt)
        name, settings = entry.get("reduce", ("", {}))
        return api.reduce(model, name, **dict(settings)) if name else model

    def speed(self) -> None:
        """Times of all methods at some budgets, each in one run with the unreduced model."""
        model = self.base
        for unit, share in self.config.compare.timed:
            models = {"unreduced": model}
            with user_input():
                for method in self.config.compare.methods:
                    found = self.solve(method, model, (unit, share))
                    if not found.unreachable:
                        models[method["label"]] = found.model
                models |= {each["label"]: self.other(each) for each in self.config.compare.others}
            for row in self.timed_rows(models):
                row |= {"budget": unit, "target": share, **timing.device_summary()}
                report.append_jsonl(self.workdir / RESULTS, {**self._stamp("speed", model), **row})

    def table(self) -> str:
        """All rows, a table for each kind of budget."""
        model = self.base
        rows, timed = self._rows("compare", model), self._rows("speed", model)
        if not rows:
            raise UserError(f"{self.workdir / RESULTS} has no rows: run --mode=compare first")
        first, *rest = rows
        tables = []
        for unit in dict.fromkeys(row["budget"] for row in rest):
            mine = [row for row in rest if row["budget"] == unit]
            columns = ["method", "setting", *self.metrics, *RELATIVE]
            tables.append(report.markdown_table([{**first, "budget": unit}, *mine], columns, group=("target",)))
        for unit, share in dict.fromkeys((row["budget"], row["target"]) for row in timed):
            mine = [row for row in timed if (row["budget"], row["target"]) == (unit, share)]
            latest = list({(row["method"], row["batch"]): row for row in mine}.values())
            tables.append(f"Times at {share:g} of the {'cache' if unit == 'cache' else 'MACs'}\n")
            tables[-1] += "\n" + report.markdown_table(latest, ["method", "batch", *TIMES], group=())
        return "\n\n".join(tables)

    def report(self) -> None:
        """Tables and figures from the rows that are there."""
        text = self.table()
        viz.write_whole(self.workdir / "table.md", (text + "\n").encode())
        print(text)
        rows = self._rows("compare", self.base)
        for unit, cost in (("cache", "cache_relative"), ("macs", "macs_relative")):
            mine = [row for row in rows if row["budget"] in ("", unit)]
            if len(mine) > 1 and any(cost in row for row in mine[1:]):
                for quality in self.metrics:
                    if quality in mine[0]:
                        figure = viz.pareto_plot(mine, x=cost, y=quality, title=self.config.title)
                        viz.save_png(figure, self.workdir / f"{quality}_{unit}.png")
