"""Classification of texts: trains a BERT or starts from one, evaluates it, sweeps reducers over budgets.

The vocabulary is that of a checkpoint, or a byte-level BPE that is learned from the text of training and lies in
`workdir/vocabulary` and beside the saved model.
"""

from collections.abc import Mapping
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int
import ml_collections

from tokjax import api
from tokjax.data import text
from tokjax.models.bert import BertConfig, preset
from tokjax.tasks import experiment
from tokjax.tasks.classify import Classify, with_classes
from tokjax.tasks.experiment import shape_config, shape_of, user_input
from tokjax.tasks.on_texts import OnTexts
from tokjax.train.config import default_config as train_config


def default_config() -> ml_collections.ConfigDict:
    """Every field of an experiment on texts with classes, with its meaning; configs start from it."""
    config = experiment.common_config("text_classify")
    config.title = "Classification of texts"
    config.batch_size, config.eval_batch_size = 16, 50
    config.model = model_config("")
    config.vocabulary = ml_collections.ConfigDict({"size": 2000})  # at most; a checkpoint of `init` brings its own
    config.reduce = ml_collections.ConfigDict({"name": ""})  # a reducer and its settings, on in every mode; or none
    config.data = text.default_config()
    config.data.task, config.data.length = "classify", 256  # tokens; a longer text loses its end
    config.train = train_config(total_steps=1000)

    config.sweep = sweep = ml_collections.ConfigDict()
    sweep.targets = (0.7, 0.5)  # of the unreduced model's MACs
    sweep.methods = (  # name: registered; label: in the table; settings: all but the knob that reaches the target
        {"name": "tome", "label": "ToMe", "settings": {}},
        {"name": "pitome", "label": "PiToMe-text", "settings": {"variant": "text"}},
        {"name": "topk", "label": "Top-K by CLS", "settings": {}},
        {"name": "random", "label": "random drop", "settings": {}},
        {"name": "avgpool", "label": "average pooling", "settings": {}},
    )
    sweep.repeats = 5  # timed rounds, interleaved with the unreduced model
    sweep.seconds = 0.2  # at least, for each of the two in a round
    return config


def model_config(name: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """A preset such as "bert-base" ("": BertConfig's defaults) and fields to change; None changes nothing.

    Vocabulary, lengths and classes are those of the data.
    """
    apart = ("vocab_size", "length", "max_length", "num_classes", "labels", "pad_id", "pooler")
    return shape_config(BertConfig, apart, name, **changes)


class TextClassify(OnTexts, Classify):
    """Top-1 accuracy of a BERT's classifier."""

    modes: ClassVar[tuple[str, ...]] = ("train", "eval", "sweep")
    counted: ClassVar[str] = "texts"
    kind, takes, start = BertConfig, "BERT", True

    @functools.cached_property
    def tokenizer(self) -> Any:
        """From texts to ids of the length of these data."""
        found, length = self.learned, self.config.data.length
        return found if found.length == length else found.at(length)

    @property
    def steps(self) -> tuple[str, ...]:
        return ("train", "sweep")

    def variant(self) -> dict[str, Any]:
        """The test data."""
        data = self.config.data
        return {"data": f"{data.path or 'embedded'}, {data.test_split}, {data.length}"}

    def build(self) -> api.Model:
        length, names, tokenizer = self.config.data.length, self.test_loader().task.class_names, self.tokenizer
        given = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "num_classes": len(names)}
        given |= {"length": length, "max_length": length, "labels": names}
        return api.build(
            shape_of(self.config.model, BertConfig, preset, **given), self.config.seed, preprocess=tokenizer
        )

    def headed(self, model: api.Model, classes: int) -> api.Model:
        names = self.test_loader().task.class_names
        return with_classes(model, classes, self.config.seed, labels=names, pooler=True)

    def loader(self, split: str, *, train: bool) -> Any:
        config = self.config
        return text.make(
            config.data,
            split,
            **self.share(train),
            train=train,
            seed=config.seed if train else 0,
            tokenizer=self.tokenizer,
        )

    def inputs(self, model: api.Model, batch: Mapping[str, Any]) -> Int[Array, "B N"]:
        with user_input():
            model.config.check(batch["ids"])
        return jnp.asarray(batch["ids"])
