"""Zero-shot classification: the class whose sentences lie nearest to an image (Radford et al. 2021, section 3.1)."""

from typing import Any

from jaxtyping import Float
import ml_collections
import numpy as np

from tokjax import api, data
from tokjax.data import prompts
from tokjax.errors import UserError
from tokjax.tasks import contrastive
from tokjax.tasks.contrastive import Contrastive


def default_config() -> ml_collections.ConfigDict:
    """Every field of a zero-shot experiment, with its meaning; configs start from it.

    `config.data` is what a model from scratch is trained on, `config.zero_shot.data` what is classified.
    """
    config = contrastive.default_config("zero_shot")
    config.zero_shot = zero_shot = ml_collections.ConfigDict()
    zero_shot.data = data.default_config()
    zero_shot.classes = ()  # names in place of the data's, in the order of their labels
    zero_shot.templates = ("clip",)  # names of `tokjax.data.prompts.TEMPLATES`, or sentences with {} for the name
    return config


class ZeroShot(Contrastive):
    """Top-1 accuracy; a class is the mean of the features of its sentences."""

    metrics = ("accuracy", "agreement")

    def variant(self) -> dict[str, Any]:
        return {"templates": list(self._templates())}

    def loader(self, split: str, *, train: bool) -> data.Loader:
        if train:
            return super().loader(split, train=True)
        return data.make(
            self.at_size(self.config.zero_shot.data),
            split,
            batch_size=self.config.eval_batch_size,
            train=False,
            transform=self.transform(),
            normalise=self.normalise(),
        )

    def evaluate(self, model: api.DualModel, name: str) -> dict[str, Any]:
        classes = self.class_features(model)
        images, labels, _ = self.image_features(model, name)
        found = (images @ classes.T).argmax(1)
        base = found
        if model.methods:
            whole = model.unreduced
            base = self.once("predicted", whole, lambda: self._found(whole))
        return {
            "accuracy": float((found == labels).mean()),
            "agreement": float((found == base).mean()),
            "images": len(labels),
        }

    def _found(self, model: api.DualModel) -> np.ndarray:
        images, _, _ = self.image_features(model, "unreduced")
        return (images @ self.class_features(model).T).argmax(1)

    def class_features(self, model: api.DualModel) -> Float[np.ndarray, "K E"]:
        """Of every class the mean over its sentences, at length 1."""
        names = tuple(self.config.zero_shot.classes) or self.test_loader().source.class_names
        if len(names) != self.test_loader().source.num_classes:
            raise UserError(
                f"config.zero_shot.classes={names}: must be {self.test_loader().source.num_classes} names, one a label"
            )
        sentences = prompts.expand(names, self._templates())
        features = self.text_features(model, [sentence for group in sentences for sentence in group])
        mean = features.reshape(len(names), -1, features.shape[-1]).mean(1)
        return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)

    def _templates(self) -> tuple[str, ...]:
        given = tuple(self.config.zero_shot.templates)
        templates = tuple(sentence for part in given for sentence in prompts.TEMPLATES.get(part, (part,)))
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise UserError(
                f"config.zero_shot.templates={given}: must be names of {', '.join(prompts.TEMPLATES)}, or sentences "
                "with one {} for the name of the class"
            )
        return templates
