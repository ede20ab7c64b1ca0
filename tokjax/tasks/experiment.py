"""What the tasks share: models and data of a config, training, a sweep over budgets, timing, pictures, the report.

A task is a subclass of `Experiment` that trains and evaluates; everything else is here.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import operator
from pathlib import Path
import sys
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, UInt8
import ml_collections
from ml_collections import config_dict
import numpy as np
from tqdm import tqdm

from tokjax import api, budget, data, parallel, reducers, viz
from tokjax.bench import flops, profile, report, timing
from tokjax.errors import UserError
from tokjax.models.vit import Patches, ViTConfig, preset
from tokjax.pretrained.preprocess import Preprocess
from tokjax.tasks.preprocessing import AsPretrained
from tokjax.train.checkpoints import Checkpoints
from tokjax.train.config import TrainConfig
from tokjax.train.config import default_config as train_config
from tokjax.train.controllers import Controller
from tokjax.train.loop import train
from tokjax.train.state import LossFn, Teacher
from tokjax.viz import Picture

RESULTS = "results.jsonl"

Model = Any  # an `api.Model`; an `api.DualModel` in tasks that have texts too


def common_config(task: str) -> ml_collections.ConfigDict:
    """The fields that every experiment has, on images or texts."""
    config = ml_collections.ConfigDict()
    config.task = task
    config.mode = "all"  # what runs without --mode
    config.title = "Token reduction"
    config.seed = 0
    config.devices = 1  # over which a batch of training is split; 0: all
    config.mesh = ""  # in place of it sizes of data, fsdp and model, as JSON: see parallel.make_mesh; it evaluates too
    config.sharding = ()  # rules before the defaults: pairs of a regular expression and axes, see parallel.Rule
    config.batch_size = 64  # of training
    config.eval_batch_size = 128
    config.init = ""  # a checkpoint to start from: folder, file or hub id; empty: random weights
    config.init_dtype = config_dict.placeholder(str)  # None: float32
    return config


def default_config(task: str) -> ml_collections.ConfigDict:
    """The fields that every experiment on images has, with their meaning; those of a task come on top."""
    config = common_config(task)
    # Of the checkpoint, which the data then have too; None: its own.
    config.init_image_size = config_dict.placeholder(tuple)
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
    bench.macs = config_dict.placeholder(float)  # a share of the MACs that every method's knob is turned to
    bench.batch_sizes = (1, 32)
    bench.repeats = 5
    bench.seconds = 0.5

    config.viz = ml_collections.ConfigDict()
    config.viz.images = 4  # test images to draw
    config.viz.target = 0.6  # share of the MACs at which the methods are drawn
    return config


def model_config(name: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """A preset such as "s/16" ("": ViTConfig's defaults) and fields of ViTConfig to change; None changes nothing."""
    return shape_config(ViTConfig, ("image_size",), name, **changes)  # the size is the data's


def shape_config(kind: type, apart: Sequence[str], name: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """The name of a preset, and all fields of a model's config but a few, as placeholders of their types.

    Args:
        kind: the model's config, a dataclass.
        apart: fields that come from elsewhere.
        name: of the preset.
        **changes: fields to set.
    """
    config, hints = ml_collections.ConfigDict({"preset": name}), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in apart:
            config[field.name] = config_dict.placeholder(_plain_type(hints[field.name]))
    config.update(changes)
    return config


def _plain_type(hint: Any) -> type:
    """What a value of a hint such as `int | None`, `tuple[int, ...]` or `Literal["a"]` is."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return str if get_origin(hint) is Literal else get_origin(hint) or hint


def shape_of(config: ml_collections.ConfigDict, kind: type, preset: Callable[..., Any], **fields: Any) -> Any:
    """The model's config that a `shape_config` describes; `fields` are those that come from elsewhere."""
    given = {k: v for k, v in config.to_dict().items() if k != "preset" and v is not None}
    given |= fields
    return preset(config.preset, **given) if config.preset else kind(**given)


def whole_patches(config: ViTConfig) -> ViTConfig:
    """The config of a model from scratch, which shall not leave pixels unseen.

    Raises:
        ValueError: an image size that the patches do not divide.
    """
    if any(side % config.patch_size for side in config.image_size):
        raise ValueError(f"image_size={config.image_size}: must be multiples of patch_size={config.patch_size}")
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


def tuples(settings: Any) -> Any:
    """Settings as they compare: a list and a tuple are the same, which JSON does not tell apart."""
    if isinstance(settings, Mapping):
        return {name: tuples(value) for name, value in settings.items()}
    return tuple(map(tuples, settings)) if isinstance(settings, list | tuple) else settings


class Experiment(abc.ABC):
    """A task; each mode is a method, and each works from what the workdir holds.

    A subclass must have `metrics`, `train` and `evaluate`, and may change the other methods below, each of which says
    what for.

    Attributes:
        modes: names of the methods that the command line may call.
        metrics: columns that `evaluate` gives. The first is what tables, plots and cards show: a share in 0..1, more is
            better, of `tokjax.viz.SHARES`.
        both_towers: whether the task needs a text encoder beside the image encoder.
        shared: modes that several processes may run together.
        counted: what examples are called, a column of what `evaluate` gives.
        pictures_a_row: after how many of an image's `pictures` the file of them goes on below.
    """

    modes: ClassVar[tuple[str, ...]] = ("train", "eval", "sweep", "bench", "viz")
    metrics: tuple[str, ...]
    both_towers: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[str] = "images"
    pictures_a_row: ClassVar[int] = 7

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, command: str):
        self.config, self.workdir, self.command = config, workdir, command
        self._loaders: dict[str, data.Loader] = {}
        self._once: dict[tuple[str, str], Any] = {}
        self._known: tuple[list[Any], str] | None = None  # leaves of the last model asked for, and its fingerprint

    @abc.abstractmethod
    def train(self) -> None:
        """Trains, or goes on with an interrupted training; see `fit`. The result lies in `finished`."""

    @abc.abstractmethod
    def evaluate(self, model: Model, name: str) -> dict[str, Any]:
        """Columns of a row: `metrics`, that of `counted` (how many), and whatever else is worth keeping.

        Args:
            model: with or without reducers.
            name: for the progress bar.
        """

    def run(self, mode: str) -> None:
        """Runs one mode; "all" is `steps`.

        Raises:
            UserError: whatever is wrong with config, data or checkpoints.
        """
        if mode not in ("all", *self.modes):
            raise UserError(f"mode={mode!r}: must be one of all, {', '.join(self.modes)}")
        if parallel.several() and mode not in self.shared:
            can = f"mode is one of {', '.join(self.shared)}" if self.shared else "there is no such mode"
            raise UserError(f"mode={mode!r} of task {self.config.task!r}: runs in one process; for several {can}")
        for step in self.steps if mode == "all" else (mode,):
            print(f"== {step}", flush=True)
            getattr(self, step)()

    @property
    def steps(self) -> tuple[str, ...]:
        """The modes that make the whole experiment."""
        return ("train", "sweep", "bench", "viz")

    def variant(self) -> dict[str, Any]:
        """What decides the metrics beside weights, method and budget; it stands in every row, as plain values.

        Rows of another variant are not taken for done.
        """
        return {}

    # Models

    @property
    def finished(self) -> Path:
        """Where the trained model lies, as `tokjax.load` reads it."""
        return self.workdir / "model"

    @functools.cached_property
    def initial(self) -> Model | None:
        """The checkpoint of `config.init`, if there is one; its preprocessing wins over the config's."""
        config = self.config
        if not config.init:
            return None
        return self._loaded(config.init, image_size=config.init_image_size, dtype=config.init_dtype)

    def _loaded(self, source: str | Path, **options: Any) -> Model:
        mesh, rules = self.mesh, self.rules
        where = parallel.placing(mesh, rules) if mesh is not None and self.split else None
        with user_input():
            model = api.load(source, sharding=where, **options)
        two = isinstance(model, api.DualModel)
        if self.both_towers and not two:
            raise UserError(f"{source} holds no text encoder, which task {self.config.task!r} needs")
        return model.vision if two and not self.both_towers else model

    def encoder(self, model: Model) -> api.Model:
        """The part that is reduced, timed and drawn."""
        return model.vision if isinstance(model, api.DualModel) else model

    def outputs(self) -> int:
        """`num_classes` of a model from scratch where the config names none; 0: no head."""
        return 0

    def build(self) -> Model:
        """A model with random weights, as the config describes it."""
        config, size = self.config, tuple(self.config.data.image_size)
        outputs = config.model.get("num_classes") or self.outputs()
        shape = whole_patches(shape_of(config.model, ViTConfig, preset, image_size=size, num_classes=outputs))
        return api.build(shape, config.seed, preprocess=self.preprocess(size))

    def preprocess(self, size: tuple[int, int]) -> Preprocess:
        """The preprocessing of evaluation, for a model from scratch to keep."""
        config = self.config.data
        mean, std = tuple(config.mean), tuple(config.std)
        if config.resize.mode == "square":
            return Preprocess(size=size, resize="square", resize_to=size, crop=False, mean=mean, std=std)
        height, width = (int(side / config.resize.crop_pct) for side in size)
        return Preprocess(size=size, resize="short", resize_to=(height, width), mean=mean, std=std)

    def fresh(self) -> Model:
        """The model before training: random weights, or those of `config.init`; with the reducer of `config.reduce`."""
        with user_input():
            return self._reduced(self.build() if self.initial is None else self.initial)

    def reduction(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the reducer of `config.reduce`; an empty name: none.

        Raises:
            UserError: settings without a name.
        """
        name = self.config.reduce.name
        settings = {k: v for k, v in self.config.reduce.to_dict().items() if k != "name" and v is not None}
        if settings and not name:
            raise UserError(f"config.reduce={settings}: has no name; one of {', '.join(sorted(reducers.REGISTRY))}")
        return name, settings

    def _reduced(self, model: Model) -> Model:
        name, settings = self.reduction()
        settings = tuples(settings)
        saved = [(method.name, tuples(dict(method.settings))) for method in model.methods]
        if not name or saved == [(name, settings)]:  # a model that was trained reduced brings its reducer
            return model
        reduced = api.reduce(model.unreduced, name, **settings)
        if [known for known, _ in saved] != [name] or not reducers.entry(name).learned:
            return reduced
        # The same reducer with other settings keeps what it has learned.
        theirs, ours = (jax.tree.map(jnp.shape, each.params) for each in (model, reduced))
        if theirs != ours:
            raise UserError(f"config.reduce={settings}: gives {name} other parameters than it was trained with")
        return reduced.with_params(model.params)

    def _fitting(self, model: Model) -> Model:
        """The workdir's model, if the data have its size."""
        config, size = self.encoder(model).config, tuple(self.at_size(self.config.data).image_size)
        if config.position != "naflex" and config.image_size != size:
            raise UserError(f"config.data.image_size={size}: the model in {self.finished} takes {config.image_size}")
        return model

    def parameters(self, model: Model) -> PyTree:
        """What training changes: the model's parameters, and of whatever is trained beside it."""
        return model.params

    def with_parameters(self, model: Model, parameters: PyTree) -> Model:
        """The model with its part of what `parameters` gave."""
        return model.with_params(parameters)

    def model(self) -> Model:
        """The trained model of the workdir, the best checkpoint of a training under way, or `config.init`.

        Raises:
            UserError: there is none of these.
        """
        checkpoints = Checkpoints(self.workdir / "checkpoints")
        if (self.finished / "config.json").is_file():
            with user_input():
                return self.sharded(self._fitting(self._reduced(self._loaded(self.finished))))
        if checkpoints.steps():
            model = self.fresh()
            found = checkpoints.restore_params(self.parameters(model), "best")
            return self.sharded(self.with_parameters(model, found))
        if self.config.init:
            return self.sharded(self.fresh())
        raise UserError(
            f"{self.workdir} holds no model: train one with --mode=train, or name one with "
            f"--config.init=FOLDER_OR_HUB_ID"
        )

    # Devices

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Of `config.mesh`, or over `config.devices`; None: one device."""
        config = self.config
        if not config.mesh:
            return parallel.data_mesh(0 if parallel.several() and config.devices == 1 else config.devices)
        if config.devices != 1:
            raise UserError(f"config.mesh={config.mesh!r} and config.devices={config.devices}: give one of them")
        return parallel.make_mesh(config.mesh)

    @functools.cached_property
    def rules(self) -> tuple[parallel.Rule, ...]:
        """Of `config.sharding`."""
        return parallel.parse(self.config.sharding)

    @property
    def split(self) -> bool:
        """Whether evaluation runs on the mesh too: it is the config's, or that of several processes."""
        return bool(self.config.mesh) or parallel.several()

    def sharded(self, model: Model) -> Model:
        """The model on the mesh, where it is `split`."""
        if self.mesh is None or not self.split:
            return model
        return parallel.shard(model, self.mesh, self.rules)

    def by_rows(self, run: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """`parallel.by_rows` of the mesh, from the parameters that `parameters` gives."""
        mesh = self.mesh
        if mesh is None:
            return run
        return parallel.by_rows(run, mesh, lambda params: parallel.specs(mesh, params, self.rules))

    def placed(self, batch: Mapping[str, Any]) -> Any:
        """A batch of evaluation where `sharded` puts the model; rows are added until they divide."""
        return parallel.place(self.mesh if self.split else None, dict(batch), pad=True)

    def share(self, train: bool) -> dict[str, Any]:
        """What a loader is told of this process: its rows of a batch, and its share of the data.

        Raises:
            UserError: a batch of training that does not divide over the processes.
        """
        rows = self.config.batch_size if train else self.config.eval_batch_size
        index, count = parallel.data_part(self.mesh)
        if train and rows % count:
            raise UserError(f"config.batch_size={rows}: must be a multiple of the {count} processes that read it")
        return {"batch_size": -(-rows // count), "process_index": index, "process_count": count}

    # Data

    def loader(self, split: str, *, train: bool) -> data.Loader:
        """A split for training, or in order and without augmentation, as the checkpoint of `config.init` wants it.

        In training a checkpoint for images of any size (NaFlex) gets whole square patches of images of the config's
        `image_size`, resized and augmented as the config says; without training, what its own preprocessing makes.
        """
        config = self.config
        return data.make(
            self.at_size(config.data),
            split,
            **self.share(train),
            train=train,
            seed=config.seed if train else 0,
            transform=None if train else self.transform(),
            normalise=self.normalise(train=train),
        )

    def at_size(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """A data config with the image size of the checkpoint of `config.init`, where there is one."""
        if self.initial is None:
            return config
        sized = config.copy_and_resolve_references()
        sized.image_size = self.encoder(self.initial).config.image_size
        return sized

    def evaluation_loader(self, split: str) -> data.Loader:
        """A split in order, opened once."""
        if split not in self._loaders:
            self._loaders[split] = self.loader(split, train=False)
        return self._loaders[split]

    def test_loader(self) -> data.Loader:
        return self.evaluation_loader("test")

    def transform(self) -> data.Transform | None:
        """Resizing and cropping of evaluation, those of the checkpoint of `config.init`; None: the config's."""
        return self._pretrained

    @property
    def _pretrained(self) -> AsPretrained | None:
        preprocess = self.initial.preprocess if self.initial else None
        return None if preprocess is None else AsPretrained(preprocess)

    def normalise(self, train: bool = False) -> data.Normaliser | None:
        """That of the checkpoint of `config.init`, in evaluation bit for bit; None: the config's.

        Raises:
            UserError: training of a checkpoint that takes grey images.
        """
        own = self._pretrained
        if own is None or not train:
            return None if own is None else own.normalise
        if own.channels != 3:
            raise UserError(f"config.init={self.config.init}: takes grey images, on which nothing is trained here")
        (m1, m2, m3), (s1, s2, s3), rescale = own.preprocess.mean, own.preprocess.std, own.preprocess.rescale
        return data.Normalise((m1, m2, m3), (s1, s2, s3), rescale)

    def inputs(self, model: Model, batch: Mapping[str, Any]) -> PyTree:
        """What the encoder takes of a batch.

        One that takes any size gets the patches of its own preprocessing where the batch has them (with `shape`), else
        all patches of the images as they are.

        Raises:
            UserError: the model takes other images.
        """
        images, config = jnp.asarray(batch["image"]), self.encoder(model).config
        inputs: PyTree = images
        if "shape" in batch:
            shape = jnp.asarray(batch["shape"])
            patches = images.reshape(len(images), -1, images.shape[2] ** 2 * images.shape[3])
            valid = jnp.arange(patches.shape[1]) < shape.prod(1, keepdims=True)
            inputs = Patches(jnp.where(valid[..., None], patches, 0), valid, shape)
        elif config.position == "naflex":
            inputs = Patches.of(images, config.patch_size)
        with user_input():
            config.check(inputs)
        return inputs

    def batches(self, split: str, name: str) -> Iterator[data.Batch]:
        """Every batch of a split in order, with a progress bar; only rows that are `valid` count, each once."""
        loader, quiet = self.evaluation_loader(split), not sys.stderr.isatty()
        with tqdm(total=loader.examples, desc=name, leave=False, disable=quiet) as bar:
            for batch in loader:
                yield batch
                bar.update(int(batch["valid"].sum()))
        if bad := getattr(loader, "bad_images", None):
            print(f"{len(bad)} {split} images could not be read and do not count: {bad[:3]}")

    def once(self, name: str, model: Model, make: Callable[[], Any]) -> Any:
        """What `make` gives, kept for the unreduced model of these weights."""
        key = name, self._fingerprint(model)
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    # Modes

    def scales(self, model: Model) -> tuple[tuple[str, float], ...]:
        """Learning rates by part, where `config.learn` has them."""
        learn = self.config.learn
        parts = {"model": learn.network_lr_scale, "reducers": learn.reducer_lr_scale}
        return tuple((f"{part}/.*", scale) for part, scale in parts.items() if part in model.params and scale != 1)

    def fit(
        self,
        model: Model,
        loader: data.Loader,
        loss: LossFn | Sequence[tuple[int, LossFn]],
        evaluate: Callable[[PyTree], Mapping[str, Any]],
        frozen: Sequence[str] = (),
        teacher: Teacher | None = None,
        controller: Controller | None = None,
        constrain: Callable[[PyTree], PyTree] | None = None,
        scales: Sequence[tuple[str, float]] = (),
    ) -> Model:
        """Trains what `parameters` names, saves the model in `finished` and gives it.

        Args:
            model: to start from.
            loader: of training.
            loss: (parameters, batch, key) -> (loss, metrics); or several, each with the step from which it counts.
            evaluate: parameters -> scalars, of the test set.
            frozen: further patterns of parameters to leave as they are, see `OptimiserConfig`.
            teacher: of what `parameters` names, see `Teacher`.
            controller: of a weight of the loss, see `tokjax.train.controllers`.
            constrain: parameters -> parameters, after every update.
            scales: further factors of learning rates, see there.
        """
        settings, mesh = TrainConfig.of(self.config.train), self.mesh
        if mesh is not None:
            parallel.check_heads(mesh, model.config)
        if getattr(self.encoder(model).config, "position", None) == "sincos":
            frozen = (*frozen, "pos_embed")
        frozen = (*settings.optimiser.frozen, *frozen)
        scales = (*settings.optimiser.scales, *scales)
        optimiser = dataclasses.replace(settings.optimiser, frozen=frozen, scales=scales)
        settings = dataclasses.replace(settings, optimiser=optimiser)
        parameters = self.parameters(model)
        print(f"{model}, {sum(x.size for x in jax.tree.leaves(parameters)):,} parameters", flush=True)
        state = train(
            settings,
            self.workdir,
            init_params=parameters,
            loss_fn=loss,
            train_loader=loader,
            evaluate=evaluate,
            teacher=teacher,
            controller=controller,
            constrain=constrain,
            place_batch=None if mesh is None else functools.partial(parallel.place, mesh),
            state_sharding=None if mesh is None else lambda state: parallel.state_shardings(mesh, state, self.rules),
        )
        found = parallel.fetch(state.eval_params) if parallel.several() else state.eval_params
        model = self.with_parameters(model, found)
        if jax.process_index() == 0:
            api.save(model, self.finished)
        parallel.barrier("saved")
        print(f"The model is in {self.finished}", flush=True)
        return model

    def eval(self) -> None:
        """The metrics of the workdir's model, and of its unreduced form if it has reducers."""
        model, rows = self.model(), []
        base = model.unreduced
        for each in dict.fromkeys((base, model)):
            row = {**describe(each, base.cost()), **self.evaluate(each, "eval")}
            report.append_jsonl(self.workdir / RESULTS, {**self._stamp("eval", base), **row})
            rows.append(row)
        columns = [column for column in self._columns if column not in ("images_per_s", "speedup")]
        report.print_table(rows, columns, extra=[*self.metrics[1:], self.counted])

    def sweep(self) -> None:
        """Every method at every budget, beside the unreduced model and the controls; goes on where it stopped."""
        config, model = self.config.sweep, self.model().unreduced
        done = {_key(row): row for row in self._rows("sweep", model)}
        stamp = self._stamp("sweep", model)
        inputs, whole = self.inputs(model, next(iter(self.test_loader()))), model.cost()
        images, base = jax.tree.leaves(inputs)[0].shape[0], self.timed(model)

        def measured(reduced: Model, name: str) -> dict[str, Any]:
            this = self.timed(reduced)
            runs = {"unreduced": lambda: base(inputs), "this": lambda: this(inputs)}
            times = timing.interleaved(runs, repeats=config.repeats, min_seconds=config.seconds, warmup=2)
            return {
                **self.evaluate(reduced, name),
                "images_per_s": images / times["this"].median_s,
                "speedup": timing.ratio(times["unreduced"], times["this"]),
                "batch": images,
            }

        def row_of(method: Mapping[str, Any] | None, target: float | None) -> dict[str, Any]:
            if method is None:
                return {**describe(model, whole), "target": None, **measured(model, "unreduced"), "speedup": 1.0}
            name, label = method["name"], method["label"]
            start = {"method": label, "target": target, "control": reducers.entry(name).control}
            found = self.solve(method, model, target)
            if found.unreachable:
                return {**start, "unreachable": found.unreachable}
            return {**start, **describe(found.model, whole, label), **measured(found.model, label)}

        work = [(None, None), *((method, target) for target in config.targets for method in config.methods)]
        with user_input(), tqdm(work, desc="sweep", unit="row", disable=None) as bar:
            for method, target in bar:
                key = (method["label"], target) if method else ("unreduced", None)
                bar.set_postfix_str(" ".join(map(str, key)))
                if key not in done:
                    done[key] = row_of(method, target)
                    report.append_jsonl(self.workdir / RESULTS, {**stamp, **done[key]})
        report.print_table(list(done.values()), self._columns, extra=self.metrics[1:])

    def solve(self, method: Mapping[str, Any], model: Model, target: float | None) -> budget.Solution:
        """An entry of `config.sweep.methods`, at a share of the model's MACs."""
        return budget.solve(method["name"], model, macs=target, **dict(method["settings"]))

    def timed(self, model: Model) -> Callable[[PyTree], Any]:
        """What the sweep times, as a compiled function of the encoder's inputs."""
        return self.encoder(model)

    def bench(self) -> None:
        """Times the methods at fixed settings, or at one cost, beside the unreduced model: one run a batch size."""
        config = self.config.bench
        try:
            base, weights = self.encoder(self.model()).unreduced, "trained"
        except UserError:
            base, weights = self.encoder(self.fresh()).unreduced, "random"
            print("There is no trained model: the timings are of random weights.")

        def random_inputs(batch: int) -> Any:
            images = jax.random.normal(jax.random.key(0), (batch, *base.config.image_size, base.config.channels))
            return self.inputs(base, {"image": images})

        models, whole, missing = {"unreduced": base}, base.cost(), []
        for method in config.methods:
            name, label, settings = method["name"], method["label"], dict(method["settings"])
            with user_input():
                if config.macs is None:
                    models[label] = api.reduce(base, name, **settings)
                    continue
                found = budget.solve(name, base, macs=config.macs, inputs=random_inputs(8), **settings)
            if found.unreachable:
                missing.append({"method": label, "target": config.macs, "unreachable": found.unreachable})
            else:
                models[label] = found.model
        columns = [column for column in report.COLUMNS if column != "accuracy"]
        extra = ["speedup_by_macs", "overhead", "first_call_s", "peak_mb"]
        for batch in config.batch_sizes:
            inputs = random_inputs(batch)
            runs = {name: lambda each=each, inputs=inputs: each(inputs) for name, each in models.items()}
            with user_input():
                times = timing.interleaved(runs, repeats=config.repeats, min_seconds=config.seconds)
            rows = []
            for name, each in models.items():
                compiled, described = each.compiled(inputs), describe(each, whole, name)
                memory, speedup = timing.peak_memory(compiled), timing.ratio(times["unreduced"], times[name])
                row = {
                    **described,
                    "batch": batch,
                    "dtype": base.config.dtype,
                    "weights": weights,
                    "images_per_s": batch / times[name].median_s,
                    "speedup": speedup,
                    "speedup_by_macs": speedup * described["macs_relative"],
                    "overhead": profile.reducer_share(compiled, runs[name]) if each.methods else None,
                    "first_call_s": round(times[name].first_call_s, 2),
                    "peak_mb": None if memory is None else round(memory / 1e6, 1),
                }
                rows.append(row)
            rows += [{**row, "batch": batch} for row in missing]
            for row in rows:
                report.append_jsonl(self.workdir / RESULTS, {"mode": "bench", **row, **timing.device_summary()})
            print(f"batch {batch}, {base.config.dtype}")
            report.print_table(rows, columns, extra=extra, group=())

    def viz(self) -> None:
        """Pictures of what merged with what, the Pareto plot, and `report.html` with all of it."""
        model, config, folder = self.model().unreduced, self.config, self.workdir / "pictures"
        first: Mapping[str, Any] = next(iter(self.test_loader()))
        batch = {name: values[first["valid"]][: config.viz.images] for name, values in first.items()}
        images = self.shown(batch)
        rows, counts = self._rows("sweep", model), {"unreduced": model.token_counts()}
        sections: list[tuple[str, Any]] = []
        with user_input():
            for method in tqdm(config.sweep.methods, desc="pictures", unit="method", disable=None):
                found = self.solve(method, model, config.viz.target)
                counts[method["label"]] = found.model.token_counts()
                drawn = self.pictures(found.model, batch, images)
                for i, pictures in enumerate(drawn):
                    viz.save_png(viz.strip(pictures, self.pictures_a_row), folder / f"{method['name']}_{i}.png")
                caption = f"{method['label']} at {found.relative:.2f} of the MACs"
                sections.append((caption, [picture for pictures in drawn for picture in pictures]))
        quality = self.metrics[0]
        figures = {"tokens": ("Tokens that enter the MLP of every block", viz.token_count_plot(counts))}
        if any(quality in row for row in rows):
            name = viz.SHARES[quality]
            figures["pareto"] = (f"{name[0].upper()}{name[1:]} over cost", viz.pareto_plot(rows, y=quality))
        curves = lines(self.workdir / "metrics.jsonl")
        if curves:
            figures["training"] = ("Training", viz.curves_plot(curves, ("loss", quality)))
        for name, (_, figure) in figures.items():
            viz.save_png(figure, folder / f"{name}.png")
        benched = [row for row in lines(self.workdir / RESULTS) if row.get("mode") == "bench"]
        timed = {(row["batch"], row["method"]): row for row in benched}  # of each, the last run's
        for size in dict.fromkeys(key[0] for key in timed):
            heading = f"Speed at fixed settings, random input, batch {size}"
            sections.append((heading, [row for key, row in timed.items() if key[0] == size]))
        encoder = self.encoder(model)
        report.write_html(
            self.workdir / "report.html",
            title=config.title,
            command=self.command,
            machine=timing.device_summary(),
            rows=rows,
            columns=self._columns,
            extra=self.metrics[1:],
            quality=quality,
            sections=[*figures.values(), *sections],
            summary=f"A ViT of width {encoder.config.width}, {encoder.config.depth} blocks, {encoder.info.length} "
            f"tokens. Every method at the same multiply-accumulates, timed side by side with the unreduced model.",
        )
        print(f"Pictures are in {folder}, all results in {self.workdir / 'report.html'}")

    def pictures(
        self, model: Model, batch: Mapping[str, Any], images: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> list[list[Picture]]:
        """For each image the pictures that show what a reduced model does.

        Args:
            model: reduced.
            batch: test examples, all valid.
            images: theirs, as uint8.
        """
        encoder = self.encoder(model)
        _, trace = encoder(self.inputs(model, batch), trace=True)
        return [trace.pictures(image, i) for i, image in enumerate(images)]

    def shown(self, batch: Mapping[str, Any]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The images of a batch as they can be looked at."""
        own, config = self._pretrained, self.config.data
        if own is None:
            mean, std = tuple(config.mean), tuple(config.std)
            return [viz.to_uint8(image, mean, std) for image in batch["image"]]
        shapes = batch["shape"] if "shape" in batch else [None] * len(batch["image"])
        return [own.picture(image, shape) for image, shape in zip(batch["image"], shapes, strict=True)]

    # Rows

    @property
    def _columns(self) -> list[str]:
        return [self.metrics[0] if column == "accuracy" else column for column in report.COLUMNS]

    def _stamp(self, mode: str, model: Model) -> dict[str, Any]:
        return {"mode": mode, "weights": self._fingerprint(model), **report.plain(self.variant())}

    def _fingerprint(self, model: Model) -> str:
        """`fingerprint`, computed once while the weights are the same arrays."""
        leaves = jax.tree.leaves(model.params)
        if (
            self._known is None
            or len(leaves) != len(self._known[0])
            or any(map(operator.is_not, leaves, self._known[0]))
        ):
            self._known = leaves, fingerprint(model)
        return self._known[1]

    def _rows(self, mode: str, model: Model) -> list[dict[str, Any]]:
        """Rows of earlier runs of a mode that belong to these weights and this variant."""
        stamp = self._stamp(mode, model)
        return [row for row in lines(self.workdir / RESULTS) if all(row.get(k) == v for k, v in stamp.items())]


_Task = TypeVar("_Task", bound=Experiment)


def part(
    kind: type[_Task], whole: Experiment, name: str, changes: Mapping[str, Any], reduce: Mapping[str, Any]
) -> _Task:
    """A task of its own that belongs to another one.

    Args:
        kind: the task's class.
        whole: whose config has the fields of this one.
        name: of a folder below `runs/` in its workdir.
        changes: fields of the config, such as {"train.optimiser.lr": 0.1}.
        reduce: the reducer's `name` and settings; an empty name: none.
    """
    config = whole.config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(changes))
    with config.unlocked():
        config.reduce = ml_collections.ConfigDict(dict(reduce))
    return kind(config, whole.workdir / "runs" / name, whole.command)


def describe(model: Model, whole: flops.Cost, label: str = "") -> dict[str, Any]:
    """The columns of a row that need no measurement; `whole` is what the unreduced model costs."""
    cost, names = model.cost(), [method.name for method in model.methods]
    return {
        "method": label or " + ".join(names) or "unreduced",
        "setting": "; ".join(", ".join(f"{k}={short(v)}" for k, v in m.settings.items()) for m in model.methods),
        "macs": cost.total,
        "macs_reducer": cost.reducer,
        "macs_relative": cost.total / whole.total,
        "mean_tokens": budget.mean_tokens(model),
        "control": bool(names) and all(name in reducers.REGISTRY and reducers.entry(name).control for name in names),
    }


def fingerprint(model: Model) -> str:
    """A short name of a model's weights, so that results are not mixed up with those of other weights."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in jax.tree.leaves(model.params):
        digest.update(parallel.fetch(leaf).tobytes())
    return digest.hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    return report.read_jsonl(path) if path.is_file() else []


def _key(row: Mapping[str, Any]) -> tuple[str, Any]:
    return row["method"], row.get("target")


def short(value: Any) -> str:
    """A setting as tables have it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
