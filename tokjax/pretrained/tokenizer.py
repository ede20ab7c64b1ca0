"""From texts to token ids, with the tokenizer that a text encoder was trained with.

The work is done by the `tokenizers` package, which reads every `tokenizer.json`. What the files leave open is settled
here, from the published code of each family:

- CLIP (OpenAI, OpenCLIP, Hugging Face): byte-level BPE of lowercase words, 77 ids from start to end of text. OpenAI's
  and OpenCLIP's own tokenizers pad with 0, Hugging Face's with the end-of-text id; since the text model is causal and
  reads out the first end of text, both give the same features. What OpenAI's code repairs first, broken text (ftfy) and
  HTML entities, is left as it is, as by Hugging Face's fast tokenizer.
- SigLIP: lowercase, ASCII punctuation removed, runs of white space made one; 64 ids padded with `</s>`, id 1
  (big_vision: `pad_value=1`, sticky end of text). The text model reads out the last position: padding matters.
- SigLIP2: Gemma's vocabulary, lowercase, no start of text, 64 ids padded with `<pad>`, id 0.
- BERT: WordPiece of lowercase words without accents, unless the files say otherwise, from [CLS] to [SEP].
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
import gzip
import json
from pathlib import Path
from typing import Any, Literal, Self

from jaxtyping import Int, Int32
import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tokjax.errors import UserError
from tokjax.writing import write_whole

FILES = ("tokenizer.json", "tokenizer_config.json")  # what `Tokenizer.save` writes

_START, _END = "<|startoftext|>", "<|endoftext|>"
_OPENAI_FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt")
_OPENAI_MERGES = 49152 - 256 - 2  # its file lists more than its vocabulary uses
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ASCII_PUNCTUATION = r"[!-/:-@\[-`{-~]"  # Python's string.punctuation
_AS_THEY_ARE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that add nothing to tokenizer.json
_NO_LIMIT = 1_000_000  # Hugging Face writes 1e30 where there is no length


class Tokenizer:
    """Texts to ids of one length: `tokenizer(["a cat", ""])` is int32 [2, length].

    A text that is too long loses its end, but not its end-of-text token; an empty one has the special tokens alone.

    Args:
        backend: of the `tokenizers` package; its post-processor puts the special tokens. It is changed.
        length: T.
        pad_id: fills up short texts.
        bos_id: for whoever asks; None: texts have no start token.
        eos_id: the same for their end.
        pad_side: where the filling stands.
        template: of conversations, see `chat`.
        tokens: text of special tokens by their names ("bos_token"), for the template.

    Raises:
        ValueError: a length that leaves no room between the special tokens, a pad id that is not in the vocabulary, or
            another side.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        length: int,
        pad_id: int,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_side: Literal["right", "left"] = "right",
        template: str | None = None,
        tokens: Mapping[str, str] | None = None,
    ):
        least = backend.num_special_tokens_to_add(False) + 1
        if length < least:
            raise ValueError(f"length must be at least {least}, got {length}")
        if pad_side not in ("right", "left"):
            raise ValueError(f"pad_side must be 'right' or 'left', got {pad_side!r}")
        pad_token = backend.id_to_token(pad_id) if pad_id >= 0 else None
        if pad_token is None:
            raise ValueError(f"pad_id must be in the vocabulary of {backend.get_vocab_size()}, got {pad_id}")
        self.backend, self.length = backend, length
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.pad_side, self.template, self.tokens = pad_side, template, dict(tokens or {})
        self._set_length()

    def _set_length(self) -> None:
        pad_token = self.backend.id_to_token(self.pad_id)
        self.backend.enable_truncation(self.length)
        self.backend.enable_padding(
            direction=self.pad_side, pad_id=self.pad_id, pad_token=pad_token, length=self.length
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab().values()) + 1

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "B T"]:
        """The ids of each text.

        Raises:
            ValueError: a single string in place of several, or something that is not a string.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of strings, got the string {texts!r}")
        texts = list(texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts[{index}] must be a string, got {type(text).__name__} {text!r}")
        ids = [encoding.ids for encoding in self.backend.encode_batch(texts)]
        return np.array(ids, np.int32).reshape(len(texts), self.length)

    def at(self, length: int) -> Self:
        """The same tokenizer for texts of another length."""
        return type(self)(
            Backend.from_str(self.backend.to_str()),
            length=length,
            pad_id=self.pad_id,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_side=self.pad_side,
            template=self.template,
            tokens=self.tokens,
        )

    def prompts(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The ids of each text to be gone on with, neither padded nor cut.

        Args:
            texts: strings.
            special: whether the tokenizer adds its special tokens: a start of text where there is none yet. An end is
                never added.
        """
        self.backend.no_padding()
        self.backend.no_truncation()
        try:
            ids = [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=special)]
        finally:
            self._set_length()
        if self.bos_id is not None:  # a chat's text has begun already
            ids = [row[1:] if row[:2] == [self.bos_id] * 2 else row for row in ids]
        ended = special and self.eos_id is not None
        return [row[:-1] if ended and len(row) > 1 and row[-1] == self.eos_id else row for row in ids]

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True, **values: Any) -> str:
        """A conversation as the one text that the model was trained on.

        Args:
            messages: with "role" and "content" each.
            answer: whether the answer's beginning stands at the end.
            **values: what else the template reads.

        Raises:
            UserError: no template came with the tokenizer, the jinja2 package is not installed, or the template refuses
                the messages.
        """
        if self.template is None:
            raise UserError("this tokenizer has no chat template (tokenizer_config.json: chat_template)")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError("a chat template needs the jinja2 package: pip install tokjax[chat]") from error

        def refuse(message: str) -> None:
            raise TemplateError(message)

        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            made = sandbox.from_string(self.template)
            return made.render(messages=messages, add_generation_prompt=answer, **{**self.tokens, **values})
        except TemplateError as error:
            raise UserError(f"the chat template does not take these messages: {error}") from error

    def decode(self, ids: Int[np.ndarray, " n"]) -> str:
        """The text of one row of ids, without special tokens."""
        return self.backend.decode([int(index) for index in ids])

    @classmethod
    def load(cls, folder: str | Path, *, length: int | None = None, pad_id: int | None = None) -> Self:
        """The tokenizer of a checkpoint's folder (or of the folder that a file is in).

        Read are, the first that is there: `tokenizer.json`; CLIP's `vocab.json` and `merges.txt`; BERT's `vocab.txt`;
        OpenAI's `bpe_simple_vocab_16e6.txt.gz`, packed or not. `tokenizer_config.json`, `special_tokens_map.json` and
        `config.json` beside them tell length, special tokens, padding and whether it is one of SigLIP's.

        Args:
            folder: where the files are.
            length: T, such as that of the text model's positions; None: what the files say.
            pad_id: None: what the files say, else the end-of-text id, 0 for OpenAI's file.

        Raises:
            UserError: no tokenizer in the folder, only a sentencepiece model, a damaged file, or no telling the length
                or the padding.
            ValueError: as the class.
        """
        folder = Path(folder).expanduser()
        folder = folder.parent if folder.is_file() else folder
        settings, special, model = (
            _read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
        )
        tokens = {name: _content(settings.get(name)) or _content(special.get(name)) for name in _SPECIAL}
        default_length, default_pad = None, None
        if (folder / "tokenizer.json").is_file():
            try:
                backend = Backend.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the package raises bare Exceptions
                raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
            default_pad = (backend.padding or {}).get("pad_id")
            default_length = (backend.truncation or {}).get("max_length")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            merges, vocabulary = _merges(folder / "merges.txt"), _read_json(folder / "vocab.json")
            if _START not in vocabulary and any(tokens.values()):
                backend = _gpt2(vocabulary, merges, [token for token in tokens.values() if token], folder)
            else:
                backend = _clip(vocabulary, merges, folder / "vocab.json")
                tokens = {"bos_token": _START, "eos_token": _END, "pad_token": tokens["pad_token"]}
                default_length = 77
        elif (folder / "vocab.txt").is_file():
            backend = _wordpiece(folder / "vocab.txt", settings)
            tokens["pad_token"] = tokens["pad_token"] or "[PAD]"
        elif found := [folder / name for name in _OPENAI_FILES if (folder / name).is_file()]:
            merges = _merges(found[0])[:_OPENAI_MERGES]
            backend = _clip(_openai_vocabulary(merges), merges, found[0])
            tokens = {"bos_token": _START, "eos_token": _END, "pad_token": None}
            default_length, default_pad = 77, 0
        elif (folder / "spiece.model").is_file():
            raise UserError(
                f"{folder} has its tokenizer as spiece.model only, which needs the sentencepiece package: put the "
                "tokenizer.json of the same model beside it (transformers' AutoTokenizer saves one)"
            )
        else:
            kinds = "tokenizer.json, vocab.json and merges.txt, vocab.txt"
            raise UserError(f"no tokenizer in {folder}: it has none of {kinds}")

        ids = {name: None if text is None else backend.token_to_id(text) for name, text in tokens.items()}
        kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
        siglip = kind.startswith("Siglip") or str(model.get("model_type", "")).startswith("siglip")
        if siglip and settings.get("tokenizer_class") not in _AS_THEY_ARE:
            # Version 1 has the vocabulary of T5, version 2 that of Gemma.
            _clean(backend, punctuation=backend.token_to_id("</s>") is None)
            default_length = 64
        if "add_bos_token" in settings or "add_eos_token" in settings:
            now = _special_ids(backend)
            wanted = {name: settings.get(f"add_{name}", ids[name] in now) for name in ("bos_token", "eos_token")}
            _frame(backend, *(tokens[name] if wanted[name] else None for name in wanted))
        alone = _special_ids(backend)
        bos_id, eos_id = ids["bos_token"], ids["eos_token"]
        if pad_id is None:
            known = (ids["pad_token"], default_pad, eos_id, model.get("pad_token_id"))
            pad_id = next((i for i in known if i is not None), None)
        if pad_id is None:
            raise UserError(f"{folder} does not say what to pad with: give pad_id")
        if length is None:
            text = model.get("text_config") or {}
            said = [settings.get("model_max_length"), text.get("max_position_embeddings"), default_length]
            length = next((int(n) for n in said if isinstance(n, int | float) and 0 < n < _NO_LIMIT), None)
        if length is None:
            raise UserError(f"{folder} does not say how long texts are: give length")
        return cls(
            backend,
            length=length,
            pad_id=pad_id,
            bos_id=bos_id if alone[:1] == [bos_id] else None,
            eos_id=eos_id if alone[-1:] == [eos_id] else None,
            pad_side="left" if settings.get("padding_side") == "left" else "right",
            template=_template(folder, settings),
            tokens={name: text for name, text in tokens.items() if text is not None},
        )

    @classmethod
    def train_words(cls, captions: Sequence[str], length: int, max_words: int | None = None) -> Self:
        """A tokenizer of whole lowercase words and punctuation marks, for small experiments.

        Ids: `<pad>` 0, `<unk>` 1 for words it has not seen, then the words, the most frequent first (in alphabetical
        order where equally frequent), `<bos>`, and `<eos>`, the largest id. So a text model may read out the position
        of the largest id, as CLIP's does.

        Args:
            captions: texts to take the words from.
            length: T, at least 3.
            max_words: keep the most frequent; None: all.

        Raises:
            ValueError: captions that are not strings, none of them or none with a word, or a number out of range.
        """
        if isinstance(captions, str) or not all(isinstance(text, str) for text in captions):
            raise ValueError("captions must be a list of strings")
        if max_words is not None and max_words < 1:
            raise ValueError(f"max_words must be at least 1 or None, got {max_words}")
        normaliser = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        splitter = pre_tokenizers.Whitespace()
        counts = Counter(
            word for text in captions for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(text))
        )
        if not counts:
            raise ValueError(f"captions have no words: got {len(captions)} texts")
        words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
        vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *words, "<bos>", "<eos>"])}
        backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.normalizer, backend.pre_tokenizer = normaliser, splitter
        backend.add_special_tokens(["<pad>", "<bos>", "<eos>"])
        _frame(backend, "<bos>", "<eos>")
        return cls(backend, length=length, pad_id=0, bos_id=vocabulary["<bos>"], eos_id=vocabulary["<eos>"])

    @classmethod
    def train_bpe(cls, texts: Iterable[str], length: int, vocab_size: int, *, start: bool = False) -> Self:
        """A byte-level BPE that keeps case and spaces (GPT-2's), whose merges are learned from texts.

        Ids: `<pad>` 0, `</s>` 1, which ends a text, then the bytes and the merges. Any text can be written with it.

        Args:
            texts: to learn from.
            length: T, at least 2.
            vocab_size: at most so many ids; fewer where the texts have no more pairs that occur twice.
            start: whether `<s>`, id 2, begins every text, for encoders that are read through their first token.

        Raises:
            ValueError: a vocabulary without room for the bytes, or a length out of range.
        """
        special = ["<pad>", "</s>", *(["<s>"] if start else [])]
        if vocab_size < (least := 256 + len(special)):
            raise ValueError(f"vocab_size={vocab_size}: must be at least {least}")
        backend = Backend(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        _frame(backend, "<s>" if start else None, "</s>")
        return cls(backend, length=length, pad_id=0, eos_id=1, bos_id=2 if start else None)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `load` and transformers read to the same ids."""
        special = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.length,
            "padding_side": self.pad_side,
        }
        for name, index in (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            # A pad token that is an ordinary word, OpenAI's "!", is told by the padding in tokenizer.json alone: what
            # is called special is cut out of texts.
            if index is not None and (token := self.backend.id_to_token(index)) in special:
                settings[name] = token
        if self.template is not None:
            settings = {**self.tokens, **settings, "chat_template": self.template}
        texts = self.backend.to_str(pretty=True), json.dumps(settings, indent=2) + "\n"
        for name, text in zip(FILES, texts, strict=True):
            write_whole(Path(folder) / name, partial(Path.write_text, data=text, encoding="utf-8"))


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: of a file of its own, or of the settings; the default one of several."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text("utf-8")
    said = settings.get("chat_template")
    if isinstance(said, list):
        said = {each.get("name"): each.get("template") for each in said if isinstance(each, dict)}.get("default")
    return said if isinstance(said, str) else None


_SPECIAL = ("bos_token", "eos_token", "pad_token")


def _content(token: Any) -> str | None:
    """A special token in a config is a string or an object with its `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def _merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a list of merges, one a line, below a line that tells its version."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    lines = [line for line in text.split("\n") if line.strip() and "#version" not in line]
    if wrong := [line for line in lines if len(line.split()) != 2]:
        raise UserError(f"{path} must hold two symbols a line, got {wrong[0]!r}")
    return [(first, second) for first, second in map(str.split, lines)]


def _openai_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids in the order of OpenAI's code: bytes, bytes that end a word, merges, the two special tokens."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), _START, _END]
    return {token: index for index, token in enumerate(tokens)}


def _clip(vocabulary: dict[str, int], merges: list[tuple[str, str]], path: Path) -> Backend:
    if missing := [token for token in (_START, _END) if token not in vocabulary]:
        raise UserError(f"{path} is not a vocabulary of CLIP: it lacks {missing[0]}")
    try:
        model = models.BPE(vocabulary, merges, unk_token=_END, end_of_word_suffix="</w>")
    except Exception as error:  # as above
        raise UserError(f"{path} does not fit its merges: {error}") from error
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (_START, _END)])
    _frame(backend, _START, _END)
    return backend


def _gpt2(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str], folder: Path) -> Backend:
    """Byte-level BPE that keeps case and spaces, of GPT-2 and OPT."""
    try:
        backend = Backend(models.BPE(vocabulary, merges))
    except Exception as error:  # as above
        raise UserError(f"{folder / 'vocab.json'} does not fit its merges: {error}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special)])
    return backend


def _wordpiece(path: Path, settings: Mapping[str, Any]) -> Backend:
    """BERT's, from one piece a line."""
    pieces = [line.rstrip("\r") for line in path.read_text("utf-8").removesuffix("\n").split("\n")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if missing := [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in vocabulary]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if token in vocabulary]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    _frame(backend, "[CLS]", "[SEP]")
    return backend


def _frame(backend: Backend, start: str | None, end: str | None) -> None:
    """Lets every text begin and end with a token, or not."""
    tokens = [token for token in (start, end) if token is not None]
    pieces = [*([start] if start else []), "$A", *([end] if end else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens)]
    )


def _clean(backend: Backend, punctuation: bool) -> None:
    """Puts SigLIP's cleaning before the tokenizer's own; without `punctuation` that of version 1, else of version 2."""
    steps: list[Any] = [normalizers.Lowercase()]
    if not punctuation:
        steps += [
            normalizers.Replace(Regex(_ASCII_PUNCTUATION), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    own = backend.normalizer
    backend.normalizer = normalizers.Sequence([*steps, *([own] if own is not None else [])])


def _special_ids(backend: Backend) -> list[int]:
    """The ids of an empty text."""
    backend.no_padding()
    return backend.encode("").ids
