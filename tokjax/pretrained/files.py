"""Finds a checkpoint's files (a folder, a single file, or an id on the Hugging Face hub) and reads them lazily.

Only safetensors are read: the other format in use is a pickle, which can run any code.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
import numpy as np
from safetensors import SafetensorError, safe_open

from tokjax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"

_HUB_FILES = [CONFIG, PROCESSOR, WEIGHTS, INDEX, "model-*.safetensors"]
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


class Tensors(Mapping[str, np.ndarray]):
    """Named tensors in one or several safetensors files.

    The files are mapped, not read: asking for a name reads that tensor and nothing else, and every ask reads it again.

    Args:
        files: tensor name -> the file that holds it; None as the only name stands for everything in that file.

    Raises:
        UserError: a file is missing, truncated or not safetensors, or lacks a tensor that it should hold.
    """

    def __init__(self, files: Mapping[str, Path] | Path):
        self._handles: dict[Path, Any] = {}
        if isinstance(files, Path):
            self._files = dict.fromkeys(self._open(files).keys(), files)
        else:
            self._files = dict(files)
            held = {path: set(self._open(path).keys()) for path in set(self._files.values())}
            lost = sorted(f"{name} ({path.name})" for name, path in self._files.items() if name not in held[path])
            if lost:
                raise UserError(f"Tensors that the index names are not in their files: {', '.join(lost)}.")

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="np")
            except FileNotFoundError as error:
                raise UserError(f"{path} does not exist.") from error
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file: {error}") from error
        return self._handles[path]

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files[name]
        try:
            return self._open(path).get_tensor(name)
        except (SafetensorError, OSError, TypeError) as error:
            raise UserError(f"{path}: tensor {name} cannot be read: {error}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the file's header."""
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclasses.dataclass(frozen=True)
class Files:
    """What was found: the folder or file, its configuration (empty if there is none), tensors, image processor."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    processor: dict[str, Any] | None


def find(path_or_id: str | Path) -> Files:
    """Resolves a checkpoint.

    Args:
        path_or_id: a folder with `model.safetensors` (or shards and their index) and `config.json`; a single
            `.safetensors` file, beside which a `config.json` may lie; or a hub id, "user/name" or "user/name@revision",
            of which only these files are downloaded, into the hub's own cache.

    Raises:
        UserError: nothing is there, the hub cannot be reached and its cache lacks the files, or a file is damaged.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = _download(str(path_or_id))
    folder = path if path.is_dir() else path.parent
    return Files(
        path=path,
        config=_read_json(folder / CONFIG) or {},
        tensors=_weights(path) if path.is_dir() else Tensors(path),
        processor=_read_json(folder / PROCESSOR),
    )


def _download(name: str) -> Path:
    parts = _HUB_ID.fullmatch(name)
    if not parts or name.endswith(".safetensors"):
        raise UserError(f"{name!r} is neither an existing file or folder nor an id of the Hugging Face hub.")
    try:
        folder = snapshot_download(parts["repo"], revision=parts["revision"], allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name!r} is no existing file or folder, and the Hugging Face hub did not give it: {reason} "
            "(Without a connection only models that were downloaded before can be loaded.)"
        ) from error
    return Path(folder)


def _weights(folder: Path) -> Tensors:
    """The tensors of a folder: `model.safetensors`, else shards by their index, else the only safetensors file."""
    if (folder / WEIGHTS).exists():
        return Tensors(folder / WEIGHTS)
    if index := _read_json(folder / INDEX):
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or any(Path(shard).name != shard for shard in shards.values()):
            raise UserError(f"{folder / INDEX}: `weight_map` must map tensors to files of the same folder.")
        return Tensors({name: folder / shard for name, shard in shards.items()})
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return Tensors(found[0])
    if found:
        raise UserError(f"{folder} holds several weights, name one: {', '.join(f.name for f in found)}.")
    pickles = sorted(f.name for pattern in ("*.bin", "*.pth", "*.pt") for f in folder.glob(pattern))
    hint = f" ({', '.join(pickles)} is a pickle: save it as safetensors first)" if pickles else ""
    raise UserError(f"{folder} holds no {WEIGHTS}{hint}.")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a JSON object is needed.")
    return content
