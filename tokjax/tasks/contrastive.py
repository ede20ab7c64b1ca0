"""Image-text models: contrastive training of two towers from captions, and what the tasks on such models share."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int, Int32
import ml_collections
from ml_collections import config_dict
import numpy as np

from tokjax import api, data
from tokjax.errors import UserError
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig, preset
from tokjax.pretrained.tokenizer import Tokenizer
from tokjax.tasks import experiment
from tokjax.tasks.experiment import Experiment, user_input, whole_patches
from tokjax.train.losses import clip_loss, siglip_loss

MAX_SCALE = 100.0  # of CLIP's logits in training (Radford et al. 2021, section 2.5)
LOSSES = ("clip", "siglip")


def default_config(task: str) -> ml_collections.ConfigDict:
    """Every field of an experiment on an image-text model, with its meaning."""
    config = experiment.default_config(task)
    config.loss = "clip"  # or siglip, which also gives the model a bias
    config.embed_dim = 64  # width of the common space, of a model from scratch
    config.text = text_config()
    config.train.best_metric = "accuracy" if task == "zero_shot" else "image_to_text@1"
    config.data.source = "scenes"
    config.data.image_size = (48, 48)
    config.data.augment.crop = "none"
    return config


def text_config(**changes: Any) -> ml_collections.ConfigDict:
    """Fields of TextConfig to change in a model from scratch; None changes nothing."""
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(TextConfig):
        if field.name not in ("vocab_size", "eos_id", "embed_dim"):  # the tokenizer's, the common space's
            config[field.name] = config_dict.placeholder(type(field.default))
    config.update(changes)
    return config


class Contrastive(Experiment):
    """Trains two towers on images and their captions; subclasses measure what they have learned."""

    both_towers = True

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, command: str):
        super().__init__(config, workdir, command)
        if config.loss not in LOSSES:
            raise UserError(f"config.loss={config.loss!r}: must be one of {', '.join(LOSSES)}")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's; for a model from scratch the words of the training captions.

        Raises:
            UserError: the checkpoint has none.
        """
        if self.initial is not None:
            return _tokenizer_of(self.initial)
        with user_input():
            captions = self.captions(super().loader("train", train=True).source)
            length = self.config.text.get("length") or TextConfig.length
            return Tokenizer.train_words([text for group in captions for text in group], length)

    def captions(self, source: data.Source) -> Sequence[Sequence[str]]:
        """Of every example its texts.

        Raises:
            UserError: the data have none.
        """
        found = getattr(source, "captions", None)
        if found is None:
            raise UserError(f"config.data.source={self.config.data.source!r}: has no captions")
        return found

    def build(self) -> api.DualModel:
        config, size = self.config, tuple(self.config.data.image_size)

        def given(fields: ml_collections.ConfigDict) -> dict[str, Any]:
            return {k: v for k, v in fields.to_dict().items() if k != "preset" and v is not None}

        head = {"image_size": size, "num_classes": config.embed_dim, "head_bias": False, **given(config.model)}
        vision = whole_patches(preset(config.model.preset, **head) if config.model.preset else ViTConfig(**head))
        text = TextConfig(
            **{
                "vocab_size": self.tokenizer.vocab_size,
                "eos_id": self.tokenizer.eos_id,
                "embed_dim": config.embed_dim,
                **given(config.text),
            }
        )
        start = {"logit_scale": float(np.log(10)), "logit_bias": -10.0} if config.loss == "siglip" else {}
        shape = DualConfig(vision, text, **start)
        return api.build(shape, config.seed, preprocess=self.preprocess(size), tokenizer=self.tokenizer)

    def loader(self, split: str, *, train: bool) -> data.Loader:
        """As any experiment's; batches of training have `ids` too."""
        if not train:
            return super().loader(split, train=False)
        config = self.config
        return data.make(
            self.at_size(config.data),
            split,
            batch_size=config.batch_size,
            train=True,
            seed=config.seed,
            normalise=self.normalise(train=True),
            tokenizer=self.tokenizer,
        )

    def train(self) -> None:
        model, siglip = self.fresh(), self.config.loss == "siglip"
        if siglip and model.config.logit_bias is None:
            raise UserError(f"config.loss='siglip': needs a logit_bias, which {self.config.init} does not have")

        def loss(params, batch, key):
            out = model.forward(params, self.inputs(model, batch), batch["ids"], key=key, train=True)
            same = (batch["ids"][:, None] == batch["ids"]).all(-1)  # equal captions are no negatives of each other
            if siglip:
                value = siglip_loss(out.image, out.text, out.scale, out.bias, batch["valid"], same=same)
            else:
                value = clip_loss(out.image, out.text, jnp.minimum(out.scale, MAX_SCALE), batch["valid"], same=same)
            found = (out.logits - jnp.where(same & ~jnp.eye(len(same), dtype=bool), jnp.inf, 0)).argmax(1)
            right = (found == jnp.arange(len(same))) & batch["valid"]
            share = right.sum() / jnp.maximum(batch["valid"].sum(), 1)
            return value, {"in_batch_accuracy": share, "scale": out.scale}

        def evaluate(params) -> Mapping[str, float]:
            row = self.evaluate(model.with_params(params), "eval")
            return {name: row[name] for name in self.metrics if name in row}

        self.fit(model, self.loader("train", train=True), loss, evaluate)

    # Features

    def image_features(
        self, model: api.DualModel, name: str
    ) -> tuple[Float[np.ndarray, "I E"], Int32[np.ndarray, "I"], Int[np.ndarray, "I"]]:
        """Of every readable test image, in order: the feature at length 1, the label, the place in the source."""
        features, labels, valid = [], [], []
        for batch in self.batches("test", name):
            found = np.asarray(model.encode_image(self.inputs(model, batch)))
            features.append(found[batch["valid"]])
            labels.append(batch["label"][batch["valid"]])
            valid.append(batch["valid"])
        return np.concatenate(features), np.concatenate(labels), np.flatnonzero(np.concatenate(valid))

    def text_features(self, model: api.DualModel, texts: Sequence[str]) -> Float[np.ndarray, "T E"]:
        """Features at length 1, encoded in batches of one shape."""
        tokenizer, size, features = _tokenizer_of(model), self.config.eval_batch_size, []
        for start in range(0, len(texts), size):
            part = list(texts[start : start + size])
            ids = tokenizer([*part, *[""] * (size - len(part))])
            features.append(np.asarray(model.encode_text(ids))[: len(part)])
        return np.concatenate(features)


def _tokenizer_of(model: api.DualModel) -> Any:
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer: put its tokenizer.json (or vocab.json and merges.txt) beside it")
    return model.tokenizer
