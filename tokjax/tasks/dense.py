"""Dense prediction from patch features: segmentation and depth by linear probes, with and without reduction.

A reduced encoder has no longer a token for every patch. `Model.dense` gives each patch the features of the token that
it lives on, and those of the nearest surviving patch where it was dropped; on these stands one linear map for each
target. Probes are solved, not trained (`tokjax.train.probes`): segmentation by softmax regression, depth by ridge.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8
import ml_collections
import numpy as np

from tokjax import api, data, token_map, viz
from tokjax.data.sources import Fields
from tokjax.errors import UserError
from tokjax.tasks import experiment
from tokjax.tasks.experiment import Experiment, user_input
from tokjax.train import evaluation
from tokjax.train.evaluation import IGNORE
from tokjax.train.losses import cross_entropy
from tokjax.train.probes import Linear, logistic, ridge
from tokjax.viz import Picture

TARGETS = {"segmentation": ("mean_iou", "pixel_accuracy"), "depth": ("delta1", "rmse")}  # and their metrics
PROBED_ON = ("unreduced", "reduced")

Probe = dict[str, Linear]  # of every target
_NO_GRID = "config.task='dense': a NaFlex encoder has no one grid of patches"


def default_config() -> ml_collections.ConfigDict:
    """Every field of an experiment on dense targets, with its meaning; configs start from it."""
    config = experiment.default_config("dense")
    config.data.source = "scenes"
    config.data.image_size = (48, 48)
    config.data.augment.crop = "none"
    config.train.best_metric = "mean_iou"
    config.targets = ("segmentation", "depth")  # of those that the data have
    # Training from scratch: weights of the depth's squared error and of the cross-entropy of the image's class, beside
    # the cross-entropy of the segmentation. Without the latter nothing trains CLS, whose attention some reducers go by.
    config.depth_weight = 1.0
    config.label_weight = 0.0
    config.fill = "nearest"  # what a dropped patch gets: the features of the nearest survivor, or zeros
    config.probe = probe = ml_collections.ConfigDict()
    # Whose features the probe is fitted to: the unreduced encoder's, one probe for all methods, or those of the
    # encoder that it is measured on, one for each.
    probe.on = "unreduced"
    probe.l2 = 1e-4
    probe.patches = 100_000  # of the training images, drawn at random; they are in memory at once
    probe.iterations = 200  # of L-BFGS at most
    return config


@jax.jit
def _predict(probe: Probe, features: Float[Array, "B h w C"]) -> dict[str, Array]:
    out = {name: linear(features) for name, linear in probe.items()}
    return {name: y.argmax(-1) if name == "segmentation" else y[..., 0] for name, y in out.items()}


class Dense(Experiment):
    """Segmentation and depth of every patch; see the module."""

    pictures_a_row = 4

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, command: str):
        super().__init__(config, workdir, command)
        self.targets = tuple(config.targets)
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise UserError(f"config.targets={self.targets}: must be one or both of {', '.join(TARGETS)}")
        choices = {"fill": (config.fill, get_args(token_map.Fill)), "probe.on": (config.probe.on, PROBED_ON)}
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise UserError(f"config.{name}={value!r}: must be one of {', '.join(allowed)}")
        self.metrics = tuple(metric for name, metrics in TARGETS.items() if name in self.targets for metric in metrics)

    @property
    def steps(self) -> tuple[str, ...]:
        return ("sweep", "bench", "viz") if self.config.init else super().steps

    def variant(self) -> dict[str, Any]:
        probe = self.config.probe
        return {"probe": f"on={probe.on}, fill={self.config.fill}, l2={probe.l2:g}, patches={probe.patches}"}

    # Data and models

    def outputs(self) -> int:
        return self.test_loader().source.num_classes if self.config.label_weight else 0

    def evaluation_loader(self, split: str) -> data.Loader:
        if self.initial is not None and self.initial.config.position == "naflex":
            raise UserError(_NO_GRID)
        loader = super().evaluation_loader(split)
        fields = _fields(loader)
        if missing := [name for name in self.targets if name not in fields]:
            has = ", ".join(fields) or "none"
            raise UserError(f"config.targets: the data have no {missing[0]}; of places they have {has}")
        return loader

    @functools.cached_property
    def segments(self) -> tuple[str, ...]:
        """Names of the classes of the segmentation."""
        return getattr(self.test_loader().source, "segments", ())

    def _check(self, model: api.Model) -> None:
        if model.config.position == "naflex":
            raise UserError(_NO_GRID)
        for name in self.targets:
            grid = _fields(self.test_loader())[name][0]
            if tuple(grid) != model.config.grid:
                raise UserError(
                    f"config.data.patch_size={self.config.data.patch_size}: gives labels on a grid of {tuple(grid)}, "
                    f"the encoder's patches are {model.config.grid}; its patch_size is {model.config.patch_size}"
                )

    def parameters(self, model: api.Model) -> PyTree:
        width, outputs = model.config.width, {"segmentation": len(self.segments), "depth": 1}
        heads = {name: Linear(jnp.zeros((width, outputs[name])), jnp.zeros(outputs[name])) for name in self.targets}
        return {"encoder": model.params, "heads": heads}

    def with_parameters(self, model: api.Model, parameters: PyTree) -> api.Model:
        return model.with_params(parameters["encoder"])

    # Modes

    def train(self) -> None:
        """Trains encoder and linear heads together; the encoder alone lies in `workdir/model`, to be probed.

        Raises:
            UserError: there is a `config.init`, whose features stay as they are.
        """
        if self.config.init:
            raise UserError(f"config.init={self.config.init}: is a frozen encoder; leave it out to train one")
        model, loader = self.fresh(), self.loader("train", train=True)
        self._check(model)
        config, traced = self.config, bool(model.methods)
        if config.label_weight and model.config.num_classes != loader.source.num_classes:
            raise UserError(
                f"config.model.num_classes={model.config.num_classes}: the training data have "
                f"{loader.source.num_classes} classes of images, which label_weight={config.label_weight} trains"
            )

        def loss(params, batch, key):
            output = model.forward(params["encoder"], batch["image"], key=key, train=True, trace=traced)
            features = model.restore(output, fill=config.fill)
            total, parts = jnp.float32(0), dict[str, Array]()
            if config.label_weight:
                total += config.label_weight * cross_entropy(output.logits, batch["label"], batch["valid"])
            for name in self.targets:
                out, goal = params["heads"][name](features), batch[name].reshape(features.shape[:3])
                counted = batch["valid"][:, None, None] & _counts(name, goal)
                if name == "segmentation":
                    goal = jnp.where(counted, goal, 0)
                    part = cross_entropy(out.reshape(-1, out.shape[-1]), goal.reshape(-1), counted.reshape(-1))
                else:
                    error = jnp.where(counted, out[..., 0] - goal, 0)
                    part = config.depth_weight * (error**2).sum() / jnp.maximum(counted.sum(), 1)
                total, parts = total + part, {**parts, f"{name}_loss": part}
            return total, parts

        def evaluate(params) -> Mapping[str, float]:
            encode = self.timed(model.with_params(params["encoder"]))
            measured = self.measure(encode, params["heads"], "eval")
            return {name: value for name, value in measured.items() if name != "images"}

        self.fit(model, loader, loss, evaluate)

    def evaluate(self, model: api.Model, name: str) -> dict[str, Any]:
        """The metrics of the probes on this model's features."""
        self._check(model)
        return self.measure(self.timed(model), self.probe_of(model, name), name)

    def timed(self, model: api.Model) -> Callable[[PyTree], Any]:
        """Encoding with un-merging, without the probes, which cost the same for every method."""
        return functools.partial(model.dense, fill=self.config.fill)

    def measure(self, encode: Callable[[Array], Array], probe: Probe, name: str) -> dict[str, Any]:
        """Metrics over all patches of the test images that count, and how many images there were."""
        classes = len(self.segments)
        confusion, depths, images = np.zeros((classes, classes), np.int64), [], 0
        for batch in self.batches("test", name):
            valid, features = batch["valid"], encode(jnp.asarray(batch["image"]))
            found = {name: np.asarray(values)[valid] for name, values in _predict(probe, features).items()}
            goals: Mapping[str, Any] = batch
            if "segmentation" in found:
                goal = goals["segmentation"][valid].reshape(found["segmentation"].shape)
                confusion += evaluation.confusion(found["segmentation"], goal, classes)
            if "depth" in found:
                depths.append(np.stack([found["depth"], goals["depth"][valid].reshape(found["depth"].shape)]))
            images += int(valid.sum())
        row: dict[str, Any] = {}
        if "segmentation" in self.targets:
            right, total = np.trace(confusion), confusion.sum()
            row |= {"mean_iou": evaluation.mean_iou(confusion), "pixel_accuracy": float(right / max(total, 1))}
        if "depth" in self.targets:
            guess, goal = np.concatenate(depths, axis=1)
            with user_input():
                depth = evaluation.depth_metrics(guess, goal, _counts("depth", goal))
            row |= {"delta1": depth.delta1, "rmse": depth.rmse, "abs_rel": depth.abs_rel}
        return {**row, "images": images}

    # Probes

    def probe_of(self, model: api.Model, name: str = "probe") -> Probe:
        """What stands on this model's features, by `config.probe.on`."""
        base = model.unreduced
        if model.methods and self.config.probe.on == "reduced":
            return self.fit_probe(model, name)
        return self.once("probe", base, lambda: self.fit_probe(base, "unreduced"))

    def fit_probe(self, model: api.Model, name: str) -> Probe:
        """Solves for the probes on features of the training images, of at most `config.probe.patches` patches.

        Raises:
            UserError: no patch of the training images counts.
        """
        config, encode = self.config.probe, self.timed(model)
        images, patches = len(self.evaluation_loader("train").source), model.config.num_patches
        share = min(1.0, config.patches / (images * patches))
        rng = np.random.default_rng(self.config.seed)
        features: list[np.ndarray] = []
        goals: dict[str, list[np.ndarray]] = {target: [] for target in self.targets}
        for batch in self.batches("train", f"{name}, probe"):
            values: Mapping[str, Any] = batch
            labels = {target: values[target].reshape(-1, patches) for target in self.targets}
            taken = rng.random((len(values["valid"]), patches)) < share
            taken &= values["valid"][:, None]
            taken &= np.any([_counts(target, labels[target]) for target in self.targets], 0)
            features.append(np.asarray(encode(jnp.asarray(values["image"]))).reshape(*taken.shape, -1)[taken])
            for target in self.targets:
                goals[target].append(labels[target][taken])
        x, probe = np.concatenate(features), {}
        for target in self.targets:
            goal = np.concatenate(goals[target])
            counted = _counts(target, goal)
            if not counted.any():
                raise UserError(f"config.targets: no patch of the training images has a {target} that counts")
            with user_input():
                if target == "segmentation":
                    classes = len(self.segments)
                    probe[target] = logistic(x[counted], goal[counted], classes, config.l2, config.iterations)
                else:
                    probe[target] = ridge(x[counted], goal[counted, None], config.l2)
        return probe

    # Pictures

    def pictures(
        self, model: api.Model, batch: Mapping[str, Any], images: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> list[list[Picture]]:
        """Image, what is left of its tokens, and for each target truth and predictions without and with reduction."""
        self._check(model)
        inputs, base, (down, across) = self.inputs(model, batch), model.unreduced, model.config.grid
        _, trace = model(inputs, trace=True)
        found = {
            name: {
                target: np.asarray(values).reshape(-1, down, across)
                for target, values in _predict(self.probe_of(each), self.timed(each)(inputs)).items()
            }
            for name, each in (("unreduced", base), ("reduced", model))
        }
        drawn = []
        for i, image in enumerate(images):
            large = viz.enlarged(image)
            tokens = trace.pictures(image, i, [model.config.depth - 1])[1]
            pictures = []
            for target, first in zip(self.targets, (Picture(large, "image"), tokens), strict=False):
                pictures.append(first)
                maps = {"truth": batch[target][i], **{name: values[target][i] for name, values in found.items()}}
                painted = self._painted(target, maps, large.shape[0] // down)
                pictures += [Picture(picture, f"{target}\n{name}") for name, picture in painted.items()]
            drawn.append(pictures if len(self.targets) == 2 else [*pictures, tokens])
        return drawn

    def _painted(self, target: str, maps: Mapping[str, np.ndarray], cell: int) -> dict[str, np.ndarray]:
        if target == "segmentation":
            colors = viz.class_colors(len(self.segments))
            ignored = {"truth": IGNORE}  # class 255 of a prediction is a class
            return {name: viz.class_map(values, cell, ignored.get(name), colors) for name, values in maps.items()}
        truth = np.where(_counts(target, maps["truth"]), maps["truth"], np.nan)
        known = truth[np.isfinite(truth)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        shown = {**maps, "truth": truth}
        return {name: viz.value_map(values, cell, low, max(high, low + 1e-6)) for name, values in shown.items()}


def _fields(loader: data.Loader) -> Fields:
    return getattr(loader.source, "fields", {})


def _counts(target: str, values: Any) -> Any:
    """Where a label counts: a depth of 0 is not known."""
    return values != IGNORE if target == "segmentation" else values > 0
