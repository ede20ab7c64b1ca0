"""Image classification: train a ViT, evaluate it, sweep reducers over budgets, time it, draw what merged."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import ml_collections
import numpy as np

from tokjax import api, data, parallel
from tokjax.errors import UserError
from tokjax.models.vit import ViTConfig
from tokjax.tasks import experiment
from tokjax.tasks.experiment import Experiment, model_config
from tokjax.train.losses import accuracy, cross_entropy

__all__ = ["Classify", "default_config", "model_config", "with_classes"]


def default_config() -> ml_collections.ConfigDict:
    """Every field of a classification experiment, with its meaning; configs start from it."""
    return experiment.default_config("classify")


class Classify(Experiment):
    """Top-1 accuracy of a ViT's head, whatever it pools: CLS, a mean, an attention pool."""

    metrics = ("accuracy", "agreement")
    shared: ClassVar[tuple[str, ...]] = ("train", "eval")

    def outputs(self) -> int:
        return self.test_loader().num_classes

    def train(self) -> None:
        """Trains, or goes on with an interrupted training; the result lies in `workdir/model`.

        Raises:
            UserError: training and test data have other classes.
        """
        loader = self.loader("train", train=True)
        test, classes = self.test_loader(), loader.num_classes
        if test.num_classes != classes:
            raise UserError(f"the training data have {classes} classes, the test data {test.num_classes}")
        self.learn(self.headed(self.fresh(), classes), loader)

    def headed(self, model: api.Model, classes: int) -> api.Model:
        """The model itself if it has this many classes, else the same with a new head."""
        return with_classes(model, classes, self.config.seed)

    def learn(self, model: api.Model, loader: data.Loader) -> None:
        """Trains a model with the classes of the data."""

        def logits(params, inputs, keys):
            return model.forward(params, inputs, key=keys, train=True).logits

        run = self.by_rows(logits)

        def loss(params, batch, key):
            found = run(params, self.inputs(model, batch), parallel.row_keys(key, len(batch["label"])))
            value = cross_entropy(found, batch["label"], batch["valid"])
            return value, {"accuracy": share(found, batch)}

        self.fit(model, loader, loss, self.evaluation(model))

    def evaluation(self, model: api.Model) -> Callable[[PyTree], Mapping[str, float]]:
        """From parameters to accuracy and loss on the test images."""
        test = self.test_loader()

        @jax.jit
        def counts(params, batch):
            logits = model.forward(params, self.inputs(model, batch)).logits
            correct, total = accuracy(logits, batch["label"], batch["valid"])
            return correct, total, total * cross_entropy(logits, batch["label"], batch["valid"])

        def evaluate(params) -> Mapping[str, float]:
            params = self.with_parameters(model, params).params
            correct, total, value = np.sum([jax.device_get(counts(params, self.placed(batch))) for batch in test], 0)
            return {"accuracy": float(correct / total), "loss": float(value / total)}

        return evaluate

    def evaluate(self, model: api.Model, name: str) -> dict[str, Any]:
        """Accuracy, and how often the class is the one that the unreduced model gives."""
        base = model.unreduced
        unreduced, labels = self.once("classes", base, lambda: self.predict(base, "unreduced"))
        predicted = self.predict(model, name)[0] if model.methods else unreduced
        return {
            "accuracy": float((predicted == labels).mean()),
            "agreement": float((predicted == unreduced).mean()),
            self.counted: len(labels),
        }

    def predict(self, model: api.Model, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and true class of every readable test example, in order.

        Raises:
            UserError: the data have another number of classes than the model, or its head is a projection, as CLIP's.
        """
        classes, predicted, labels = self.test_loader().num_classes, [], []
        outputs = model.config.num_classes
        if classes != outputs:
            kind = "classes" if model.config.head_bias else "outputs without a bias, a projection"
            raise UserError(
                f"the test data have {classes} classes, the model {outputs} {kind}: the labels are not the same; "
                "--mode=train gives it a new head"
            )
        for batch in self.batches("test", name):
            placed = self.placed(batch)
            found = model(self.inputs(model, placed)), placed["label"], placed["valid"]
            logits, label, valid = parallel.fetch(found)
            predicted.append(logits.argmax(-1)[valid])
            labels.append(label[valid])
        return np.concatenate(predicted), np.concatenate(labels)


def share(logits: Float[Array, "B K"], batch: Mapping[str, Any]) -> Float[Array, ""]:
    """Accuracy on a batch of training."""
    correct, total = accuracy(logits, batch["label"], batch["valid"])
    return correct / jnp.maximum(total, 1)


def with_classes(model: api.Model, classes: int, seed: int = 0, **changes: Any) -> api.Model:
    """The model itself if it has this many classes, else the same with new heads, to be trained.

    New heads of a ViT have a bias, whatever the old ones were (CLIP's projection has none). `changes`: other fields of
    the config that go with them.
    """
    if model.config.num_classes == classes:
        return model
    if isinstance(model.config, ViTConfig):
        changes = {"head_bias": True, **changes}
    config, kept = dataclasses.replace(model.config, num_classes=classes, **changes), model.params["model"]
    fresh = api.build(config, seed, preprocess=model.preprocess)
    params = {
        name: kept[name] if name in kept and "head" not in name else new for name, new in fresh.params["model"].items()
    }
    fresh = fresh.with_params({"model": params})
    for method in model.methods:
        fresh = api.reduce(fresh, method.name, **method.settings)
    return fresh
