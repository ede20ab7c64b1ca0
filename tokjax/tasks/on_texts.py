"""What the tasks on token ids share: a vocabulary, that of a checkpoint or one learned from the text, and lengths."""

import functools
from typing import Any, ClassVar

from tokjax import api
from tokjax.data import texts
from tokjax.errors import UserError
from tokjax.pretrained.tokenizer import FILES, Tokenizer
from tokjax.tasks.experiment import Experiment, user_input
from tokjax.writing import whole_folder


class OnTexts(Experiment):
    """A task whose config has `vocabulary.size`, and `data` as `tokjax.data.texts` reads it with a `length`.

    Attributes:
        kind: the config of its models, with `length` and `max_length`.
        takes: what those are, for messages.
        start: whether a learned vocabulary has a token that begins every text.
    """

    kind: ClassVar[type[Any]]
    takes: ClassVar[str]
    start: ClassVar[bool] = False

    @property
    def tokenizer(self) -> Any:
        """From texts to ids."""
        return self.learned

    @functools.cached_property
    def learned(self) -> Any:
        """The tokenizer of the checkpoint of `config.init`, of the workdir, or learned from the text of training.

        Raises:
            UserError: a checkpoint without one, or a vocabulary in the workdir that is larger than asked.
        """
        size, length, folder = self.config.vocabulary.size, self.config.data.length, self.workdir / "vocabulary"
        if self.initial is not None:
            if self.initial.preprocess is None:
                raise UserError(f"config.init={self.config.init}: has no tokenizer beside it")
            return self.initial.preprocess
        if not (folder / FILES[0]).is_file():
            documents = texts.open_texts(self.config.data, self.config.data.train_split).documents
            with user_input():
                made = Tokenizer.train_bpe((text.decode() for text in documents), length, size, start=self.start)
            with whole_folder(folder, FILES) as staged:
                made.save(staged)
        found = Tokenizer.load(folder, length=length)
        if found.vocab_size > size:
            raise UserError(f"config.vocabulary.size={size}: {folder} has {found.vocab_size} tokens")
        return found

    @functools.cached_property
    def initial(self) -> api.Model | None:
        """The checkpoint of `config.init`, whose costs are counted for the length of these data."""
        return self._loaded(self.config.init, dtype=self.config.init_dtype) if self.config.init else None

    def _loaded(self, source: Any, **options: Any) -> api.Model:
        model, length = super()._loaded(source, **options), self.config.data.length
        if not isinstance(model.config, self.kind):
            found = type(model.config).__name__
            raise UserError(f"{source} holds a {found}; task {self.config.task!r} takes a {self.takes}")
        if length > model.config.max_length:
            raise UserError(f"config.data.length={length}: {source} has {model.config.max_length} positions")
        return model.with_config(length=length)

    def _fitting(self, model: api.Model) -> api.Model:
        """The workdir's model, if the texts have its vocabulary."""
        if (ours := self.tokenizer.vocab_size) > (theirs := model.config.vocab_size) or (
            type(self.tokenizer) is not type(model.preprocess)
        ):
            kind = type(self.tokenizer).__name__
            raise UserError(
                f"config.vocabulary: a {kind} of {ours} tokens; the model in {self.finished} has {theirs}, of a "
                f"{type(model.preprocess).__name__}"
            )
        return model

    def test_loader(self) -> Any:
        return self.evaluation_loader("test")
