"""Ways to make a byte-level encoder shorter, trained alike and compared at equal cost.

Every method of `config.study.methods` is trained from the same start, once a seed, with the fields of the config that
the method changes; where `config.study.start_steps` says so, that start is a model trained without any of them. What is
then compared is bits per byte, deleted bytes, multiply-accumulates, and time with the deleted bytes gone. Rows go to
`results.jsonl`, runs to `runs/`; what is there is not done again.
"""

from collections.abc import Mapping
import functools
from typing import Any

import ml_collections
import numpy as np

from tokjax import viz
from tokjax.bench import report, timing
from tokjax.errors import UserError
from tokjax.tasks import byte_lm
from tokjax.tasks.byte_lm import TIMES, ByteLM
from tokjax.tasks.experiment import RESULTS, lines, part

FIGURES = ("bits_per_byte", "sequence_accuracy", "deleted", "macs")
CURVES = "metrics.jsonl"


def default_config() -> ml_collections.ConfigDict:
    """Fields of the study beside those of every run in it."""
    config = byte_lm.default_config()
    config.task = "byte_study"
    config.study = study = ml_collections.ConfigDict()
    study.seeds = (0, 1, 2)
    study.start_steps = 0  # of a training without a reducer, from whose model all methods go on; 0: of `config.init`
    # label: its own; family: a line in the figures; reduce: the reducer and its settings; changes: of other fields,
    # such as {"control.target": 0.5}. The first is what costs are relative to.
    study.methods = ({"label": "ByT5", "family": "ByT5", "reduce": {"name": ""}, "changes": {}},)
    study.controls = ("random", "decoder alone")  # families that look at nothing
    study.languages = ""  # a folder of one text a language, on which trained models are looked at; empty: none
    study.quality = "bits_per_byte"  # what tables and figures show first
    return config


class ByteStudy(ByteLM):
    """The study; each mode is one part of it."""

    modes = ("train_methods", "compare", "speed", "report")
    shared = ()

    @functools.cached_property
    def start(self) -> ByteLM:
        """The training that all methods go on from."""
        steps, seed = self.config.study.start_steps, self.config.study.seeds[0]
        changes = {f"train.{name}": steps for name in ("total_steps", "eval_every", "checkpoint_every")}
        return part(ByteLM, self, "start", {**changes, "seed": seed, "train.seed": seed}, {"name": ""})

    def train_methods(self) -> None:
        """Trains the start, then every method with every seed; runs that are done are loaded at once."""
        if self.config.study.start_steps:
            print("-- start", flush=True)
            self.start.run("train")
        for method, seed in self.cells():
            print(f"-- {method['label']}, seed {seed}", flush=True)
            self.training(method, seed).run("train")

    def cells(self) -> list[tuple[Mapping[str, Any], int]]:
        return [(method, seed) for seed in self.config.study.seeds for method in self.config.study.methods]

    def training(self, method: Mapping[str, Any], seed: int, changes: Mapping[str, Any] | None = None) -> ByteLM:
        """One training, with a folder of its own."""
        own = {**dict(method["changes"]), **(changes or {}), "seed": seed, "train.seed": seed}
        if self.config.study.start_steps:
            own["init"] = str(self.start.finished)
        return part(ByteLM, self, _folder(method["label"], seed), own, method["reduce"])

    def done(self, mode: str) -> dict[tuple[str, int, str], dict[str, Any]]:
        rows = [row for row in lines(self.workdir / RESULTS) if row.get("mode") == mode]
        return {(row["method"], row["seed"], row["form"]): row for row in rows}

    def note(self, mode: str, row: Mapping[str, Any]) -> None:
        report.append_jsonl(self.workdir / RESULTS, {"mode": mode, **report.plain(dict(row))})

    def compare(self) -> None:
        """Every trained model on the test data, deleted bytes gone and only masked; and on other languages."""
        have = self.done("compare")
        for method, seed in self.cells():
            for form in ("hard", "soft"):
                if (method["label"], seed, form) in have:
                    continue
                task = self.training(method, seed)
                model = task.model()
                if form == "soft" and model.learning() is model:
                    continue
                each = model.learning() if form == "soft" else model
                row = {"method": method["label"], "seed": seed, "form": form}
                row |= task.evaluate(each, f"{method['label']} {form}")
                if self.config.study.languages and form == "hard" and model.methods:
                    row["languages"] = self.abroad(method, seed)
                self.note("compare", row)
                told = {key: row[key] for key in FIGURES if key in row}
                print(", ".join([f"{method['label']} {form} {seed}", *(f"{k} {v:.4g}" for k, v in told.items())]))

    def abroad(self, method: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Metrics by language of texts that nobody trained on."""
        data = {
            "data.path": self.config.study.languages,
            "data.source": "languages",
            "data.test_split": "all",
            "data.task": "span_corruption",
        }
        task = self.training(method, seed, data)
        return task.evaluate(task.model(), f"{method['label']} languages")["by_group"]

    def speed(self) -> None:
        """Time of the first seed's models, all in one run, interleaved."""
        seed = self.config.study.seeds[0]
        parts = {method["label"]: self.training(method, seed) for method in self.config.study.methods}
        for row in self.timed_rows({label: (task, task.model()) for label, task in parts.items()}):
            self.note("speed", {**row, "seed": seed, "form": "hard", **timing.device_summary()})

    # Report

    def table(self) -> list[dict[str, Any]]:
        """A row for every method and form: means and standard deviations over the seeds."""
        compared, timed, rows = self.done("compare"), self.done("speed"), []
        methods = self.config.study.methods
        whole = [row["macs"] for (label, _, _), row in compared.items() if label == methods[0]["label"]]
        for method, form in ((method, form) for method in methods for form in ("hard", "soft")):
            own = [row for (label, _, f), row in compared.items() if (label, f) == (method["label"], form)]
            if not own:
                continue
            family = method["family"]
            row: dict[str, Any] = {"method": family, "setting": method["label"].removeprefix(family).strip()}
            row |= {"form": form if method["reduce"]["name"] else "", "control": family in self.config.study.controls}
            for name in FIGURES:
                values = [each[name] for each in own]
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row |= {name: float(np.mean(values)), f"{name}_sd": sd}
            if whole:
                row["macs_relative"] = row["macs"] / float(np.mean(whole))
            found = [each for (label, _, f), each in timed.items() if (label, f) == (method["label"], form)]
            row |= {name: found[-1][name] for name in TIMES if found}
            rows.append(row)
        return rows

    def report(self) -> None:
        """Tables and figures from the rows that are there."""
        rows, quality = self.table(), self.config.study.quality
        if not rows:
            raise UserError(f"{self.workdir / RESULTS} has no rows: run --mode=compare first")
        shown = [{**row, **{name: _spread(row, name) for name in FIGURES[:3]}} for row in rows]
        told = (report.Column(name, name.replace("_", " "), str) for name in ("form", *FIGURES[:3]))
        columns: list[Any] = ["method", "setting", *told, "macs_relative", *TIMES]
        tables = [report.markdown_table(shown, columns, group=())]
        if abroad := self.languages():
            names = [name for name in abroad[0] if name != "method"]
            percent = [report.Column(name, name, lambda share: f"{100 * share:.0f}") for name in names]
            first = report.Column("method", "deleted, %", str)
            tables.append(report.markdown_table(abroad, [first, *percent], group=()))
        viz.write_whole(self.workdir / "table.md", ("\n\n".join(tables) + "\n").encode())
        print("\n\n".join(tables))
        hard = [row for row in rows if row["form"] != "soft"]
        baseline = self.config.study.methods[0]["family"]
        figure = viz.pareto_plot(hard, y=quality, baseline=baseline, title=self.config.title, spread=f"{quality}_sd")
        viz.save_png(figure, self.workdir / "pareto.png")
        curves = {
            method["label"]: lines(
                self.workdir / "runs" / _folder(method["label"], self.config.study.seeds[0]) / CURVES
            )
            for method in self.config.study.methods
            if self.config.control.target is not None or "control.target" in method["changes"]
        }
        if any(curves.values()):
            panels = ("loss/cross_entropy", "rate", "weight")
            viz.save_png(viz.curves_plot(curves, panels, title="Training"), self.workdir / "training.png")

    def languages(self) -> list[dict[str, Any]]:
        """Deleted share by language of the first seed's models, a row a model."""
        rows = [row for row in self.done("compare").values() if row["seed"] == self.config.study.seeds[0]]
        return [
            {"method": row["method"], **{name: part["deleted"] for name, part in row["languages"].items()}}
            for row in rows
            if "languages" in row
        ]


def _folder(label: str, seed: int) -> str:
    return "".join(c if c.isalnum() or c == "." else "_" for c in label.lower()) + f"_{seed}"


def _spread(row: Mapping[str, Any], name: str) -> str:
    sd = row[f"{name}_sd"]
    return f"{row[name]:.3f}" + ("" if sd is None else f" ± {sd:.3f}")
