"""Learned rates against hand-set schedules, at the same multiply-accumulates, before and after the same fine-tuning.

DiffRate's rates are searched at every target, once a seed. Each method is then held against them with every hand-set
course of counts (`schedules.course`), whose strength is solved for the MACs that the searched rates reached. Which
course a method goes on with is decided on training images, as the rates are; test images only judge. Then the networks
of all are trained further, all the same way. Rows go to `results.jsonl`, runs to `runs/`; what is there is not redone.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import itertools
import json
from typing import Any, get_args

import ml_collections
import numpy as np
from tqdm import tqdm

from tokjax import api, schedules, viz
from tokjax.bench import report, timing
from tokjax.errors import UserError
from tokjax.reducers.vit import pitome
from tokjax.tasks import train_reducer
from tokjax.tasks.classify import Classify
from tokjax.tasks.experiment import RESULTS, part, tuples, user_input
from tokjax.tasks.train_reducer import TrainReducer

COURSES = get_args(schedules.Course)
SEARCHED = "searched"  # the course that was learned
METHODS = {"tome": "ToMe", "pitome": "PiToMe", "evit": "EViT", "topk": "Top-K", "diffrate": "DiffRate"}
LABELS = {"dynamicvit": "DynamicViT"}
STAGES = (("before", "accuracy %"), ("after", "fine-tuned %"))
HALVING = frozenset({"tome", "pitome"})  # one block merges at most half of the tokens
FAR = 0.01  # of the unreduced model's MACs: a course that comes no nearer to the target is not compared at it


def default_config() -> ml_collections.ConfigDict:
    """Every field of the study, with its meaning; `train` and `learn` are those of the fine-tuning."""
    config = train_reducer.default_config()
    config.task = "rates"
    config.study = study = ml_collections.ConfigDict()
    study.targets = (0.5, 0.4, 0.3)  # of the unreduced model's MACs
    study.seeds = (0, 1, 2)
    study.methods = tuple(METHODS)  # each with every hand-set course
    study.courses = COURSES  # hand-set ones to try, see `schedules.course`
    study.predictors = ("dynamicvit",)  # methods that only fine-tuning brings in; the knob is solved for the target
    study.images = 2500  # training images on which courses are chosen
    study.search = search = ml_collections.ConfigDict()
    search.steps = 300
    search.lr = 0.1  # published: 0.01 for twelve times as many steps
    search.final_lr = 0.01
    search.chord = True  # see DiffRateSearch
    search.granularity = 4  # step between candidate counts
    search.batch_size = 64
    return config


def settings_for(name: str, left: Sequence[int], patches: int, prefix: int) -> dict[str, Any]:
    """Settings with which a method leaves these patches after every block.

    Args:
        name: one of `METHODS`.
        left: patches after every block, never rising. EViT's fused token counts among them, so that it can leave no
            fewer than two; merging leaves no fewer than half.
        patches: at the input.
        prefix: tokens before the patches.

    Raises:
        ValueError: another method.
    """
    before = (patches, *left[:-1])
    layers = tuple(i for i, (b, a) in enumerate(zip(before, left, strict=True)) if a < b)
    if name == "tome":
        return {"r": tuple(b - a for b, a in zip(before, left, strict=True))}
    if name == "pitome":
        return {"keep_rate": tuple(_pitome_rate(b - a, b) for b, a in zip(before, left, strict=True))}
    if name == "topk":
        return {"layers": layers, "kept": tuple(left[i] for i in layers)}
    if name == "evit":
        return {"layers": layers, "kept": tuple(max(1, left[i] - 1) for i in layers)}
    if name == "diffrate":  # of what leaves, half is pruned and half merged
        return {
            "prune_kept": tuple(prefix + b - (b - a) // 2 for b, a in zip(before, left, strict=True)),
            "merge_kept": tuple(prefix + a for a in left),
        }
    raise ValueError(f"name={name!r}: must be one of {', '.join(METHODS)}")


def _pitome_rate(gone: int, tokens: int) -> float:
    """A keep rate with which PiToMe merges so many of these tokens away; counts are rounded down in its code.

    Raises:
        ValueError: more than half of them.
    """
    if 2 * gone > tokens:
        raise ValueError(f"gone={gone}: PiToMe merges at most half of {tokens} tokens")
    rate = (tokens - gone) / tokens
    while pitome.removed(rate, tokens) < gone:
        rate = np.nextafter(rate, 0)
    return float(rate)


def at_cost(
    name: str, kind: schedules.Course, model: api.Model, macs: float
) -> tuple[api.Model, dict[str, Any], tuple[int, ...]]:
    """The method with the course whose strength brings its cost nearest to a share of the model's MACs.

    Returns:
        The reduced model, its settings, and the patches left after every block.
    """
    info, whole, tried = model.info, model.cost().total, {}
    patches = info.length - info.prefix

    def of(strength: float) -> tuple[float, Any]:
        left = schedules.course(kind, strength, patches, info.depth, halving=name in HALVING)
        if left not in tried:
            settings = settings_for(name, left, patches, info.prefix)
            reduced = api.reduce(model, name, **settings)
            tried[left] = reduced.cost().total / whole, reduced, settings
        return tried[left][0], left

    low, high = 0.0, 1.0
    while of(high)[0] > macs and high < 64:
        low, high = high, 2 * high
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if of(middle)[0] > macs else (low, middle)
    left = min(tried, key=lambda each: abs(tried[each][0] - macs))
    return tried[left][1], tried[left][2], left


class Rates(TrainReducer):
    """The study; each mode is one part of it."""

    modes = (*TrainReducer.modes, "search", "schedules", "finetune", "report")
    steps = ("search", "schedules", "finetune", "report")

    @functools.cached_property
    def start(self) -> api.Model:
        """The unreduced model that all parts start from.

        Raises:
            UserError: none is named.
        """
        if self.initial is None:
            raise UserError("config.init is empty: the study starts from a trained classifier")
        return self.initial.unreduced

    @functools.cached_property
    def choosing(self) -> Classify:
        """A task whose test images are training images, without augmentation."""
        config = self.config.copy_and_resolve_references()
        config.data.test_split, config.data.test_subset = config.data.train_split, config.study.images
        return Classify(config, self.workdir, self.command)

    def done(self, mode: str) -> list[dict[str, Any]]:
        return self._rows(mode, self.start)

    def note(self, mode: str, row: Mapping[str, Any]) -> None:
        report.append_jsonl(self.workdir / RESULTS, {**self._stamp(mode, self.start), **report.plain(dict(row))})

    def search(self) -> None:
        """The rates, by gradient, the network frozen."""
        study, have = self.config.study, {(row["target"], row["seed"]) for row in self.done("search")}
        for target, seed in ((t, s) for t in study.targets for s in study.seeds):
            if (target, seed) in have:
                continue
            steps = study.search.steps
            changes = {
                "seed": seed,
                "batch_size": study.search.batch_size,
                "learn.network": False,
                "learn.head": False,
                "train.seed": seed,
                "train.total_steps": steps,
                "train.log_every": max(1, steps // 60),
                "train.optimiser.lr": study.search.lr,
                "train.optimiser.final_lr": study.search.final_lr,
                "train.optimiser.warmup_steps": 0,
                "train.optimiser.weight_decay": 0.0,
                "train.optimiser.clip_norm": None,
                "train.checkpoint_every": steps,
            }
            settings = {"name": "diffrate_search", "target": target, "chord": study.search.chord}
            settings["granularity"] = study.search.granularity
            run = part(TrainReducer, self, f"search_{target}_{seed}", changes, settings)
            run.run("train")
            table = json.loads((run.workdir / "rates.json").read_text())
            kept: dict[str, Any] = {name: tuple(table[name]) for name in ("prune_kept", "merge_kept")}
            model = api.reduce(self.start, "diffrate", **kept)
            share = model.cost().total / self.start.cost().total
            self.note("search", {"target": target, "seed": seed, "settings": kept, "macs_relative": share})

    def schedules(self) -> None:
        """Every method with every hand-set course at the MACs of the searched rates, and with one seed's counts."""
        study, info = self.config.study, self.start.info
        have = {_cell(row) for row in self.done("schedules")}
        patches, searched = info.length - info.prefix, self.done("search")
        work: list[tuple[float, str, str, Any]] = []
        for target in study.targets:
            found = [row for row in searched if row["target"] == target]
            if len(found) < len(study.seeds):
                raise UserError(f"the rates at {target} are not all searched: run --mode=search first")
            macs = float(np.mean([row["macs_relative"] for row in found]))
            work += [(target, name, kind, macs) for name in study.methods for kind in study.courses]
            work += [(target, "diffrate", SEARCHED, row) for row in found]
            work += [(target, name, SEARCHED, found[0]) for name in study.methods if name != "diffrate"]
        if _cell({"method": "unreduced"}) not in have:
            self.note("schedules", {"method": "unreduced", **self.judged(self.start, "unreduced")})
        for target, name, kind, at in tqdm(work, desc="schedules", unit="cell", disable=None):
            row = {"target": target, "method": name, "course": kind, "seed": at["seed"] if kind == SEARCHED else None}
            if _cell(row) in have:
                continue
            with user_input():
                if kind != SEARCHED:
                    model, settings, left = at_cost(name, kind, self.start, at)
                else:
                    left = _left(at["settings"], info)
                    steps = itertools.pairwise((patches, *left))
                    if name in HALVING and any(2 * after < before for before, after in steps):
                        reason = "a block of it keeps less than half of its tokens"
                        self.note("schedules", {**row, "left": left, "unreachable": reason})
                        continue
                    settings = at["settings"] if name == "diffrate" else settings_for(name, left, patches, info.prefix)
                    model = api.reduce(self.start, name, **tuples(settings))
            share = model.cost().total / self.start.cost().total
            row |= {"settings": settings, "left": left, "macs_relative": share}
            if kind != SEARCHED and abs(share - at) > FAR:
                self.note("schedules", {**row, "unreachable": f"comes no nearer than {share:.2f} of the MACs"})
                continue
            self.note("schedules", {**row, **self.judged(model, f"{name} {kind} {target}")})

    def judged(self, model: api.Model, name: str) -> dict[str, float]:
        """Accuracy and loss on test images, and on the training images on which courses are chosen."""
        test = self.evaluation(model)(model.params)
        chosen = self.choosing.evaluation(model)(model.params)
        return {**test, **{f"choosing_{key}": value for key, value in chosen.items()}}

    def chosen(self, target: float, method: str) -> dict[str, Any] | None:
        """Of a method's hand-set courses the one with the lowest loss on training images; None: none is there."""
        rows = [
            row
            for row in self.done("schedules")
            if row.get("target") == target and row["method"] == method and row["course"] != SEARCHED and "loss" in row
        ]
        return min(rows, key=lambda row: row["choosing_loss"], default=None)

    def tuned(self) -> Iterator[dict[str, Any]]:
        """What is fine-tuned: `target`, `seed`, `method`, `course`, `settings`."""
        study = self.config.study
        for seed in study.seeds:  # outermost: what a stopped run has is whole seeds
            for target in study.targets:
                for row in self.done("search"):
                    if (row["target"], row["seed"]) == (target, seed):
                        yield {**row, "method": "diffrate", "course": SEARCHED}
                for name in study.methods:
                    best = self.chosen(target, name)
                    if best is not None:
                        yield {**best, "seed": seed}
                for name in study.predictors:
                    yield {"target": target, "seed": seed, "method": name, "course": "staged", "settings": {}}
                yield {"target": target, "seed": seed, "method": "unreduced", "course": None, "settings": {}}

    def finetune(self) -> None:
        """The same short training of the network for all; the rates stay."""
        have = {_cell(row) for row in self.done("finetune")}
        for row in self.tuned():
            name, target, seed, settings = (row[k] for k in ("method", "target", "seed", "settings"))
            if name == "unreduced":
                target = row["target"] = None
            if _cell(row) in have:
                continue
            have.add(_cell(row))
            macs = target if name in self.config.study.predictors else None
            changes = {"seed": seed, "train.seed": seed, **({} if macs is None else {"learn.macs": macs})}
            label = f"finetune_{name}_{row['course']}_{target}_{seed}"
            if name == "unreduced":
                run: Classify = self.plain(label, changes)
            else:
                run = part(TrainReducer, self, label, changes, {"name": name, **tuples(settings)})
            run.run("train")
            model = run.model()
            share = model.cost().total / self.start.cost().total
            kept = {key: row[key] for key in ("target", "seed", "method", "course")}
            self.note("finetune", {**kept, "macs_relative": share, **self.evaluation(model)(model.params)})

    def report(self) -> None:
        """Table and figures from the rows that are there."""
        rows, config = self.table(), self.config
        columns: list[Any] = ["method", "course", "macs_relative", *(report.Column(*each, str) for each in STAGES)]
        table = report.markdown_table(rows, columns, group=("target",))
        viz.write_whole(self.workdir / "table.md", f"{table}\n".encode())
        print(table)
        for stage, title in (("before", "without fine-tuning"), ("after", "after the same fine-tuning")):
            some = [{**row, "accuracy": row.get(f"{stage}_mean"), "spread": row.get(f"{stage}_sd")} for row in rows]
            if any(viz.is_number(row["accuracy"]) for row in some):
                drawn = viz.pareto_plot(some, title=f"{config.title}, {title}", spread="spread")
                viz.save_png(drawn, self.workdir / f"{stage}.png")
        for target in config.study.targets:
            counts = self.counts(target)
            if counts:
                figure = viz.token_count_plot(counts, title=f"Tokens at {target} of the MACs")
                viz.save_png(figure, self.workdir / f"tokens_{target}.png")
            for seed in config.study.seeds:
                if course := self.learning_course(target, seed):
                    figure = viz.curves_plot(course, ("tokens",), title=f"Tokens after every block, seed {seed}")
                    viz.save_png(figure, self.workdir / f"search_{target}_{seed}.png")
        report.write_html(
            self.workdir / "report.html",
            title=config.title,
            command=self.command,
            machine=timing.device_summary(),
            rows=rows,
            columns=columns,
            summary=f"{len(config.study.seeds)} seeds; the spread is the standard deviation over them.",
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for every method and target: the searched rates over the seeds, of the others the chosen course."""
        judged, tuned = self.done("schedules"), self.done("finetune")

        def row(target: float | None, label: str, name: str, course: str | None) -> dict[str, Any]:
            own, after = (
                [
                    each
                    for each in rows
                    if (each["method"], each.get("course"), each.get("target")) == (name, course, target)
                ]
                for rows in (judged, tuned)
            )
            shares = [each["macs_relative"] for each in own or after if "macs_relative" in each]
            found = {"macs_relative": float(np.mean(shares)) if shares else None}
            return {
                "target": target,
                "method": label,
                "course": course,
                **found,
                **_spread(own, "before"),
                **_spread(after, "after"),
            }

        rows = [{**row(None, "unreduced", "unreduced", None), "macs_relative": 1.0}]
        for target in self.config.study.targets:
            rows.append(row(target, "DiffRate, searched", "diffrate", SEARCHED))
            for name in self.config.study.methods:
                if best := self.chosen(target, name):
                    rows.append(row(target, METHODS[name], name, best["course"]))
                if name != "diffrate":
                    rows.append(row(target, f"{METHODS[name]}, searched", name, SEARCHED))
            rows += [row(target, LABELS.get(name, name), name, "staged") for name in self.config.study.predictors]
        return [each for each in rows if "before" in each or "after" in each]

    def counts(self, target: float) -> dict[str, list[float]]:
        """Tokens after every block: of the searched rates, one line a seed, and of the chosen courses."""
        prefix, lines = self.start.info.prefix, {}
        for row in self.done("schedules"):
            if row.get("target") == target and row["method"] == "diffrate" and row["course"] == SEARCHED:
                lines[f"searched, seed {row['seed']}"] = [prefix + n for n in row["left"]]
        for name in self.config.study.methods:
            best = self.chosen(target, name)
            if best is not None:
                lines[f"{METHODS[name]}, {best['course']}"] = [prefix + n for n in best["left"]]
        return lines

    def learning_course(self, target: float, seed: int) -> list[dict[str, float]]:
        """The counts on their way through a search, a row for every line that its training wrote."""
        path, mark = self.workdir / "runs" / f"search_{target}_{seed}" / "metrics.jsonl", "reducer/kept/"
        rows = report.read_jsonl(path) if path.is_file() else []
        return [
            {"step": row["step"]} | {f"block {k.rpartition('/')[2]}/tokens": v for k, v in row.items() if mark in k}
            for row in rows
            if any(mark in key for key in row)
        ]

    def plain(self, name: str, changes: Mapping[str, Any]) -> Classify:
        """The same training without a reducer."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(changes))
        config.reduce.name = ""
        return Classify(config, self.workdir / "runs" / name, self.command)


def _spread(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Mean accuracy and standard deviation over the seeds, as numbers and as text."""
    found = [row["accuracy"] for row in rows if "accuracy" in row]
    if not found:
        return {}
    mean, sd = float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None
    text = f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")
    return {name: text, f"{name}_mean": mean, f"{name}_sd": sd}


def _left(settings: Mapping[str, Any], info: Any) -> tuple[int, ...]:
    """Patches after every block of searched counts, where the smallest so far holds."""
    kept = np.minimum(settings["prune_kept"], settings["merge_kept"])
    return tuple(int(k) - info.prefix for k in np.minimum(np.minimum.accumulate(kept), info.length))


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["method"], row.get("course"), row.get("target"), row.get("seed")
