"""Loads and saves encoders, T5's and decoders as Hugging Face, timm, OpenAI and others publish them.

    checkpoint = load_checkpoint("facebook/deit-small-patch16-224")
    pixels = checkpoint.preprocess([Image.open("cat.jpg")])

Families are recognised by their configuration, else by the tensors' names; see `families`. A folder written here holds,
beside what other libraries read, the complete configuration under the key "tokjax" of `config.json`, so that it comes
back exactly.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import re
from typing import Any
import warnings

from flax import nnx
import numpy as np
from safetensors.numpy import save_file

from tokjax.data.bytes import VOCABULARY as BYTES
from tokjax.data.bytes import ByteTokenizer
from tokjax.errors import UserError
from tokjax.models.bert import Bert, BertConfig
from tokjax.models.decoder import Decoder, DecoderConfig
from tokjax.models.dual import DualConfig
from tokjax.models.layers import unstack
from tokjax.models.t5 import T5, T5Config
from tokjax.models.text import Text, TextConfig
from tokjax.models.transformer import skeleton
from tokjax.models.vit import ViT, ViTConfig
from tokjax.pretrained import families, files, names
from tokjax.pretrained.names import Config
from tokjax.pretrained.positions import resize_positions
from tokjax.pretrained.preprocess import Naflex, Preprocess, from_dict, to_processor
from tokjax.pretrained.stored import BFLOAT16
from tokjax.pretrained.tokenizer import FILES as TOKENIZER_FILES
from tokjax.pretrained.tokenizer import Tokenizer
from tokjax.writing import whole_folder, write_whole

REDUCERS, REDUCER_WEIGHTS = "reducers.json", "reducers.safetensors"
# All that a saved model may have, the weights first.
NAMES = (files.WEIGHTS, files.CONFIG, files.PROCESSOR, *TOKENIZER_FILES, REDUCERS, REDUCER_WEIGHTS)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
_KEY, _VERSION = "tokjax", 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        config: of the model, at the image size asked for.
        params: the parameter tree, float32; with two towers `{"vision": ..., "text": ..., "logit_scale": ...}` and
            perhaps "logit_bias". Blocks are stacked if `config.scan` says so.
        preprocess: from images to the model's input; None where nothing is known for the model's number of channels.
        source: where it came from: "path", "config" (the original one), "family" ("hf" or "timm") and "format" (the
            name in `families.FAMILIES`).
        tokenizer: from texts to the model's input; None where there is none.
    """

    config: Config
    params: dict[str, Any]
    preprocess: Preprocess | Naflex | None
    source: dict[str, Any]
    tokenizer: Tokenizer | ByteTokenizer | None = None

    @property
    def family(self) -> str:
        """Whose form it had, for `save_checkpoint`."""
        return self.source["family"]


def shapes(config: Config) -> dict[str, Any]:
    """The parameter tree of a model with shapes for leaves, blocks unstacked."""

    def tree(kind: Any, tower: ViTConfig | TextConfig | names.TextModel) -> dict[str, Any]:
        module = skeleton(kind, dataclasses.replace(tower, scan=False))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    if isinstance(config, ViTConfig):
        return tree(ViT, config)
    if isinstance(config, BertConfig):
        return tree(Bert, config)
    if isinstance(config, T5Config):
        return tree(T5, config)
    if isinstance(config, DecoderConfig):
        return tree(Decoder, config)
    scalars = ["logit_scale"] + ["logit_bias"] * (config.logit_bias is not None)
    both = {"vision": tree(ViT, config.vision), "text": tree(Text, config.text)}
    return {**both, **dict.fromkeys(scalars, np.empty((), np.float32))}


def vision_of(config: ViTConfig | DualConfig) -> ViTConfig:
    """The image tower, or the whole model."""
    return config.vision if isinstance(config, DualConfig) else config


def _with_vision(config: ViTConfig | DualConfig, vision: ViTConfig) -> ViTConfig | DualConfig:
    return dataclasses.replace(config, vision=vision) if isinstance(config, DualConfig) else vision


def _with_both(config: Config, **changes: Any) -> Config:
    """The configuration with changes that go for every tower."""
    if not isinstance(config, DualConfig):
        return dataclasses.replace(config, **changes)
    towers = {name: dataclasses.replace(getattr(config, name), **changes) for name in ("vision", "text")}
    return dataclasses.replace(config, **towers)


def load_checkpoint(
    path_or_id: str | Path,
    image_size: int | tuple[int, int] | None = None,
    dtype: str | None = None,
    *,
    scan: bool = False,
    place: names.Place | None = None,
    place_parts: names.PlaceParts | None = None,
) -> Checkpoint:
    """Loads an encoder of images or texts, the two of an image-text model, a T5, or a decoder.

    Args:
        path_or_id: a folder, a file (safetensors, torch pickles and archives, `.npz`), or a hub id ("user/name",
            "user/name@revision").
        image_size: another height and width than the checkpoint's: its position table is interpolated as the library
            that it belongs to does, and the preprocessing follows. A NaFlex model takes images of any size as it is.
        dtype: of the model's activations (`config.dtype`: float32, bfloat16 or float16); parameters are float32
            whatever the file has.
        scan: whether equal blocks come stacked, as a model with `config.scan` has them.
        place: what becomes of every array as soon as it is made, given its path in the tree; None: they stay in NumPy.
            Only one array (with the tensors that it is made from) is in memory that is not placed yet.
        place_parts: in place of it, to read no more than the parts that are asked for; see `names.read_tree`.

    Returns:
        The configuration, parameters, preprocessing and origin.

    Raises:
        UserError: nothing found, a damaged file, an unknown family, or tensors that do not fit (all are listed).
        ValueError: an image size below one patch, or an unknown dtype.
    """
    found = files.find(path_or_id)
    try:
        family, stored, preprocess, tensors = _understand(found)
        rows, tree = family.naming(stored), shapes(stored)
        blank = family.blank(stored)
        ignored = re.compile(family.ignored)
        leaves = names.check(rows, tree, tensors, stored, lambda name: name in blank or ignored.fullmatch(name))
    except _WRONG_VALUES as error:
        raise _of(found.path, error) from error
    config = _with_both(stored, scan=scan, **({} if dtype is None else {"dtype": dtype}))
    source = {"path": str(found.path), "config": found.config, "family": family.side, "format": family.name}

    def read(put: names.Place | None, put_parts: names.PlaceParts | None) -> dict[str, Any]:
        try:
            return names.read_tree(leaves, tree, tensors, stored, stacked=scan, place=put, place_parts=put_parts)
        except UserError as error:
            raise _of(found.path, error) from error

    if isinstance(config, names.TextModel):
        if image_size is not None:
            raise ValueError(f"image_size={image_size}: must be None for a model of texts")
        length = config.length if isinstance(config, T5Config) else config.max_length
        return Checkpoint(config, read(place, place_parts), None, source, _tokenizer(found, length, config.vocab_size))
    assert not isinstance(stored, names.TextModel)
    if image_size is not None:
        config = _at_size(config, (image_size, image_size) if isinstance(image_size, int) else image_size)
    old, new = vision_of(stored), vision_of(config)
    table = ("vision", "pos_embed") if isinstance(config, DualConfig) else ("pos_embed",)

    def put(path: names.Path, array: Any) -> Any:
        if path == table and new.grid != old.grid:
            array = resize_positions(array, old.table_prefix, old.grid, new.grid, *family.interpolation)
        return array if place is None else place(path, array)

    def put_parts(path: names.Path, shape: tuple[int, ...], part: Any) -> Any:
        assert place_parts is not None
        if path == table and new.grid != old.grid:
            whole = part((slice(None),) * len(shape))
            resized: Any = resize_positions(whole, old.table_prefix, old.grid, new.grid, *family.interpolation)
            return place_parts(path, resized.shape, lambda index: resized[index])
        return place_parts(path, shape, part)

    try:
        if preprocess is None and _KEY not in found.config:
            preprocess = family.preprocess(found.config, found.processor, new)
    except _WRONG_VALUES as error:
        raise _of(found.path, error) from error
    params = read(put, None if place_parts is None else put_parts)
    if preprocess is not None and len(preprocess.mean) != new.channels:
        preprocess = None
    if isinstance(preprocess, Preprocess):
        preprocess = preprocess.at(new.image_size)
    tokenizer = _tokenizer(found, config.text.length) if isinstance(config, DualConfig) else None
    return Checkpoint(config, params, preprocess, source, tokenizer)


# What reading a configuration raises whose values are out of range, or of another type than they should be.
_WRONG_VALUES = (ValueError, TypeError, AttributeError, KeyError)


def _of(path: Path, error: Exception) -> UserError:
    kind = "" if isinstance(error, ValueError) else "a value in its configuration is of a wrong type: "
    return UserError(f"{path}: {kind}{error}")


def _tokenizer(found: files.Files, length: int, vocabulary: int = 0) -> Tokenizer | ByteTokenizer | None:
    """The tokenizer beside a model; one that cannot be read is no reason to do without the model.

    ByT5's has no file of its own: its vocabulary tells where there is none.
    """
    if found.tokenizer is None:
        return ByteTokenizer(length) if vocabulary == BYTES else None
    try:
        return Tokenizer.load(found.tokenizer, length=length)
    except UserError as error:
        warnings.warn(f"The model has no tokenizer: {error}", stacklevel=3)
        return None


def _at_size(config: ViTConfig | DualConfig, size: tuple[int, int]) -> ViTConfig | DualConfig:
    vision = vision_of(config)
    if vision.position == "naflex":
        return config
    return _with_vision(config, dataclasses.replace(vision, image_size=size))


def _understand(
    found: files.Files,
) -> tuple[families.Family, Config, Preprocess | Naflex | None, names.Readable]:
    """Family, model as stored, its own preprocessing if saved here, and the tensors under the family's names."""
    own = found.config.get(_KEY)
    if not isinstance(own, dict) or not {"version", "format", "model"} <= own.keys():
        family = families.recognise(found.config, found.tensors)
        tensors = family.view(found.config, found.tensors)
        config = found.config
        if family.generates and (ends := (found.generation or {}).get("eos_token_id")) is not None:
            config = {**config, "eos_token_id": ends}  # chat models have more of them there
        return family, family.configure(config, tensors), None, tensors
    if own["version"] != _VERSION or own["format"] not in families.FAMILIES:
        raise UserError(
            f"config.json was written by another version ({own['version']}, {own['format']}); "
            f"this one reads version {_VERSION}, {', '.join(families.FAMILIES)}."
        )
    family = families.FAMILIES[own["format"]]
    preprocess = from_dict(own["preprocess"]) if own.get("preprocess") else None
    return family, _config(own["model"]), preprocess, family.view(found.config, found.tensors)


def _config(fields: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`."""
    if "decoder_depth" in fields:
        return _fields(T5Config, fields)
    if "types" in fields:
        return _fields(BertConfig, fields)
    if "kv_heads" in fields:
        return _fields(DecoderConfig, fields)
    if "vision" not in fields:
        return _fields(ViTConfig, fields)
    towers = {"vision": _fields(ViTConfig, fields["vision"]), "text": _fields(TextConfig, fields["text"])}
    return _fields(DualConfig, {**fields, **towers})


def _fields(kind: Any, fields: dict[str, Any]) -> Any:
    unknown = set(fields) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise UserError(f"config.json has fields of the model that are not known here: {', '.join(sorted(unknown))}.")
    return kind(**fields)


def save_checkpoint(
    folder: str | Path,
    config: Config,
    params: Mapping[str, Any],
    preprocess: Preprocess | Naflex | None = None,
    family: str = "hf",
    tokenizer: Any = None,
    dtype: str = "float32",
) -> None:
    """Writes `model.safetensors`, `config.json` and, if known, `preprocessor_config.json` and the tokenizer's files.

    With "hf" a model that one of transformers' classes can express is written in its form, with "timm" one that timm
    can build in timm's; a model that only the other side can express goes there. What neither can (two towers are
    nothing for timm) is written under names of timm and OpenCLIP, and still comes back here exactly. All files appear
    or none, see `tokjax.writing.whole_folder`.

    Args:
        folder: made if it does not exist. Files of `NAMES` in it are replaced or, where the model has none, removed
            (reducers too, which `tokjax.save` writes); others stay.
        config: of the model.
        params: its parameter tree, numpy or jax arrays of any float type; stacked blocks too.
        preprocess: from images to the model's input.
        family: whose form is preferred.
        tokenizer: from texts to the model's input.
        dtype: of the weights in the file, one of float32, bfloat16 and float16.

    Raises:
        ValueError: `params` are not those of `config` (the differences are listed), an unknown family or dtype.
        UserError: `folder` is a file.
    """
    with whole_folder(Path(folder).expanduser(), NAMES) as staged:
        write_checkpoint(staged, config, params, preprocess, family, tokenizer, dtype)


def write_checkpoint(
    folder: Path,
    config: Config,
    params: Mapping[str, Any],
    preprocess: Preprocess | Naflex | None = None,
    family: str = "hf",
    tokenizer: Any = None,
    dtype: str = "float32",
) -> None:
    """`save_checkpoint` into a folder that exists and is empty.

    Raises:
        ValueError: as `save_checkpoint`.
    """
    if family not in families.SIDES:
        raise ValueError(f"family = {family!r}; allowed are 'hf' and 'timm'.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}; allowed are {', '.join(DTYPES)}.")
    form = families.to_save(config, family)
    rows = form.naming(config)
    tensors = names.write_tree(rows, shapes(config), _unstacked(params), config)
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in form.blank(config).items()}
    if form.prefix and _classes(config):
        heads = tuple(rows[head].files[0] + "." for head in ("head", "head_dist") if head in rows)
        tensors = {name if name.startswith(heads) else form.prefix + name: value for name, value in tensors.items()}
    tensors = {name: tensor.astype(DTYPES[dtype], copy=False) for name, tensor in tensors.items()}
    own = {
        "version": _VERSION,
        "format": form.name,
        "model": dataclasses.asdict(config),
        "preprocess": preprocess.to_dict() if preprocess else None,
    }
    processor = to_processor(preprocess) if preprocess and form.side == "hf" else None
    # Transformers refuses a file that does not say which framework's layout it has.
    write_whole(folder / files.WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if processor:
        _write_json(folder / files.PROCESSOR, processor)
    if tokenizer is not None:
        tokenizer.save(folder)
    _write_json(folder / files.CONFIG, {**form.describe(config, preprocess), _KEY: own})


def _classes(config: Config) -> int:
    """Outputs of the head of a model, or of its image tower; 0 of a model that writes texts."""
    return getattr(config.vision if isinstance(config, DualConfig) else config, "num_classes", 0)


_TOWERS = ("vision", "text", "encoder", "decoder")


def _unstacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tree, or its towers, with blocks one by one."""
    tree = {name: _unstacked(part) if name in _TOWERS else part for name, part in params.items()}
    if "attn" in tree.get("blocks", ()):
        tree["blocks"] = unstack(tree["blocks"])
    return tree


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
