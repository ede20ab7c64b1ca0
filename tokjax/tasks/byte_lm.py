"""Byte-level language models: a T5 that reads and writes bytes, and an encoder that gets by on fewer of them.

Trains on any task of `tokjax.data.text` (span corruption, the diagnostic tasks, spelling, classification as text) with
or without a reducer; a reducer that learns has its soft form in training (`tokjax.Model.learning`) and deletes in
evaluation. The weight of the loss term that rewards deletion is fixed, or steered to a rate
(`tokjax.train.controllers`; Kallini et al., MrT5, ICLR 2025).
"""

from collections.abc import Callable, Iterable, Mapping
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import ml_collections
from ml_collections import config_dict
import numpy as np

from tokjax import api, buckets, parallel, reducers, viz
from tokjax.bench import bytes as measures
from tokjax.bench import report, timing
from tokjax.data import text
from tokjax.data.bytes import OFFSET, ByteTokenizer, to_bytes
from tokjax.data.corruption import IGNORE
from tokjax.errors import UserError
from tokjax.hooks import losses
from tokjax.models.t5 import Seq2Seq, T5Config, preset
from tokjax.tasks.experiment import RESULTS, Experiment, common_config, lines, shape_config, shape_of, user_input
from tokjax.train import controllers
from tokjax.train.config import default_config as train_config
from tokjax.train.losses import cross_entropy
from tokjax.train.state import LossFn

STEERED = "gate"  # the term of the loss whose weight is fixed or steered
TIMES = ("encoder_ms", "encoder_speedup", "ms", "speedup")
COUNTS = ("tokens", "deleted", "starved", "overflow")  # what reducers note row by row


def default_config() -> ml_collections.ConfigDict:
    """Every field of an experiment on bytes, with its meaning; configs start from it."""
    config = common_config("byte_lm")
    config.title = "Byte-level language model"
    config.batch_size, config.eval_batch_size = 32, 50
    config.model = model_config("byt5-small")
    config.reduce = ml_collections.ConfigDict({"name": ""})  # a reducer of the encoder and its settings; empty: none
    config.data = text.default_config()
    config.train = train_config(total_steps=1000, best_metric="bits_per_byte", best_mode="min", keep_best=False)

    config.learn = learn = ml_collections.ConfigDict()
    learn.network = True  # whether the network is trained, or the reducer alone
    learn.without = 0  # steps at the start without the reducer, in which the network learns what to look at
    learn.network_lr_scale = 1.0  # what the learning rate is multiplied by, for the network
    learn.reducer_lr_scale = 1.0  # the same for the reducer's own parameters

    config.control = control = ml_collections.ConfigDict()  # of the weight of the term `loss/gate`
    control.target = config_dict.placeholder(float)  # share of the bytes to delete; None: the weight is fixed
    control.weight = 0.0  # fixed, or where a steered one starts
    control.k_p = 0.5
    control.k_i = 1e-5
    control.delay = 0  # steps at the start with weight 0

    config.bench = bench = ml_collections.ConfigDict()  # time of test batches, deleted bytes gone, beside no reducer
    bench.batch_size = 8
    bench.batches = 4
    bench.capacities = 8  # lengths that programs are made for, in equal steps, or a tuple of them
    bench.repeats = 5
    bench.seconds = 0.5

    config.viz = ml_collections.ConfigDict()
    config.viz.texts = 6  # test texts to draw, the first of each language
    config.viz.bytes = 160  # of each
    return config


def model_config(name: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """A preset such as "byt5-small" ("": T5Config's defaults) and fields of T5Config to change; None changes nothing.

    Lengths are those of the data.
    """
    return shape_config(T5Config, ("length", "decoder_length"), name, **changes)


class ByteLM(Experiment):
    """Bits per byte, whole targets that are right, and how many bytes the encoder deletes."""

    modes: ClassVar[tuple[str, ...]] = ("train", "eval", "bench", "viz")
    metrics = ("bits_per_byte", "sequence_accuracy", "deleted")
    shared: ClassVar[tuple[str, ...]] = ("train", "eval")

    @property
    def steps(self) -> tuple[str, ...]:
        return self.modes

    def variant(self) -> dict[str, Any]:
        """The test data."""
        data = self.config.data
        return {"data": f"{data.task}, {data.path or 'embedded'}, {data.test_split}, {data.length}"}

    # Models

    def build(self) -> api.Model:
        task = self.test_loader().task
        lengths = {"length": task.length, "decoder_length": task.target_length}
        shape = shape_of(self.config.model, T5Config, preset, **lengths)
        return api.build(shape, self.config.seed, preprocess=ByteTokenizer(task.length))

    @functools.cached_property
    def initial(self) -> api.Model | None:
        """The checkpoint of `config.init`, which counts the lengths of these data."""
        if not self.config.init:
            return None
        return self._loaded(self.config.init, dtype=self.config.init_dtype)

    def _loaded(self, source: Any, **options: Any) -> api.Model:
        """With the lengths of these data, and the fields of `config.model` that are no parameters' business."""
        model, task = super()._loaded(source, **options), self.test_loader().task
        if not isinstance(model.config, T5Config):
            raise UserError(f"{source} holds a {type(model.config).__name__}; task {self.config.task!r} takes a T5")
        free = {name: self.config.model[name] for name in ("normaliser", "dropout", "attention")}
        lengths = {"length": task.length, "decoder_length": task.target_length}
        return model.with_config(**lengths, **{name: value for name, value in free.items() if value is not None})

    def _fitting(self, model: api.Model) -> api.Model:
        return model

    # Data

    def loader(self, split: str, *, train: bool) -> Any:
        config = self.config
        return text.make(config.data, split, **self.share(train), train=train, seed=config.seed if train else 0)

    def test_loader(self) -> Any:
        return self.evaluation_loader("test")

    def inputs(self, model: api.Model, batch: Mapping[str, Any]) -> Seq2Seq:
        return Seq2Seq(batch["ids"], batch["decoder_ids"])

    # Training

    def train(self) -> None:
        """Trains, or goes on with an interrupted training; the result lies in `workdir/model`.

        Raises:
            UserError: a controller without a reducer that has the term which it steers.
        """
        with user_input():
            model = self.fresh()
            learning, controller = model.learning(), self.controller()

        def terms(params: PyTree, inputs: Seq2Seq) -> dict[str, Array]:
            return losses(learning.forward(params, inputs, key=jax.random.key(0), train=True).tokens.aux)

        found = jax.eval_shape(terms, model.params, model.config.example(2))
        if self.config.control.target is not None and STEERED not in found:
            raise UserError(
                f"config.control.target={self.config.control.target}: the reducer "
                f"{self.config.reduce.name or '(none)'!r} has no term {STEERED!r} to steer"
            )
        without, total = self.config.learn.without, self.config.train.total_steps
        if not 0 <= without < total:
            raise UserError(f"config.learn.without={without}: must be at least 0 and below total_steps={total}")
        stages = [(without, self.loss(learning))]
        if without:
            stages.insert(0, (0, self.loss(model.unreduced)))
        self.fit(
            model,
            self.loader("train", train=True),
            stages,
            self.evaluation(model),
            frozen=() if self.config.learn.network else ("model/.*",),
            scales=self.scales(model),
            controller=controller if STEERED in found else None,
        )

    def controller(self) -> controllers.Controller:
        control = self.config.control
        delay = max(control.delay, self.config.learn.without)
        if control.target is None:
            return controllers.Constant(control.weight, delay)
        return controllers.PI(control.target, control.k_p, control.k_i, control.weight, delay)

    def loss(self, model: api.Model) -> LossFn:
        """Of a model in its training form; every term is a metric, its weight included."""

        def forward(params, inputs, keys) -> dict[str, Any]:
            own = {name: params[name] for name in model.params}
            out = model.forward(own, inputs, key=keys, train=True)
            there = (inputs.ids != model.config.pad_id).sum(1)
            counts = {"tokens": there, "deleted": jnp.zeros_like(there), **noted(out)}
            terms = losses(out.tokens.aux)
            if STEERED in terms:  # a mean over tokens, of which the parts of several devices have different numbers
                terms[STEERED] *= there
            return {"logits": out.logits, "terms": terms, "counts": counts, "there": there}

        run = self.by_rows(forward)

        def loss(params, batch, key, weight=1.0):
            valid = batch["valid"]
            ran = run(params, self.inputs(model, batch), parallel.row_keys(key, len(valid)))
            terms = {"cross_entropy": target_loss(ran["logits"], batch["labels"])}
            for name, value in ran["terms"].items():
                steered = name == STEERED
                terms[name] = weight * value.sum() / jnp.maximum(ran["there"].sum(), 1) if steered else value.mean()
            counts = {name: jnp.where(valid, value, 0).sum() for name, value in ran["counts"].items()}
            return sum(terms.values()), {**{f"loss/{name}": value for name, value in terms.items()}, **counts}

        return loss

    # Evaluation

    def reader(self, model: api.Model) -> Callable[[PyTree, Mapping[str, Any]], dict[str, Array]]:
        """From parameters and a batch to what is counted of every row."""

        @jax.jit
        def read(params: PyTree, batch: Mapping[str, Any]) -> dict[str, Array]:
            out = model.forward(params, self.inputs(model, batch), trace=True)
            labels, there = jnp.maximum(batch["labels"], 0), batch["labels"] != IGNORE
            chances = jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[..., None], -1)[..., 0]
            read = {"nats": -jnp.where(there, chances, 0).sum(1), "count": there.sum(1)}
            read |= {"predicted": out.logits.argmax(-1), "left": left(out), "kept": kept(out)}
            return {**read, "overflow": noted(out).get("overflow", jnp.zeros(len(labels), jnp.int32))}

        return read

    def totals(self, read: Callable, params: PyTree, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """What `reader` counts, added up over batches."""
        groups, rows = self.test_loader().groups, []
        by_class: Any = 0
        for batch in batches:
            placed = self.placed(batch)
            arrays = {name: placed[name] for name in ("ids", "decoder_ids", "labels")}
            out, batch = parallel.fetch((read(params, arrays), placed))
            valid = batch["valid"]
            by_class += measures.deletion_counts(
                batch["ids"][valid], out["kept"][valid], batch["group"][valid], len(groups)
            )
            right = measures.sequence_correct(out["predicted"], batch["labels"])
            tokens = (batch["ids"] != 0).sum(1)
            columns = out["nats"], out["count"], right, tokens, out["left"], out["overflow"], batch["group"]
            rows.append(np.stack([np.asarray(column, np.float64) for column in columns], 1)[valid])
        return {"rows": np.concatenate(rows), "by_class": by_class}

    def evaluation(self, model: api.Model) -> Callable[[PyTree], Mapping[str, float]]:
        test, read = self.test_loader(), self.reader(model)

        def evaluate(params: PyTree) -> Mapping[str, float]:
            found = summary(self.totals(read, self.with_parameters(model, params).params, test)["rows"])
            return {name: found[name] for name in self.metrics}

        return evaluate

    def evaluate(self, model: api.Model, name: str) -> dict[str, Any]:
        """The metrics, and of several languages those of each; `by_class`: deleted, by kind of byte."""
        groups = self.test_loader().groups
        found = self.totals(self.reader(model), model.params, self.batches("test", name))
        rows, row = found["rows"], summary(found["rows"])
        if len(groups) > 1:
            row["by_group"] = {
                name: {k: v for k, v in summary(part).items() if k in self.metrics}
                for number, name in enumerate(groups)
                if len(part := rows[rows[:, -1] == number])
            }
        if found["by_class"][..., 1].any():  # in the soft form all are there
            row["by_class"] = dict(measures.deletion_by_class(found["by_class"]))
        macs = self.macs(model, rows[:, 4])
        return {**row, "macs": macs, "macs_relative": macs / model.unreduced.cost().total}

    def macs(self, model: api.Model, tokens: Float[np.ndarray, " n"]) -> float:
        """Of one text of full length, the mean over texts of which these numbers of tokens are left.

        A reducer that deletes what the data allow costs as with a capacity of what is left; the cost is a polynomial of
        degree two in it.
        """
        if not model.methods or "capacity" not in reducers.settings_of(model.methods[-1].name):
            return float(model.cost().total)
        method, n = model.methods[-1], model.info.length
        points = sorted({max(1, n // 4), max(1, n // 2), n})
        reduced = [api.reduce(model.unreduced, method.name, **{**method.settings, "capacity": m}) for m in points]
        fitted = np.polyfit(points, [each.cost().total for each in reduced], len(points) - 1)
        return float(np.polyval(fitted, np.minimum(tokens, n)).mean())

    def eval(self) -> None:
        """The metrics of the workdir's model on the test data, bytes deleted and bytes only masked (soft)."""
        model, rows = self.model(), []
        forms = {"hard" if model.methods else "": model}
        if model.learning() is not model:
            forms["soft"] = model.learning()
        for form, each in forms.items():
            label = " + ".join(method.name for method in each.methods) or "no reducer"
            row = {"method": label, "form": form, **self.evaluate(each, f"{label} {form}")}
            report.append_jsonl(self.workdir / RESULTS, {**self._stamp("eval", model.unreduced), **report.plain(row)})
            rows.append(row)
        report.print_table(rows, ["method"], extra=["form", *self.metrics, "macs_relative", "texts"], group=())
        for row in rows:
            for name, part in row.get("by_group", {}).items():
                told = ", ".join(f"{key} {value:.3f}" for key, value in part.items())
                print(f"{row['method']} {row['form']} {name}: {told}")

    # Time

    def bench(self) -> None:
        """Times the workdir's model on test texts, deleted bytes gone, beside the same model without its reducer."""
        model = self.model()
        label = " + ".join(method.name for method in model.methods)
        models = {"no reducer": (self, model.unreduced)} | ({label: (self, model)} if model.methods else {})
        rows = self.timed_rows(models)
        for row in rows:
            report.append_jsonl(self.workdir / RESULTS, {"mode": "bench", **row, **timing.device_summary()})
        report.print_table(rows, ["method"], extra=["batch", *TIMES], group=())

    def timed_rows(self, models: Mapping[str, tuple["ByteLM", api.Model]]) -> list[dict[str, Any]]:
        """Milliseconds a text, and how many times faster than the first, of the encoder and in all, in one run.

        The time of the encoder includes one step of the decoder. Where lengths depend on the data the model runs in
        buckets (`tokjax.buckets`), the reading of the counts included.

        Args:
            models: by label, each with the task that gives its texts.
        """
        config = self.config.bench
        runs: dict[str, Callable[[], list[Array]]] = {}
        for label, (part, model) in models.items():
            texts = part.some(config.batch_size * config.batches)
            call: Callable[[Seq2Seq], Any] = model
            if any(reducers.entry(method.name).length == "dynamic" for method in model.methods):
                call = buckets.Bucketed(model, config.capacities, rows=config.batch_size)
            for name, steps in (("encoder", 1), ("total", None)):
                cut = [Seq2Seq(ids, decoder_ids[:, :steps]) for ids, decoder_ids in texts]
                runs[f"{label} {name}"] = functools.partial(_all, call, cut)
        with user_input():
            times = timing.interleaved(runs, repeats=config.repeats, min_seconds=config.seconds)
        rows, first = [], next(iter(models))
        for label in models:
            row: dict[str, Any] = {"method": label, "batch": config.batch_size}
            for name, prefix in (("encoder", "encoder_"), ("total", "")):
                this = times[f"{label} {name}"]
                row[f"{prefix}ms"] = 1000 * this.median_s / (config.batch_size * config.batches)
                row[f"{prefix}speedup"] = timing.ratio(times[f"{first} {name}"], this)
            rows.append(row)
        return rows

    def some(self, count: int) -> list[tuple[Array, Array]]:
        """Ids of so many test texts (of few: again from the first), in batches of `config.bench`."""
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self.test_loader():
            valid = batch["valid"]
            rows += list(zip(batch["ids"][valid], batch["decoder_ids"][valid], strict=True))
            if len(rows) >= count:
                break
        rows = [rows[i % len(rows)] for i in range(count)]
        size = self.config.bench.batch_size
        parts = [rows[start : start + size] for start in range(0, count, size)]
        return [(jnp.stack([ids for ids, _ in part]), jnp.stack([ids for _, ids in part])) for part in parts]

    # Pictures

    def viz(self) -> None:
        """The bytes that are deleted in some test texts, and the curves of the training."""
        model, folder = self.model(), self.workdir / "pictures"
        if model.methods:
            viz.save_png(viz.deleted_bytes(self.deletions(model)), folder / "deleted.png")
        if curves := lines(self.workdir / "metrics.jsonl"):
            names = ("loss/cross_entropy", "rate", "weight", "bits_per_byte")
            present = tuple(n for n in names if any(key.endswith(n) for row in curves for key in row))
            viz.save_png(viz.curves_plot(curves, present, title=self.config.title), folder / "training.png")
        print(f"Pictures are in {folder}")

    def deletions(self, model: api.Model) -> list[tuple[str, bytes, np.ndarray]]:
        """Name, bytes, and which of them are kept, of the first test texts of every language."""
        config, groups, read = self.config.viz, self.test_loader().groups, self.reader(model)
        found: dict[str, list[tuple[str, bytes, np.ndarray]]] = {}
        for batch in self.test_loader():
            arrays = {k: v for k, v in batch.items() if k in ("ids", "decoder_ids", "labels")}
            stays = np.asarray(read(model.params, arrays)["kept"])
            for ids, mask, group, valid in zip(batch["ids"], stays, batch["group"], batch["valid"], strict=True):
                taken = np.flatnonzero((ids >= OFFSET) & (ids < OFFSET + 256))[: config.bytes]
                if valid and len(taken):
                    row = groups[group], to_bytes(ids[taken]), mask[taken]
                    found.setdefault(groups[group], []).append(row)
            if sum(map(len, found.values())) >= config.texts and len(found) == len(groups):
                break
        share = max(1, config.texts // max(1, len(found)))
        return [row for rows in found.values() for row in rows[:share]][: config.texts]


def _all(call: Callable[[Seq2Seq], Any], batches: Iterable[Seq2Seq]) -> list[Array]:
    return [jnp.asarray(call(inputs)) for inputs in batches]


def target_loss(logits: Float[Array, "B T V"], labels: Array) -> Float[Array, ""]:
    """Mean cross-entropy over the ids that are predicted (labels that are not -100), of all rows together."""
    return cross_entropy(
        logits.reshape(-1, logits.shape[-1]), jnp.maximum(labels, 0).reshape(-1), (labels != IGNORE).reshape(-1)
    )


def noted(out: Any) -> dict[str, Array]:
    """What a reducer counted in every row of a `T5Output`: `COUNTS`, as far as it counts them."""
    found: dict[str, Array] = {}
    for each in out.tokens.aux.values():
        found |= {name: each[name] for name in COUNTS if name in each}
    return found


def left(out: Any) -> Array:
    """Tokens of every row that the decoder attends to: those that are there, less those that a gate counts as gone."""
    counts = noted(out)
    if "overflow" in counts or "deleted" not in counts:  # they are gone already
        return out.encoder.count()
    return out.encoder.count() - counts["deleted"] + counts.get("starved", 0)  # such a row keeps its first token


def kept(out: Any) -> Array:
    """Whether every input token lives on, itself or in a merged one."""
    origin = out.encoder.origin
    assert origin is not None
    return origin < out.encoder.length


def summary(rows: Float[np.ndarray, "n 7"]) -> dict[str, Any]:
    """The metrics of rows as `ByteLM.totals` gives them."""
    nats, count, right, tokens, remaining, overflow, _ = rows.T
    return {
        "bits_per_byte": measures.bits_per_byte(nats.sum(), count.sum()),
        "sequence_accuracy": float(right.mean()),
        "deleted": float(1 - remaining.sum() / tokens.sum()),
        "overflow": int(overflow.sum()),
        "texts": len(rows),
    }
