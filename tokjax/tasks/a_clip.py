"""Attentive Mask CLIP: contrastive training on halves of images that a teacher picks, with SimCLR and BYOL beside.

Paper: Yang et al., "Attentive Mask CLIP", ICCV 2023 (arXiv 2212.08653); microsoft/A-CLIP, `models.py`, `losses.py`.

Of every image there are two crops and a third that encloses both. A moving average of the image encoder, the teacher,
sees the third, whole; the encoder sees the two, of which only the patches that the teacher's CLS token attends to are
left. Both views are matched with the caption, with each other (SimCLR), and with the teacher's feature (BYOL). What
comes out is an ordinary model: at inference nothing is removed.

A teacher that knows nothing may look at the background, and then an encoder that sees nothing else teaches it no
better: on scenes of digits on black this happens. `config.a_clip.whole_steps`, which is ours, lets the encoder see all
patches at first, so that attention has a meaning before it masks.

Where we follow the text against the code: SimCLR contrasts the two views (the code gives it one of them twice), and the
third crop encloses the others (the code mixes up its sides). The code also averages text blocks and projections, which
nothing reads; here the teacher has the image encoder and BYOL's projector.
"""

from collections.abc import Mapping
import functools
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree
import ml_collections
import numpy as np

from tokjax import api, data
from tokjax.data.views import VIEWS, Colours, Views
from tokjax.errors import UserError
from tokjax.models.dual import unit
from tokjax.models.projector import Projector
from tokjax.reducers.vit.aclip import Watch, relevance
from tokjax.signals import Context
from tokjax.tasks import retrieval
from tokjax.tasks.contrastive import MAX_SCALE
from tokjax.tasks.experiment import user_input
from tokjax.tasks.retrieval import Retrieval
from tokjax.train.losses import byol_loss, clip_loss, simclr_loss
from tokjax.train.state import Teacher


def default_config() -> ml_collections.ConfigDict:
    """Every field of an experiment, with its meaning; configs start from it."""
    config = retrieval.default_config()
    config.task = "a_clip"
    config.a_clip = a_clip = ml_collections.ConfigDict()
    a_clip.keep_rate = 0.5  # int(keep_rate * S) + 1 of the S super-patches stay; 1: all
    a_clip.pool = 2  # side of a super-patch, in patches
    a_clip.whole_steps = 0  # at first, in which all patches stay
    a_clip.momentum = 0.996  # of the teacher at first; it rises to 1
    a_clip.freeze_patches = True  # leave the patch embedding as it was drawn
    a_clip.hidden = 4096  # width of the heads inside
    a_clip.embedding = 256  # width of their results
    a_clip.temperature = 0.1  # of SimCLR
    a_clip.simclr_weight = 1.0
    a_clip.byol_weight = 2.0
    a_clip.scale = (0.5, 1.0)  # area share of the two crops
    a_clip.jitter = 0.8  # probabilities of what happens to their colours
    a_clip.grey = 0.2
    a_clip.blur = 0.1
    a_clip.solarise = 0.2
    return config


class AClip(Retrieval):
    """Trains two towers on masked views; evaluates the whole image, as any retrieval."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, command: str):
        super().__init__(config, workdir, command)
        if config.loss != "clip":
            raise UserError(f"config.loss={config.loss!r}: must be clip, which A-CLIP adds to")
        for name in ("simclr_weight", "byol_weight"):
            if not 0 <= config.a_clip[name] < np.inf:
                raise UserError(f"config.a_clip.{name}={config.a_clip[name]}: must be at least 0")
        if config.a_clip.whole_steps < 0:
            raise UserError(f"config.a_clip.whole_steps={config.a_clip.whole_steps}: must be at least 0")
        if not 0 < config.a_clip.temperature < np.inf:
            raise UserError(f"config.a_clip.temperature={config.a_clip.temperature}: must be above 0")

    def loader(self, split: str, *, train: bool) -> data.Loader:
        """In training, batches of views and boxes; see `tokjax.data.views.Views`."""
        if not train:
            return super().loader(split, train=False)
        config, at = self.config, self.config.a_clip
        sized = self.at_size(config.data)
        with user_input():
            colours = Colours(jitter=at.jitter, grey=at.grey, blur=at.blur, solarise=at.solarise)
            views = Views(tuple(sized.image_size), tuple(at.scale), colours=colours)
        return data.make(
            sized,
            split,
            batch_size=config.batch_size,
            train=True,
            seed=config.seed,
            transform=views,
            normalise=self.normalise(train=True),
            tokenizer=self.tokenizer,
        )

    # Parameters: those of the model, and the heads beside it.

    def heads(self, model: api.DualModel) -> dict[str, tuple[Any, PyTree[Array]]]:
        """Of every head its graph and its initial parameters."""
        width, at = model.vision.config.pooled_width, self.config.a_clip
        rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(self.config.seed), 1))  # other keys than the towers'
        with user_input():
            made = {
                "simclr": Projector((width, at.hidden, at.hidden, at.embedding), bias=True, rngs=rngs),
                "projector": Projector((width, at.hidden, at.embedding), bias=False, rngs=rngs),
                "predictor": Projector((at.embedding, at.hidden, at.embedding), bias=False, rngs=rngs),
            }
        parts = {name: nnx.split(head) for name, head in made.items()}
        return {name: (graph, nnx.to_pure_dict(state)) for name, (graph, state) in parts.items()}

    def parameters(self, model: api.DualModel) -> PyTree:
        return {"model": model.params, "heads": {name: params for name, (_, params) in self.heads(model).items()}}

    def with_parameters(self, model: api.DualModel, parameters: PyTree) -> api.DualModel:
        return model.with_params(parameters["model"])

    def train(self) -> None:
        model, at = self.fresh(), self.config.a_clip
        with user_input():
            teacher = api.reduce(model.vision.unreduced, Watch())
            masked = api.reduce(model.vision, "a_clip", keep_rate=at.keep_rate, pool=at.pool)
            part = Teacher(followed, at.momentum, self.config.train.total_steps)
        graphs = {name: graph for name, (graph, _) in self.heads(model).items()}

        def head(name: str, params: PyTree, x: Array, valid: Array) -> Array:
            return nnx.merge(graphs[name], params)(x, valid)

        def loss(student, params, batch, key, followed):
            towers, own, valid = params["model"], params["heads"], batch["valid"]
            b, height, width, channels = batch["image"].shape
            views = jnp.asarray(batch["image"]).reshape(b, VIEWS, height // VIEWS, width, channels)
            keys = jax.random.split(key)

            # 1. The teacher looks at the third view, all of it.
            watched = teacher.forward({"model": followed["vision"]}, views[:, 2])
            map = relevance(watched.tokens.aux, model.vision.config.grid)
            target = head("projector", followed["projector"], watched.pooled, valid)

            # 2. The encoder sees of the others what that one looked at.
            boxes = jnp.asarray(batch["boxes"])
            context = Context(
                relevance=jnp.concatenate([map, map]), boxes=jnp.concatenate([boxes[:, ::2], boxes[:, 1:]])
            )
            both = jnp.concatenate([views[:, 0], views[:, 1]])
            seen = student.forward(towers["vision"], both, key=keys[0], train=True, context=context)
            text = unit(model.text.forward(towers["text"], batch["ids"], key=keys[1], train=True).logits)

            # 3. Each view with its caption, with the other view, with the teacher's feature.
            same = (batch["ids"][:, None] == batch["ids"]).all(-1)  # equal captions are no negatives of each other
            scale = jnp.exp(towers["logit_scale"])
            images, twice = jnp.split(unit(seen.logits), 2), jnp.tile(valid, 2)
            clip = sum(clip_loss(image, text, scale, valid, same=same) for image in images) / len(images)
            first, second = jnp.split(head("simclr", own["simclr"], seen.pooled, twice), 2)
            simclr = simclr_loss(first, second, at.temperature, valid)
            predicted = head("projector", own["projector"], seen.pooled, twice)
            predicted = head("predictor", own["predictor"], predicted, twice)
            byol = byol_loss(predicted, jnp.tile(target, (2, 1)), twice)
            total = clip + at.simclr_weight * simclr + at.byol_weight * byol
            return total, {"clip": clip, "simclr": simclr, "byol": byol, "scale": scale}

        def evaluate(params) -> Mapping[str, float]:
            row = self.evaluate(self.with_parameters(model, params), "eval")
            return {name: row[name] for name in self.metrics if name in row}

        frozen = ("vision/model/patch_embed/.*",) if at.freeze_patches else ()
        loader = self.loader("train", train=True)
        losses = [(at.whole_steps, functools.partial(loss, masked))]
        if at.whole_steps:
            losses = [(0, functools.partial(loss, model.vision)), *losses]
        self.fit(model, loader, losses, evaluate, frozen, teacher=part, constrain=bounded)


def followed(params: PyTree) -> PyTree:
    """The part of the parameters that the teacher follows."""
    return {"vision": params["model"]["vision"]["model"], "projector": params["heads"]["projector"]}


def bounded(params: PyTree) -> PyTree:
    """The temperature kept in CLIP's range, logits times 1 to `MAX_SCALE`."""
    scale = jnp.clip(params["model"]["logit_scale"], 0.0, np.log(MAX_SCALE))
    return {**params, "model": {**params["model"], "logit_scale": scale}}
