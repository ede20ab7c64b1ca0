"""Every training-free reducer on one trained classifier at equal cost: accuracy, speed, and what is more than noise.

A cell is (method, placement, target). Its row goes to `results.jsonl`, the classes that it predicted to `predictions/`;
what is there is not done again. Most targets are measured on a stratified part of the test images, some on all of them
(the part among them, so that every curve is drawn from the same images). Times are taken in a mode of their own, all in
one run, so that nothing else need be quiet while the accuracies are found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import ml_collections
import numpy as np
from tqdm import tqdm

from tokjax import api, budget, reducers, schedules, viz
from tokjax.bench import flops, profile, report, timing
from tokjax.buckets import Bucketed
from tokjax.data.sources import stratified
from tokjax.errors import UserError
from tokjax.tasks import classify, train_reducer
from tokjax.tasks.experiment import RESULTS, describe, part, user_input

PLACEMENTS = ("per-layer", "staged")
TRAINED = "trained"  # the placement of what learned where to reduce, or learned at places of its own
FAR = 0.03  # of the unreduced model's MACs: a setting farther from the target is not compared at it
LABELS = {
    "ats": "ATS",
    "avgpool": "average pooling",
    "chain": "Top-K + ToMe",
    "clca": "CLCA (EViT)",
    "diffrate": "DiffRate",
    "diffrate_search": "DiffRate, searched",
    "dpcknn": "DPC-KNN",
    "dynamicvit": "DynamicViT",
    "evit": "EViT",
    "evovit": "Evo-ViT",
    "gtp": "GTP",
    "heuristic": "heuristic rings",
    "kmedoids": "K-Medoids",
    "patchmerger": "PatchMerger",
    "pitome": "PiToMe",
    "random": "random drop",
    "scored": "CLS score, merged",
    "sinkhorn": "Sinkhorn",
    "sit": "SiT",
    "strided": "strided drop",
    "token_transforming_ours": "Token Transforming (ours)",
    "tokenlearner": "TokenLearner",
    "tome": "ToMe",
    "tomesd": "ToMe-SD",
    "topk": "Top-K",
}
# Settings of a placement where it is not told by `layers`; None: the method has no such form.
FORMS: dict[str, dict[str, dict[str, Any] | None]] = {
    "diffrate": {"per-layer": {}, "staged": None},
    "evovit": {"per-layer": {"stage_wise": False}, "staged": {"stage_wise": True}},
    "gtp": {"per-layer": {}, "staged": None},
    "tomesd": {"per-layer": {"merge_mlp": True}, "staged": None},  # un-merged behind every layer that it touches
}
# Settings, all but the knob; where they reduce is the method's own: three stages, or one place for those that pool.
LEARNED: dict[str, dict[str, Any]] = {
    "clca": {"reducer": "evit"},
    "diffrate_search": {"chord": True},
    "dynamicvit": {},
    "patchmerger": {},
    "sinkhorn": {},
    "sit": {},
    "tokenlearner": {},
}
CHANGES: dict[str, dict[str, Any]] = {  # of the training's config
    "diffrate_search": {"train.optimiser.lr": 0.1, "train.optimiser.final_lr": 0.01, "train.optimiser.clip_norm": None}
}
MORE = ({"name": "scored", "label": "key norm, density peaks", "settings": {"score": "key_norm", "match": "density"}},)


def default_config() -> ml_collections.ConfigDict:
    """Every field of a comparison, with its meaning; configs start from it."""
    config = train_reducer.default_config()
    config.task = "compare"
    config.compare = compare = ml_collections.ConfigDict()
    named = ({"name": name, "label": LABELS.get(name, name), "settings": {}} for name in training_free())
    compare.methods = (*named, *MORE)  # name: registered; label: in the table; settings: all but knob and layers
    # The same of reducers that `--mode=train_methods` trains at each of `whole_targets`, the network left alone;
    # changes: fields of the config in its training.
    compare.learned = tuple(
        {"name": name, "label": LABELS[name], "settings": dict(s), "changes": CHANGES.get(name, {})}
        for name, s in LEARNED.items()
    )
    compare.placements = PLACEMENTS  # per-layer: in every block; staged: in three
    compare.targets = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of the unreduced model's MACs
    compare.images = 2000  # stratified test images for every target
    compare.whole_targets = (0.8, 0.6, 0.4)  # measured on all test images
    compare.rounds = 5  # timed rounds, interleaved with the unreduced model
    compare.calls = 2  # of each of the two in a round
    compare.resamples = 2000  # of the paired bootstrap over test images

    config.lengths = lengths = ml_collections.ConfigDict()  # reducers whose counts vary by image, run three ways
    # The official variant does not obey the law of padding, so that its outputs depend on the capacity.
    lengths.methods = ({"name": "ats", "label": "ATS", "settings": {"keep_rate": 0.98}},)
    lengths.batch = 64
    lengths.rows = 8  # of a group that shares a capacity
    lengths.plain = 0.5  # share of the images that are made simple: their mean colours in a grid of two by two
    lengths.rounds = 7
    lengths.calls = 3
    return config


def training_free() -> list[str]:
    """Registered reducers without parameters of their own that need no guide."""
    return [name for name, e in sorted(reducers.REGISTRY.items()) if not (e.learned or e.guided or e.text)]


def form(name: str, placement: str, depth: int) -> dict[str, Any] | None:
    """Settings that put a reducer into every block or into three; None: it has no such form.

    Raises:
        ValueError: an unknown placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r}: must be one of {', '.join(PLACEMENTS)}")
    if name in FORMS:
        return FORMS[name][placement]
    return {"layers": tuple(range(depth)) if placement == "per-layer" else schedules.stages(depth)}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference of accuracies with its bounds, shares in -1..1."""

    difference: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        return not self.low <= 0 <= self.high


def bootstrap(
    a: Bool[Array, " n"], b: Bool[Array, " n"], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of the accuracy of `a` less that of `b` on the same images, drawn again with replacement.

    Args:
        a: whether each image was classified rightly.
        b: the same, by another model.
        resamples: draws.
        level: coverage.
        seed: of the draws.

    Raises:
        ValueError: different numbers of images, none, or a level outside (0, 1).
    """
    if a.shape != b.shape or not a.size:
        raise ValueError(f"a and b must judge the same images, got {a.shape} and {b.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be in (0, 1)")
    difference = a.astype(np.int8) - b.astype(np.int8)
    # Only three values occur, so that a resample is told by how often each is drawn.
    shares = [np.mean(difference == value) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(seed).multinomial(len(difference), shares, resamples)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / len(difference), ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(difference.mean()), float(low), float(high))


class Compare(classify.Classify):
    """Methods against each other, and against controls, at the same multiply-accumulates."""

    modes = (*classify.Classify.modes, "train_methods", "compare", "speed", "lengths", "report")
    steps = ("compare", "speed", "report")

    def methods(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Every method with every placement, as the config names them.

        Raises:
            UserError: an unknown reducer, or one whose parameters would have to be trained first.
        """
        for method in self.config.compare.methods:
            with user_input():
                learned = reducers.entry(method["name"]).learned
            if learned:
                raise UserError(f"compare.methods: {method['name']!r} needs training and cannot be compared without it")
            for placement in self.config.compare.placements:
                yield method, placement

    def compare(self) -> None:
        """Fills the table; goes on where it stopped."""
        config, model = self.config.compare, self.model().unreduced
        inputs, whole = self.inputs(model, next(iter(self.test_loader()))), model.cost()
        done = {_cell(row) for row in self._rows("compare", model)}
        if _cell({"method": "unreduced"}) not in done:
            columns, predicted = self.judged(model, "unreduced", whole=True)
            self.record(model, {**describe(model, whole), "target": None, **columns}, predicted)
        work = list(self.methods())
        with (
            user_input(),
            tqdm(total=len(work) * len(config.targets), desc="compare", unit="cell", disable=None) as bar,
        ):
            for method, placement in work:
                start = {"method": method["label"], "name": method["name"], "placement": placement}
                start["control"] = reducers.entry(method["name"]).control
                open_targets = [t for t in config.targets if _cell({**start, "target": t}) not in done]
                bar.update(len(config.targets) - len(open_targets))
                bar.set_postfix_str(f"{method['label']} {placement}")
                for target, found in self.solutions(method, placement, model, open_targets, inputs):
                    row = {**start, "target": target}
                    if reason := _unreachable(found, placement, target):
                        self.record(model, {**row, "unreachable": reason}, None)
                    elif found is not None:
                        name = f"{method['label']} {placement} {target}"
                        columns, predicted = self.judged(found.model, name, whole=target in config.whole_targets)
                        # The solution's MACs are counted on a batch, where lengths depend on the data.
                        reached = {"macs": found.macs, "macs_relative": found.relative, "settings": found.settings}
                        if reducers.entry(method["name"]).length == "dynamic":
                            reached["mean_tokens"] = budget.mean_tokens(found.model, inputs)
                        row = {**describe(found.model, whole, method["label"]), **row, **reached, **columns}
                        self.record(model, row, predicted)
                    bar.update()
        self.compare_trained(model, whole)
        print(f"Not here, since --mode=train_methods has not trained them: {self.untrained(model)}")

    def compare_trained(self, model: api.Model, whole: flops.Cost) -> None:
        """The rows of what `train_methods` has trained."""
        done = {_cell(row) for row in self._rows("compare", model)}
        for method, target, reduced in self.trained():
            start = {"method": method["label"], "name": method["name"], "placement": TRAINED, "target": target}
            if _cell(start) not in done:
                columns, predicted = self.judged(reduced, f"{method['label']} {target}", whole=True)
                self.record(model, {**describe(reduced, whole, method["label"]), **start, **columns}, predicted)

    def untrained(self, model: api.Model) -> str:
        """Names of the reducers that learn and have no row."""
        there = {row.get("name") for row in self._rows("compare", model)}
        names = [
            name
            for name, entry in sorted(reducers.REGISTRY.items())
            if entry.learned and not entry.text and name not in there
        ]
        return ", ".join(names) or "none"

    def train_methods(self) -> None:
        """Trains the reducers that learn, each at every target of `whole_targets`; goes on where it stopped.

        The network stays as it is, as for all others here; so does the head.
        """
        for method in self.config.compare.learned:
            for target in self.config.compare.whole_targets:
                self.training(method, target).run("train")

    def training(self, method: Mapping[str, Any], target: float) -> train_reducer.TrainReducer:
        """The training of a reducer at a target, whose folder has the result."""
        start = str(self.finished) if (self.finished / "config.json").is_file() else self.config.init
        changes = {
            "init": start,
            "learn.network": False,
            "learn.head": False,
            "learn.macs": target,
            **method.get("changes", {}),
        }
        settings = {"name": method["name"], **dict(method["settings"])}
        return part(train_reducer.TrainReducer, self, f"{method['name']}_{target}", changes, settings)

    def trained(self) -> Iterator[tuple[Mapping[str, Any], float, api.Model]]:
        """What `train_methods` has finished."""
        for method in self.config.compare.learned:
            for target in self.config.compare.whole_targets:
                training = self.training(method, target)
                if (training.finished / "config.json").is_file():
                    yield method, target, training.model()

    def solutions(
        self, method: Mapping[str, Any], placement: str, model: api.Model, targets: Sequence[float], inputs: Any
    ) -> Iterator[tuple[float, budget.Solution | None]]:
        """The method at each target; None where it has no form of this placement."""
        settings = form(method["name"], placement, model.info.depth)
        if settings is None or not targets:
            yield from ((target, None) for target in targets)
            return
        settings = {**settings, **dict(method["settings"])}
        found = budget.solve(method["name"], model, macs=list(targets), inputs=inputs, **settings)
        yield from zip(targets, found, strict=True)

    def speed(self) -> None:
        """Times every cell that has an accuracy, interleaved with the unreduced model; and the reducer's share."""
        config, model = self.config.compare, self.model().unreduced
        inputs = self.inputs(model, next(iter(self.test_loader())))
        count, done = len(jax.tree.leaves(inputs)[0]), {_cell(row) for row in self._rows("speed", model)}
        rows = [row for row in self._rows("compare", model) if "accuracy" in row and _cell(row) not in done]
        for row in tqdm(rows, desc="speed", unit="cell", disable=None):
            with user_input():
                reduced = self.reduced(model, row)
            runs = {"unreduced": functools.partial(model, inputs), "this": functools.partial(reduced, inputs)}
            times = timing.interleaved(runs, warmup=1, repeats=config.rounds, calls=config.calls)
            found = {
                **{key: row.get(key) for key in ("method", "placement", "target")},
                "images_per_s": count / times["this"].median_s,
                "speedup": timing.ratio(times["unreduced"], times["this"]),
                "overhead": profile.reducer_share(reduced.compiled(inputs), runs["this"]),
                "batch": count,
                **timing.device_summary(),
            }
            report.append_jsonl(self.workdir / RESULTS, {**self._stamp("speed", model), **found})

    def reduced(self, model: api.Model, row: Mapping[str, Any]) -> api.Model:
        """The model that a row of the comparison is of."""
        if row.get("placement") == TRAINED:
            named = {method["name"]: method for method in self.config.compare.learned}
            return self.training(named[row["name"]], row["target"]).model()
        return api.reduce(model, row["name"], **row["settings"]) if "settings" in row else model

    def judged(self, model: api.Model, name: str, *, whole: bool) -> tuple[dict[str, Any], Int[np.ndarray, " n"]]:
        """Accuracy and agreement with the unreduced model, and the predicted classes, -1 of images not looked at."""
        base = model.unreduced
        unreduced, labels = self.once("classes", base, lambda: self.predict(base, "unreduced"))
        part = stratified(labels, min(self.config.compare.images, len(labels)), seed=0)
        if not model.methods:
            predicted = unreduced
        elif whole:
            predicted = self.predict(model, name)[0]
        else:
            predicted = np.full_like(unreduced, -1)
            predicted[part] = self.predict_part(model, part)
        right, same = predicted == labels, predicted == unreduced
        columns = {"accuracy": right[part].mean(), "agreement": same[part].mean(), "images": len(part)}
        if whole:
            columns |= {"accuracy_all": right.mean(), "agreement_all": same.mean(), "images_all": len(labels)}
        return report.plain(columns), predicted

    def predict_part(self, model: api.Model, part: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Predicted classes of some test images, by their place in the file."""
        some = self.once("part", model.unreduced, lambda: self.examples(part))
        size, classes = self.config.eval_batch_size, []
        for start in range(0, len(part), size):
            places = np.arange(start, start + size).clip(max=len(part) - 1)  # one shape, one program
            batch = {name: values[places] for name, values in some.items()}
            classes.append(np.asarray(model(self.inputs(model, batch))).argmax(-1))
        return np.concatenate(classes)[: len(part)]

    def examples(self, part: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Readable test examples as batches hold them, by their ascending places; 2,000 of CIFAR-10 are 25 MB."""
        given: Iterator[Mapping[str, Any]] = self.batches("test", "images")
        found, first = [], 0
        for batch in given:
            valid = np.flatnonzero(batch["valid"])
            wanted = valid[part[(part >= first) & (part < first + len(valid))] - first]
            found.append({name: values[wanted] for name, values in batch.items()})
            first += len(valid)
            if first > part[-1]:
                break
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    def record(self, model: api.Model, row: dict[str, Any], predicted: Int[np.ndarray, " n"] | None) -> None:
        """The predictions first, so that a row that is there has them."""
        if predicted is not None:
            labels = self.once("classes", model, lambda: self.predict(model, "unreduced"))[1]
            buffer = io.BytesIO()
            np.savez_compressed(buffer, predicted=predicted.astype(np.int32), labels=labels.astype(np.int32))
            viz.write_whole(self.kept(model, row), buffer.getvalue())
        report.append_jsonl(self.workdir / RESULTS, {**self._stamp("compare", model), **row})

    def kept(self, model: api.Model, row: Mapping[str, Any]) -> Path:
        """Where the predictions of a cell lie."""
        name = hashlib.blake2b(repr((self._stamp("", model), _cell(row))).encode(), digest_size=8).hexdigest()
        return self.workdir / "predictions" / f"{name}.npz"

    def right(self, model: api.Model, row: Mapping[str, Any]) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Whether each image was classified rightly, and which images were looked at."""
        with np.load(self.kept(model, row)) as file:
            return file["predicted"] == file["labels"], file["predicted"] >= 0

    def variant(self) -> dict[str, Any]:
        config = self.config.compare
        return {"test_images": config.images, "whole_targets": list(config.whole_targets)}

    def report(self) -> None:
        """Tables, the Pareto figure and a page of HTML from the rows that are there."""
        model = self.model().unreduced
        timed = {_cell(row): row for row in self._rows("speed", model)}
        known = ("images_per_s", "speedup", "overhead", "batch")
        rows = [
            {**row, **knob_setting(row), **{key: timed[_cell(row)][key] for key in known if _cell(row) in timed}}
            for row in self._rows("compare", model)
        ]
        if not rows:
            raise UserError(f"{self.workdir / RESULTS} has no comparison of this model yet: run --mode=compare")
        judged = self.against_controls(model, rows)
        columns = ["method", "placement", "setting", "accuracy", "accuracy_all", "agreement", "gain", "macs_relative"]
        columns += ["mean_tokens", "images_per_s", "speedup", "overhead"]
        table = report.markdown_table(judged, columns, group=("target",))
        viz.write_whole(self.workdir / "table.md", f"{table}\n".encode())
        figures = {}
        for placement in self.config.compare.placements:
            some = [row for row in judged if row.get("placement", placement) == placement]
            if any("accuracy" in row and row.get("placement") for row in some):
                figures[placement] = viz.pareto_plot(some, title=f"{self.config.title}, {placement}")
                viz.save_png(figures[placement], self.workdir / f"pareto_{placement.replace('-', '_')}.png")
        report.write_html(
            self.workdir / "report.html",
            title=self.config.title,
            command=self.command,
            machine=timing.device_summary(),
            rows=judged,
            columns=columns,
            sections=[(f"Accuracy over cost, {name}", figure) for name, figure in figures.items()],
            summary=f"A ViT of width {model.info.width}, {model.info.depth} blocks, {model.info.length} tokens. Every "
            "method at the same multiply-accumulates, its time measured interleaved with the unreduced model. "
            f"Not here, since nothing has trained them: {self.untrained(model)}.",
        )
        print(table)
        print(f"The page is {self.workdir / 'report.html'}")

    def lengths(self) -> None:
        """Reducers of dynamic length with a mask alone, in buckets, and packed: the same logits, in less time.

        Raises:
            UserError: a reducer of static length, or one in the last block, behind which nothing can be packed.
        """
        config, model = self.config.lengths, self.model().unreduced
        batch = self.examples(np.arange(config.batch))
        images: Any = batch["image"]
        for i in np.linspace(0, len(images), round(config.plain * len(images)), endpoint=False, dtype=int):
            images[i] = _plain(images[i])
        inputs, rows = self.inputs(model, batch), []
        for method in config.methods:
            with user_input():
                reduced = api.reduce(model, method["name"], **dict(method["settings"]))
                buckets = Bucketed(reduced, rows=config.rows)
                packed = Bucketed(reduced, rows=config.rows, pack=True)
            ways: dict[str, Callable[[Any], Any]] = {"unreduced": model, "mask alone": reduced}
            ways |= {"buckets": buckets, "packed": packed}
            runs = {name: functools.partial(_on_device, way, inputs) for name, way in ways.items()}
            times = timing.interleaved(runs, warmup=2, repeats=config.rounds, calls=config.calls)
            masked = np.asarray(reduced(inputs))
            for name, way in ways.items():
                row = {
                    "method": method["label"] if name != "unreduced" else name,
                    "way": name,
                    "batch": len(images),
                    "images_per_s": len(images) / times[name].median_s,
                    "speedup": timing.ratio(times["mask alone"], times[name]),
                }
                if name != "unreduced":
                    row["largest_difference"] = float(np.abs(np.asarray(way(inputs)) - masked).max())
                    row["mean_tokens"] = budget.mean_tokens(reduced, inputs)
                if isinstance(way, Bucketed):
                    usage = way.run(inputs)[1]
                    row["filled"] = sum(usage.used) / sum(usage.slots)
                    row["counts"] = [f"{c.min()} to {c.max()}, mean {c.mean():.1f}" for c in usage.counts]
                rows.append(row)
                report.append_jsonl(
                    self.workdir / RESULTS,
                    {**self._stamp("lengths", model), **row, "plain": config.plain, **timing.device_summary()},
                )
        columns = ["method", "way", "mean_tokens", "filled", "images_per_s", "speedup", "largest_difference"]
        viz.write_whole(self.workdir / "lengths.md", f"{report.markdown_table(rows, columns, group=())}\n".encode())
        print("Speed-up over the mask alone:")
        report.print_table(rows, columns, group=())

    def against_controls(self, model: api.Model, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows with `gain`: how much better than the better control of this placement and target, in points."""
        controls = {"random", "avgpool"}
        labels = {m["label"] for m in self.config.compare.methods if m["name"] in controls}
        best: dict[tuple[Any, Any], Mapping[str, Any]] = {}
        for row in rows:
            place = row.get("placement"), row.get("target")
            if row["method"] in labels and "accuracy" in row:
                best[place] = max(best.get(place, row), row, key=lambda each: each["accuracy"])
        for (_, target), row in list(best.items()):  # what was trained has no placement: the better of all controls
            anywhere = best.get((TRAINED, target), row)
            best[TRAINED, target] = max(anywhere, row, key=lambda each: each["accuracy"])
        out = []
        for row in rows:
            control = best.get((row.get("placement"), row.get("target")))
            gain = None
            if control is not None and control is not row and "accuracy" in row:
                (right, seen), (theirs, also) = self.right(model, row), self.right(model, control)
                both = seen & also
                found = bootstrap(right[both], theirs[both], resamples=self.config.compare.resamples)
                gain = (
                    f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
                    + " *" * found.beyond_noise
                )
            out.append({**row, **({"gain": gain} if gain else {})})
        return out


def _unreachable(found: budget.Solution | None, placement: str, target: float) -> str | None:
    """Why a target has no numbers; None: it has."""
    if found is None:
        return f"has no {placement} form"
    # Such as ATS, which at its dearest still drops what it drew twice.
    if found.reached and abs(found.relative - target) > FAR:
        return f"comes no nearer than {found.relative:.2f} of the MACs"
    return found.unreachable


def knob_setting(row: Mapping[str, Any]) -> dict[str, str]:
    """`setting` of a recorded row without what its placement says already: the knob's value, over blocks its mean."""
    if "settings" not in row:
        return {}
    field = reducers.entry(row["name"]).knob.field
    return {"setting": f"{field}={np.mean(row['settings'][field]):.3g}"}


def _on_device(way: Callable[[Any], Any], inputs: Any) -> Array:
    """Logits to wait for; those of `Bucketed` are on the host already."""
    return jnp.asarray(way(inputs))


def _plain(image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """The mean colours of the image's four quarters."""
    height, width, channels = image.shape
    quarters = image[: height // 2 * 2, : width // 2 * 2].reshape(2, height // 2, 2, width // 2, channels)
    means = quarters.mean((1, 3))
    rows, columns = (np.minimum(np.arange(side) // (side // 2), 1) for side in (height, width))
    return means[np.ix_(rows, columns)]


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["method"], row.get("placement"), row.get("target")
