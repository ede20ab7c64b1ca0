"""Loads and saves vision transformers as timm and Hugging Face publish them, without torch.

    checkpoint = load_checkpoint("facebook/deit-small-patch16-224")
    pixels = checkpoint.preprocess([Image.open("cat.jpg")])

Families are recognised by `config.json`, else by the tensors' names; see `families`. A folder written here holds,
beside what other libraries read, the complete configuration under the key "tokjax" of `config.json`, so that it comes
back exactly.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
from pathlib import Path
import re
from typing import Any

from flax import nnx
import jax
import numpy as np
from safetensors.numpy import save_file

from tokjax.errors import UserError
from tokjax.models.layers import stack, unstack
from tokjax.models.vit import ViT, ViTConfig
from tokjax.pretrained import families, files, names
from tokjax.pretrained.positions import resize_positions
from tokjax.pretrained.preprocess import Preprocess, to_processor

_KEY, _VERSION = "tokjax", 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        config: of the model, at the image size asked for.
        params: the parameter tree, float32 numpy arrays; blocks unstacked whatever `config.scan` says (`layers.stack`).
        preprocess: from images to the model's input; None where nothing is known for the model's number of channels.
        source: where it came from: "path", "config" (the original `config.json`), "family" ("hf" or "timm") and
            "format" (the name in `families.FAMILIES`).
    """

    config: ViTConfig
    params: dict[str, Any]
    preprocess: Preprocess | None
    source: dict[str, Any]
    tokenizer: Any = None  # of a model with a text encoder

    @property
    def family(self) -> str:
        """Whose form it had, for `save_checkpoint`."""
        return self.source["family"]


def shapes(config: ViTConfig) -> dict[str, Any]:
    """The parameter tree of a model with shapes for leaves, blocks unstacked."""
    one = dataclasses.replace(config, depth=1, scan=False)
    tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ViT(one, rngs=nnx.Rngs(0))), nnx.Param))
    return {**tree, "blocks": dict.fromkeys(range(config.depth), tree["blocks"][0])}


def load_checkpoint(
    path_or_id: str | Path,
    image_size: int | tuple[int, int] | None = None,
    dtype: str | None = None,
    *,
    scan: bool = False,
    place: Callable[[names.Path, np.ndarray], Any] = lambda path, array: array,
) -> Checkpoint:
    """Loads a ViT.

    Args:
        path_or_id: a folder, a `.safetensors` file, or a hub id ("user/name", "user/name@revision").
        image_size: another height and width than the checkpoint's: its position table is interpolated as the library
            that it belongs to does, and the preprocessing follows.
        dtype: of the model's activations (`config.dtype`: float32, bfloat16 or float16); parameters are float32
            whatever the file has.
        scan: whether equal blocks come stacked, as a model with `config.scan` has them.
        place: what becomes of every array as soon as it is made, given its path in the tree.

    Returns:
        The configuration, parameters, preprocessing and origin.

    Raises:
        UserError: nothing found, a damaged file, an unknown family, or tensors that do not fit (all are listed).
        ValueError: an image size that the patches do not divide, or an unknown dtype.
    """
    found = files.find(path_or_id)
    try:
        family, stored, preprocess, tensors = _understand(found)
        params = names.read_tree(
            family.rows, shapes(stored), tensors, stored, lambda name: re.fullmatch(family.ignored, name)
        )
    except (ValueError, TypeError) as error:  # TypeError: values of another type in config.json
        raise UserError(f"{found.path}: {error}") from error
    changes: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if image_size is not None:
        changes["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    config = dataclasses.replace(stored, **changes)
    if config.grid != stored.grid:
        method, antialias = family.interpolation
        params["pos_embed"] = resize_positions(
            params["pos_embed"], stored.table_prefix, stored.grid, config.grid, method, antialias
        )
    if scan:
        params, config = {**params, "blocks": stack(params["blocks"])}, dataclasses.replace(config, scan=True)
    params = jax.tree.map_with_path(lambda path, array: place(tuple(key.key for key in path), array), params)
    source = {"path": str(found.path), "config": found.config, "family": family.side, "format": family.name}
    if preprocess is None and _KEY not in found.config:
        try:
            preprocess = family.preprocess(found.config, found.processor, config)
        except (ValueError, TypeError) as error:
            raise UserError(f"{found.path}: {error}") from error
    if preprocess is not None:
        preprocess = preprocess.at(config.image_size) if len(preprocess.mean) == config.channels else None
    return Checkpoint(config, params, preprocess, source)


def _understand(found: files.Files) -> tuple[families.Family, ViTConfig, Preprocess | None, names.Readable]:
    """Family, model as stored, its own preprocessing if saved here, and the tensors under the family's names."""
    own = found.config.get(_KEY)
    if not isinstance(own, dict) or not {"version", "format", "model"} <= own.keys():
        family = families.recognise(found.config, found.tensors)
        tensors = family.view(found.tensors)
        return family, family.configure(found.config, tensors), None, tensors
    if own["version"] != _VERSION or own["format"] not in families.FAMILIES:
        raise UserError(
            f"config.json was written by another version ({own['version']}, {own['format']}); "
            f"this one reads version {_VERSION}, {', '.join(families.FAMILIES)}."
        )
    unknown = set(own["model"]) - {field.name for field in dataclasses.fields(ViTConfig)}
    if unknown:
        raise UserError(f"config.json has fields of the model that are not known here: {', '.join(sorted(unknown))}.")
    family = families.FAMILIES[own["format"]]
    preprocess = Preprocess.from_dict(own["preprocess"]) if own.get("preprocess") else None
    return family, ViTConfig(**own["model"]), preprocess, family.view(found.tensors)


def save_checkpoint(
    folder: str | Path,
    config: Any,
    params: Mapping[str, Any],
    preprocess: Preprocess | None = None,
    family: str = "hf",
    tokenizer: Any = None,
) -> None:
    """Writes `model.safetensors`, `config.json` and, if known, `preprocessor_config.json`.

    With "hf" a model that transformers' `vit` (or, with a distillation token, `deit`) can express is written in its
    form; all others, and all with "timm", are written with timm's names and arguments. What timm cannot build either
    (a norm's eps other than 1e-6 is an argument `norm_eps` that it refuses) still comes back here exactly. Every file
    is written under a temporary name and moved into place.

    Args:
        folder: made if it does not exist; files of these names in it are replaced.
        config: of the model.
        params: its parameter tree, numpy or jax arrays of any float type, written as float32; stacked blocks too.
        preprocess: from images to the model's input.
        family: whose form is preferred.

    Raises:
        ValueError: `params` are not those of `config` (the differences are listed), or an unknown family.
        UserError: `folder` is a file.
    """
    if family not in families.SIDES:
        raise ValueError(f"family = {family!r}; allowed are 'hf' and 'timm'.")
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a folder is needed.")
    form = families.to_save(config, family)
    blocks = params.get("blocks", {})
    if "attn" in blocks:
        params = {**params, "blocks": unstack(blocks)}
    tensors = names.write_tree(form.rows, shapes(config), params, config)
    if form.prefix and config.num_classes:
        heads = tuple(form.rows[head].files[0] + "." for head in ("head", "head_dist") if head in form.rows)
        tensors = {name if name.startswith(heads) else form.prefix + name: value for name, value in tensors.items()}
    own = {
        "version": _VERSION,
        "format": form.name,
        "model": dataclasses.asdict(config),
        "preprocess": preprocess.to_dict() if preprocess else None,
    }
    processor = to_processor(preprocess) if preprocess and form.side == "hf" else None
    folder.mkdir(parents=True, exist_ok=True)
    # Transformers refuses a file that does not say which framework's layout it has.
    _write(folder / files.WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    if processor:
        _write(folder / files.PROCESSOR, lambda path: _write_json(path, processor))
    else:
        (folder / files.PROCESSOR).unlink(missing_ok=True)
    _write(folder / files.CONFIG, lambda path: _write_json(path, {**form.describe(config, preprocess), _KEY: own}))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes its files readable by their owner alone
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
