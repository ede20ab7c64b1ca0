"""Image classification: train a ViT, evaluate it, sweep reducers over budgets, time it, draw what merged."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
from pathlib import Path
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict
import numpy as np
from tqdm import tqdm

from tokjax import api, budget, data, reducers, viz
from tokjax.bench import flops, report, timing
from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig, preset
from tokjax.pretrained.preprocess import Preprocess
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.config import TrainConfig
from tokjax.train.config import default_config as train_config
from tokjax.train.loop import train
from tokjax.train.losses import accuracy, cross_entropy

RESULTS = "results.jsonl"


def default_config() -> ml_collections.ConfigDict:
    """Every field of a classification experiment, with its meaning; configs start from it."""
    config = ml_collections.ConfigDict()
    config.task = "classify"
    config.mode = "all"  # what runs without --mode
    config.title = "Token reduction"
    config.seed = 0
    config.batch_size = 64  # of training
    config.eval_batch_size = 128
    config.init = ""  # a checkpoint to start from: folder, file or hub id; empty: random weights
    config.model = model_config("s/16")
    config.reduce = reduce = ml_collections.ConfigDict()  # a reducer that is on in every mode; empty: none
    reduce.name = ""
    reduce.r = config_dict.placeholder(int)
    reduce.keep_rate = config_dict.placeholder(float)
    config.data = data.default_config()
    config.train = train_config(total_steps=1000)

    config.sweep = sweep = ml_collections.ConfigDict()
    sweep.targets = (0.8, 0.6, 0.4)  # of the unreduced model's MACs
    sweep.methods = (  # name: registered; label: in the table; settings: all but the knob that reaches the target
        {"name": "tome", "label": "ToMe", "settings": {}},
        {"name": "evit", "label": "EViT", "settings": {}},
        {"name": "topk", "label": "Top-K", "settings": {}},
        {"name": "random", "label": "random drop", "settings": {}},
        {"name": "avgpool", "label": "average pooling", "settings": {}},
    )
    sweep.repeats = 5  # timed rounds, interleaved with the unreduced model
    sweep.seconds = 0.2  # at least, for each of the two in a round

    config.bench = bench = ml_collections.ConfigDict()  # fixed settings, timed side by side in one run
    bench.methods = ({"name": "tome", "label": "ToMe", "settings": {"r": 8}},)
    bench.batch_sizes = (1, 32)
    bench.repeats = 5
    bench.seconds = 0.5

    config.viz = ml_collections.ConfigDict()
    config.viz.images = 4  # test images to draw
    config.viz.target = 0.6  # share of the MACs at which the methods are drawn
    return config


def model_config(name: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """A preset such as "s/16" ("": ViTConfig's defaults) and fields of ViTConfig to change; None changes nothing."""
    config = ml_collections.ConfigDict({"preset": name})
    for field in dataclasses.fields(ViTConfig):
        if field.name != "image_size":  # the data's
            config[field.name] = config_dict.placeholder(float if field.default is None else type(field.default))
    config.update(changes)
    return config


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Errors of values that come from the config are the user's to mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _AsPretrained:
    """A pretrained model's resizing and cropping, as a transform of the data."""

    preprocess: Preprocess

    @property
    def size(self) -> tuple[int, int]:
        return self.preprocess.size

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(self.preprocess.transform(image))


class Classify:
    """The task; each mode is a method, and each works from what the workdir holds."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, command: str):
        self.config, self.workdir, self.command = config, workdir, command
        self._test: data.Loader | None = None

    def run(self, mode: str) -> None:
        """Runs one mode; "all" is train, sweep, bench and viz with the report.

        Raises:
            UserError: whatever is wrong with config, data or checkpoints.
        """
        modes: dict[str, Callable[[], None]] = {
            "train": self.train,
            "eval": self.eval,
            "sweep": self.sweep,
            "bench": self.bench,
            "viz": self.viz,
        }
        if mode not in ("all", *modes):
            raise UserError(f"mode={mode!r}: must be one of all, {', '.join(modes)}")
        for step in ("train", "sweep", "bench", "viz") if mode == "all" else (mode,):
            print(f"== {step}", flush=True)
            modes[step]()

    # Models

    @property
    def finished(self) -> Path:
        """Where the trained model lies, as `tokjax.load` reads it."""
        return self.workdir / "model"

    @functools.cached_property
    def initial(self) -> api.Model | None:
        """The checkpoint of `config.init`, if there is one; its preprocessing wins over the config's."""
        if not self.config.init:
            return None
        return self._loaded(self.config.init)

    def _loaded(self, source: str | Path) -> api.Model:
        with user_input():
            size, dtype = tuple(self.config.data.image_size), self.config.model.get("dtype")
            return api.load(source, image_size=size, dtype=dtype)

    def fresh(self) -> api.Model:
        """The model before training: random weights, or those of `config.init`; with the reducer of `config.reduce`."""
        config, size = self.config, tuple(self.config.data.image_size)
        fields = {k: v for k, v in config.model.to_dict().items() if k != "preset" and v is not None}
        with user_input():
            if self.initial is not None:
                return self._reduced(self.initial)
            classes = fields.pop("num_classes", None) or self.test_loader().source.num_classes
            fields = {"image_size": size, "num_classes": classes, **fields}
            shape = preset(config.model.preset, **fields) if config.model.preset else ViTConfig(**fields)
            return self._reduced(api.build(shape, config.seed, preprocess=self._preprocess(size)))

    def _reduced(self, model: api.Model) -> api.Model:
        name = self.config.reduce.name
        settings = {k: v for k, v in self.config.reduce.items() if k != "name" and v is not None}
        if settings and not name:
            raise UserError(f"config.reduce={settings}: has no name; one of {', '.join(sorted(reducers.REGISTRY))}")
        saved = [(method.name, dict(method.settings)) for method in model.methods]
        if not name or saved == [(name, settings)]:  # a model that was trained reduced brings its reducer
            return model
        return api.reduce(model.unreduced, name, **settings)

    def _preprocess(self, size: tuple[int, int]) -> Preprocess:
        config = self.config.data
        mean, std = tuple(config.mean), tuple(config.std)
        if config.resize.mode == "square":
            return Preprocess(size=size, resize="square", resize_to=size, crop=False, mean=mean, std=std)
        short = int(min(size) / config.resize.crop_pct)
        return Preprocess(size=size, resize="short", resize_to=short, mean=mean, std=std)

    def model(self) -> api.Model:
        """The trained model of the workdir, the best checkpoint of a training under way, or `config.init`.

        Raises:
            UserError: there is none of these.
        """
        checkpoints = Checkpoints(self.workdir / "checkpoints")
        if (self.finished / "config.json").is_file():
            with user_input():
                return self._reduced(self._loaded(self.finished))
        if checkpoints.steps():
            model = self.fresh()
            return model.with_params(checkpoints.restore_params(model.params, "best"))
        if self.config.init:
            return self.fresh()
        raise UserError(
            f"{self.workdir} holds no model: train one with --mode=train, or name one with "
            f"--config.init=FOLDER_OR_HUB_ID"
        )

    # Data

    def test_loader(self) -> data.Loader:
        """Test images, prepared as the checkpoint of `config.init` wants them where there is one."""
        if self._test is None:
            preprocess = self.initial.preprocess if self.initial else None
            self._test = data.make(
                self.config.data,
                "test",
                batch_size=self.config.eval_batch_size,
                train=False,
                transform=_AsPretrained(preprocess) if preprocess else None,
                normalise=self._normalise(),
            )
        return self._test

    def _normalise(self) -> data.Normalise | None:
        if self.initial is None or self.initial.preprocess is None:
            return None
        (m1, m2, m3), (s1, s2, s3) = self.initial.preprocess.mean, self.initial.preprocess.std
        return data.Normalise((m1, m2, m3), (s1, s2, s3))

    def predict(self, model: api.Model, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and true class of every readable test image, in order.

        Raises:
            UserError: the data have more classes than the model.
        """
        loader, predicted, labels = self.test_loader(), [], []
        if loader.source.num_classes > model.config.num_classes:
            raise UserError(
                f"the test data have {loader.source.num_classes} classes, the model {model.config.num_classes}; "
                f"--mode=train gives it a new head"
            )
        bar = tqdm(total=len(loader.source), desc=name, unit="image", leave=False, disable=not sys.stderr.isatty())
        for batch in loader:
            logits = np.asarray(model(jnp.asarray(batch["image"])))
            predicted.append(logits.argmax(-1)[batch["valid"]])
            labels.append(batch["label"][batch["valid"]])
            bar.update(int(batch["valid"].sum()))
        bar.close()
        if loader.bad_images:
            print(f"{len(loader.bad_images)} test images could not be read and do not count: {loader.bad_images[:3]}")
        return np.concatenate(predicted), np.concatenate(labels)

    # Modes

    def train(self) -> None:
        """Trains, or goes on with an interrupted training; the result lies in `workdir/model`."""
        config = self.config
        batch, normalise = config.batch_size, self._normalise()
        loader = data.make(config.data, "train", batch_size=batch, train=True, seed=config.seed, normalise=normalise)
        test, model = self.test_loader(), with_classes(self.fresh(), loader.source.num_classes, config.seed)
        settings = TrainConfig.of(config.train)
        if model.config.position == "sincos":
            frozen = (*settings.optimiser.frozen, "pos_embed")
            settings = dataclasses.replace(settings, optimiser=dataclasses.replace(settings.optimiser, frozen=frozen))
        print(f"{model}, {sum(x.size for x in jax.tree.leaves(model.params)):,} parameters", flush=True)

        def loss(params, batch, key):
            logits = model.forward(params, batch["image"], key=key, train=True).logits
            correct, total = accuracy(logits, batch["label"], batch["valid"])
            value = cross_entropy(logits, batch["label"], batch["valid"])
            return value, {"accuracy": correct / jnp.maximum(total, 1)}

        @jax.jit
        def counts(params, batch):
            logits = model.forward(params, batch["image"]).logits
            correct, total = accuracy(logits, batch["label"], batch["valid"])
            return correct, total, total * cross_entropy(logits, batch["label"], batch["valid"])

        def evaluate(params) -> Mapping[str, float]:
            correct, total, value = np.sum([jax.device_get(counts(params, dict(batch))) for batch in test], 0)
            return {"accuracy": float(correct / total), "loss": float(value / total)}

        state = train(
            settings,
            self.workdir,
            init_params=model.params,
            loss_fn=loss,
            train_loader=loader,
            evaluate=evaluate,
        )
        api.save(model.with_params(state.eval_params), self.finished)
        print(f"The model is in {self.finished}", flush=True)

    def eval(self) -> None:
        """Accuracy of the workdir's model, and of its unreduced form if it has reducers."""
        model, rows = self.model(), []
        base = model.unreduced
        for each in dict.fromkeys((base, model)):
            predicted, labels = self.predict(each, "eval")
            row = {
                **describe(each, base.cost()),
                "accuracy": float((predicted == labels).mean()),
                "images": len(labels),
            }
            report.append_jsonl(self.workdir / RESULTS, {"mode": "eval", "weights": fingerprint(base), **row})
            rows.append(row)
        report.print_table(rows, [c for c in report.COLUMNS if c not in ("images_per_s", "speedup")], extra=["images"])

    def sweep(self) -> None:
        """Every method at every budget, beside the unreduced model and the controls; goes on where it stopped."""
        config, model = self.config.sweep, self.model().unreduced
        done = {_key(row): row for row in self._rows("sweep", model)}
        stamp = {"mode": "sweep", "weights": fingerprint(model)}
        images, whole = jnp.asarray(next(iter(self.test_loader()))["image"]), model.cost()
        predicted, labels = self.predict(model, "unreduced")

        def measured(reduced: api.Model, name: str) -> dict[str, Any]:
            runs = {"unreduced": lambda: model(images), "this": lambda: reduced(images)}
            times = timing.interleaved(runs, repeats=config.repeats, min_seconds=config.seconds, warmup=2)
            guess, _ = self.predict(reduced, name)
            return {
                "accuracy": float((guess == labels).mean()),
                "agreement": float((guess == predicted).mean()),
                "images_per_s": len(images) / times["this"].median_s,
                "speedup": timing.ratio(times["unreduced"], times["this"]),
                "batch": len(images),
                "images": len(labels),
            }

        def row_of(method: Mapping[str, Any] | None, target: float | None) -> dict[str, Any]:
            if method is None:
                return {**describe(model, whole), "target": None, **measured(model, "unreduced"), "speedup": 1.0}
            name, label = method["name"], method["label"]
            start = {"method": label, "target": target, "control": reducers.entry(name).control}
            found = budget.solve(name, model, macs=target, **dict(method["settings"]))
            if not found.reached:
                low, high = found.reachable
                return {**start, "unreachable": f"reaches {low:.2f} to {high:.2f} of the MACs"}
            return {**start, **describe(found.model, whole, label), **measured(found.model, label)}

        work = [(None, None), *((method, target) for target in config.targets for method in config.methods)]
        with user_input(), tqdm(work, desc="sweep", unit="row", disable=None) as bar:
            for method, target in bar:
                key = (method["label"], target) if method else ("unreduced", None)
                bar.set_postfix_str(" ".join(map(str, key)))
                if key not in done:
                    done[key] = row_of(method, target)
                    report.append_jsonl(self.workdir / RESULTS, {**stamp, **done[key]})
        report.print_table(list(done.values()), extra=["agreement"])

    def bench(self) -> None:
        """Times the methods at fixed settings against the unreduced model, in one run for each batch size."""
        config = self.config.bench
        try:
            base, weights = self.model().unreduced, "trained"
        except UserError:
            base, weights = self.fresh().unreduced, "random"
            print("There is no trained model: the timings are of random weights.")
        with user_input():
            reduced = {m["label"]: api.reduce(base, m["name"], **dict(m["settings"])) for m in config.methods}
        models, whole = {"unreduced": base, **reduced}, base.cost()
        columns = [column for column in report.COLUMNS if column != "accuracy"]
        for batch in config.batch_sizes:
            images = jax.random.normal(jax.random.key(0), (batch, *base.config.image_size, base.config.channels))
            runs = {name: lambda each=each, images=images: each(images) for name, each in models.items()}
            with user_input():
                times = timing.interleaved(runs, repeats=config.repeats, min_seconds=config.seconds)
            rows = []
            for name, each in models.items():
                memory = timing.peak_memory(each.compiled(images))
                row = {
                    **describe(each, whole, name),
                    "batch": batch,
                    "dtype": base.config.dtype,
                    "weights": weights,
                    "images_per_s": batch / times[name].median_s,
                    "speedup": timing.ratio(times["unreduced"], times[name]),
                    "first_call_s": round(times[name].first_call_s, 2),
                    "peak_mb": None if memory is None else round(memory / 1e6, 1),
                }
                rows.append(row)
                report.append_jsonl(self.workdir / RESULTS, {"mode": "bench", **row, **timing.device_summary()})
            print(f"batch {batch}, {base.config.dtype}")
            report.print_table(rows, columns, extra=["first_call_s", "peak_mb"], group=())

    def viz(self) -> None:
        """Pictures of what merged with what, the Pareto plot, and `report.html` with all of it."""
        model, config, folder = self.model().unreduced, self.config, self.workdir / "pictures"
        batch = next(iter(self.test_loader()))
        chosen = batch["image"][batch["valid"]][: config.viz.images]
        originals = [viz.to_uint8(image, tuple(config.data.mean), tuple(config.data.std)) for image in chosen]
        rows, counts = self._rows("sweep", model), {"unreduced": model.token_counts()}
        sections: list[tuple[str, Any]] = []
        with user_input():
            for method in tqdm(config.sweep.methods, desc="pictures", unit="method", disable=None):
                found = budget.solve(method["name"], model, macs=config.viz.target, **dict(method["settings"]))
                counts[method["label"]] = found.model.token_counts()
                _, trace = found.model(jnp.asarray(chosen), trace=True)
                for i, image in enumerate(originals):
                    viz.save_png(trace.draw(image, i), folder / f"{method['name']}_{i}.png")
                caption = f"{method['label']} at {found.relative:.2f} of the MACs"
                sections.append((caption, [p for i, image in enumerate(originals) for p in trace.pictures(image, i)]))
        figures = {"tokens": ("Tokens that enter the MLP of every block", viz.token_count_plot(counts))}
        if any("accuracy" in row for row in rows):
            figures["pareto"] = ("Accuracy over cost", viz.pareto_plot(rows))
        curves = _lines(self.workdir / "metrics.jsonl")
        if curves:
            figures["training"] = ("Training", viz.curves_plot(curves))
        for name, (_, figure) in figures.items():
            viz.save_png(figure, folder / f"{name}.png")
        benched = [row for row in _lines(self.workdir / RESULTS) if row.get("mode") == "bench"]
        timed = {(row["batch"], row["method"]): row for row in benched}  # of each, the last run's
        for size in dict.fromkeys(key[0] for key in timed):
            heading = f"Speed at fixed settings, random input, batch {size}"
            sections.append((heading, [row for key, row in timed.items() if key[0] == size]))
        report.write_html(
            self.workdir / "report.html",
            title=config.title,
            command=self.command,
            machine=timing.device_summary(),
            rows=rows,
            extra=["agreement"],
            sections=[*figures.values(), *sections],
            summary=f"A ViT of width {model.config.width}, {model.config.depth} blocks, {model.info.length} tokens. "
            f"Every method at the same multiply-accumulates, timed side by side with the unreduced model.",
        )
        print(f"Pictures are in {folder}, all results in {self.workdir / 'report.html'}")

    def _rows(self, mode: str, model: api.Model) -> list[dict[str, Any]]:
        """Rows of earlier runs of a mode that belong to these weights."""
        stamp = fingerprint(model)
        return [r for r in _lines(self.workdir / RESULTS) if r.get("mode") == mode and r.get("weights") == stamp]


def describe(model: api.Model, whole: flops.Cost, label: str = "") -> dict[str, Any]:
    """The columns of a row that need no measurement; `whole` is what the unreduced model costs."""
    cost, names = model.cost(), [method.name for method in model.methods]
    return {
        "method": label or " + ".join(names) or "unreduced",
        "setting": "; ".join(", ".join(f"{k}={_short(v)}" for k, v in m.settings.items()) for m in model.methods),
        "macs": cost.total,
        "macs_reducer": cost.reducer,
        "macs_relative": cost.total / whole.total,
        "mean_tokens": budget.mean_tokens(model),
        "control": bool(names) and all(name in reducers.REGISTRY and reducers.entry(name).control for name in names),
    }


def with_classes(model: api.Model, classes: int, seed: int = 0) -> api.Model:
    """The model itself if it has this many classes, else the same with new heads, to be trained."""
    if model.config.num_classes == classes:
        return model
    config, kept = dataclasses.replace(model.config, num_classes=classes), model.params["model"]
    fresh = api.build(config, seed, preprocess=model.preprocess)
    params = {
        name: kept[name] if name in kept and "head" not in name else new for name, new in fresh.params["model"].items()
    }
    fresh = fresh.with_params({"model": params})
    for method in model.methods:
        fresh = api.reduce(fresh, method.name, **method.settings)
    return fresh


def fingerprint(model: api.Model) -> str:
    """A short name of a model's weights, so that results are not mixed up with those of other weights."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in jax.tree.leaves(model.params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _lines(path: Path) -> list[dict[str, Any]]:
    return report.read_jsonl(path) if path.is_file() else []


def _key(row: Mapping[str, Any]) -> tuple[str, Any]:
    return row["method"], row.get("target")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
