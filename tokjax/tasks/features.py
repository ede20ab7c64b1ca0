"""Features of a frozen image encoder: k-nearest-neighbour accuracy with and without reduction, and files of them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import ml_collections
import numpy as np

from tokjax import api
from tokjax.errors import UserError
from tokjax.tasks import experiment
from tokjax.tasks.classify import Classify
from tokjax.train.evaluation import knn_accuracy
from tokjax.writing import write_whole

BANKS = ("unreduced", "reduced")
SPLITS = ("train", "test")


def default_config() -> ml_collections.ConfigDict:
    """Every field of an experiment on features, with its meaning; configs start from it."""
    config = experiment.default_config("features")
    config.knn = knn = ml_collections.ConfigDict()
    knn.k = 20  # neighbours
    knn.temperature = 0.07  # of their votes
    # Whose features the training images have: the unreduced encoder's, so that a stored bank serves every method, or
    # those of the same encoder as the test images.
    knn.bank = "unreduced"
    return config


class Features(NamedTuple):
    """Pooled features of a split, in its order; images that could not be read are left out."""

    features: Float[np.ndarray, "N C"]
    labels: Int[np.ndarray, " N"]
    ids: np.ndarray  # names of the examples, as the source tells them


class FrozenFeatures(Classify):
    """Weighted k-NN accuracy of pooled features: no head, nothing trained.

    The encoder is `config.init`, or what the workdir holds. Without either, `train` makes one as classification does,
    and only its features are looked at.
    """

    modes = ("train", "eval", "sweep", "features", "bench", "viz")
    metrics = ("knn_accuracy", "similarity")
    shared = ("train",)

    @property
    def steps(self) -> tuple[str, ...]:
        return (*(() if self.config.init else ("train",)), "sweep", "features", "bench", "viz")

    def variant(self) -> dict[str, Any]:
        knn = self.config.knn
        if knn.bank not in BANKS:
            raise UserError(f"config.knn.bank={knn.bank!r}: must be one of {', '.join(BANKS)}")
        return {"knn": f"k={knn.k}, temperature={knn.temperature:g}, bank={knn.bank}"}

    def train(self) -> None:
        """Trains an encoder from scratch with a classification head.

        Raises:
            UserError: there is a `config.init`, which stays as it is.
        """
        if self.config.init:
            raise UserError(f"config.init={self.config.init}: is a frozen encoder; task 'classify' would train it")
        super().train()

    def evaluate(self, model: api.Model, name: str) -> dict[str, Any]:
        """k-NN accuracy, and the mean cosine of the test images' features with those of the unreduced encoder."""
        knn, base = self.config.knn, model.unreduced
        bank, test = self.once("features", base, lambda: self.collect(base, SPLITS, "unreduced"))
        unreduced = test.features
        if model.methods and knn.bank == "reduced":
            bank, test = self.collect(model, SPLITS, name)
        elif model.methods:
            (test,) = self.collect(model, ("test",), name)
        with experiment.user_input():
            accuracy = knn_accuracy(
                bank.features, bank.labels, test.features, test.labels, k=knn.k, temperature=knn.temperature
            )
        return {
            "knn_accuracy": accuracy,
            "similarity": _mean_cosine(test.features, unreduced),
            "images": len(test.labels),
        }

    def collect(self, model: api.Model, splits: Sequence[str], name: str) -> list[Features]:
        """Pooled features of every split, before any head, in float32."""
        pooled = jax.jit(lambda params, inputs: model.forward(params, inputs).pooled.astype(jnp.float32))
        collected = []
        for split in splits:
            source, features, labels, ids = self.evaluation_loader(split).source, [], [], []
            for number, batch in enumerate(self.batches(split, f"{name}, {split}")):
                rows = np.flatnonzero(batch["valid"])
                features.append(np.asarray(pooled(model.params, self.inputs(model, batch)))[rows])
                labels.append(batch["label"][rows])
                ids += [source.name_of(number * len(batch["valid"]) + int(row)) for row in rows]
            collected.append(Features(np.concatenate(features), np.concatenate(labels), np.array(ids)))
        return collected

    def features(self) -> None:
        """Writes `features_train.npz` and `features_test.npz`: `features`, `labels` and `ids`, without pickles."""
        model = self.model()
        for split, found in zip(SPLITS, self.collect(model, SPLITS, "features"), strict=True):
            path = write_whole(self.workdir / f"features_{split}.npz", partial(_write_npz, found))
            print(f"{path}: {found.features.shape[0]} x {found.features.shape[1]}", flush=True)


def _write_npz(features: Features, path: Path) -> None:
    with path.open("wb") as file:  # given a path, numpy would add a suffix
        np.savez(file, **features._asdict())


def _mean_cosine(a: Float[np.ndarray, "N C"], b: Float[np.ndarray, "N C"]) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.where(lengths == 0, 1, lengths)).mean())
