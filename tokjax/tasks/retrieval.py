"""Image-text retrieval: how often the right text is among the k nearest of an image, and the other way round."""

from typing import Any

import ml_collections
import numpy as np

from tokjax import api
from tokjax.tasks import contrastive
from tokjax.tasks.contrastive import Contrastive
from tokjax.train.evaluation import recall_at_k

KS = (1, 5, 10)


def default_config() -> ml_collections.ConfigDict:
    """Every field of a retrieval experiment, with its meaning; configs start from it."""
    return contrastive.default_config("retrieval")


class Retrieval(Contrastive):
    """Recall over the whole test split, of all its images and all their captions."""

    metrics = tuple(f"{way}@{k}" for way in ("image_to_text", "text_to_image") for k in KS)

    def evaluate(self, model: api.DualModel, name: str) -> dict[str, Any]:
        captions = self.captions(self.test_loader().source)
        images, _, places = self.image_features(model, name)
        texts = [text for place in places for text in captions[place]]
        owner = np.repeat(np.arange(len(places)), [len(captions[place]) for place in places])
        similarity = images @ self.text_features(model, texts).T
        return {**recall_at_k(similarity, owner, KS), "images": len(places), "texts": len(texts)}
