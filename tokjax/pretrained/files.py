"""Finds a checkpoint's files (a folder, a single file, or an id on the Hugging Face hub) and reads them lazily.

What a file is, its content tells: safetensors, torch's zip archives, older pickles and TorchScript archives (see
`pickled`), or numpy's `.npz`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

from huggingface_hub import HfApi, snapshot_download
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tokjax.errors import UserError
from tokjax.pretrained.archive import Archive
from tokjax.pretrained.npz import read_npz
from tokjax.pretrained.pickled import read_pickled
from tokjax.pretrained.stored import BFLOAT16, Stored, map_bytes
from tokjax.writing import refuse_unfinished

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
GENERATION = "generation_config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
TOKENIZER = "tokenizer.json"

# The weights of a folder, the first that there is; then its only file of these suffixes, safetensors first.
_NAMES = (
    (WEIGHTS, INDEX, "open_clip_model.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)
_SUFFIXES = ((".safetensors",), (".pth", ".pt", ".bin", ".ckpt", ".npz"))
# What training leaves beside the weights, in the same form.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)\b.*|rng_state_\d+\.pth")

_SMALL_HUB_FILES = [
    *(CONFIG, PROCESSOR, OPEN_CLIP_CONFIG, TOKENIZER, GENERATION),
    *("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    "chat_template.jinja",
]
_HUB_ID = re.compile(r"(?:hf[-_]hub:)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": BFLOAT16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


class Tensors(Mapping[str, np.ndarray]):
    """Named tensors in one or several files of any known kind.

    The files are mapped, not read: asking for a name reads that tensor and nothing else, copied once, and every ask
    reads it again.

    Args:
        files: tensor name -> the file that holds it; or a file, of which all are taken.

    Raises:
        UserError: a file is missing, truncated or of no known kind, or lacks a tensor that it should hold.
    """

    def __init__(self, files: Mapping[str, Path] | Path):
        if isinstance(files, Path):
            self._stored = read_file(files)
            return
        held = {path: read_file(path) for path in dict.fromkeys(files.values())}
        lost = sorted(f"{name} ({path.name})" for name, path in files.items() if name not in held[path])
        if lost:
            raise UserError(f"Tensors that the index names are not in their files: {', '.join(lost)}.")
        self._stored = {name: held[path][name] for name, path in files.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._stored[name].read()

    def view(self, name: str) -> np.ndarray:
        """The tensor where it lies in the file, not copied and not to be written to."""
        return self._stored[name].view()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, which is known without reading."""
        return self._stored[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype in the file, one of numpy or ml_dtypes."""
        return self._stored[name].dtype

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclasses.dataclass(frozen=True)
class Files:
    """What was found.

    Attributes:
        path: the folder or file.
        config: of the model: `config.json`, or `open_clip_config.json` where the weights are OpenCLIP's or there is no
            other; empty if there is none.
        tensors: the weights.
        processor: of images, `preprocessor_config.json`.
        tokenizer: the folder, if it holds a tokenizer.
        generation: of texts, `generation_config.json`.
    """

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    processor: dict[str, Any] | None
    tokenizer: Path | None
    generation: dict[str, Any] | None = None


def find(path_or_id: str | Path) -> Files:
    """Resolves a checkpoint.

    Args:
        path_or_id: one of

            * a folder, with weights in `model.safetensors`, in shards with their index, or in its only safetensors
              file; without any, in `pytorch_model.bin` (or shards and index) or its only `.pth`, `.pt`, `.bin`,
              `.ckpt` or `.npz` file;
            * a file of one of these kinds, beside which a `config.json` may lie;
            * a hub id, "user/name" or "user/name@revision", of which the same files and no others are downloaded, into
              the hub's own cache.

    Raises:
        UserError: nothing is there, the hub cannot be reached and its cache lacks the files, a file is damaged, or the
            folder is of a save that was interrupted.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = _download(str(path_or_id))
    folder = path if path.is_dir() else path.parent
    refuse_unfinished(folder)
    weights = _weights(folder) if path.is_dir() else path
    # A repository may hold the same model in two forms, each with its own configuration.
    configs = [CONFIG, OPEN_CLIP_CONFIG][:: -1 if weights.name.startswith("open_clip") else 1]
    return Files(
        path=path,
        config=next(filter(None, (_read_json(folder / name) for name in configs)), {}),
        tensors=_tensors(weights),
        processor=_read_json(folder / PROCESSOR),
        tokenizer=_tokenizer(folder),
        generation=_read_json(folder / GENERATION),
    )


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of one file, whose content tells of what kind it is.

    Raises:
        UserError: it does not exist, is damaged, or of no known kind.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path} does not exist or cannot be read: {error}") from error
    return _reader(path, head)(path)


def _reader(path: Path, head: bytes) -> Callable[[Path], dict[str, Stored]]:
    text = head.lstrip().lower()
    if not head:
        raise UserError(f"{path} is empty.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer instead of the file: fetch that with `git lfs pull`.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page instead of the file, perhaps of an error; download it again.")
    if head[8:9] == b"{":
        return _read_safetensors
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head[:1] == b"\x80" and head[1] <= 5:
        return read_pickled
    if path.suffix == ".safetensors":
        return _read_safetensors  # which says what is wrong
    raise UserError(f"{path} is neither safetensors nor a checkpoint of torch nor .npz; it begins with {head[:16]!r}.")


def _read_zip(path: Path) -> dict[str, Stored]:
    numpy = any(name.endswith(".npy") for name in Archive(path))
    return read_npz(path) if numpy else read_pickled(path)


def _read_safetensors(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np"):  # checks the header, and the data's length against it
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    data = map_bytes(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    unknown = sorted(name for name, tensor in header.items() if tensor.get("dtype", "F32") not in _DTYPES)
    if unknown:
        raise UserError(f"{path}: {unknown[0]} has the dtype {header[unknown[0]]['dtype']}, which is not read.")

    def stored(tensor: dict[str, Any]) -> Stored:
        first, end = (start + offset for offset in tensor["data_offsets"])
        return Stored(lambda: data[first:end], end - first, np.dtype(_DTYPES[tensor["dtype"]]), tuple(tensor["shape"]))

    return {name: stored(tensor) for name, tensor in header.items() if name != "__metadata__"}


def _download(name: str) -> Path:
    parts = _HUB_ID.fullmatch(name)
    if not parts or name.endswith((*_SUFFIXES[0], *_SUFFIXES[1])):
        raise UserError(f"{name!r} is neither an existing file or folder nor an id of the Hugging Face hub.")
    repo, revision = parts["repo"], parts["revision"]
    # Without a connection, what is raised depends on the hub library's release and its transport: so all is caught.
    try:
        files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
    except Exception as error:
        try:
            folder = snapshot_download(repo, revision=revision, allow_patterns=[CONFIG], local_files_only=True)
        except (ValueError, OSError):
            raise _unreachable(name, error) from error
        return Path(folder)
    chosen = _choose(f"{name} on the hub", files)
    stem, _, suffix = chosen.removesuffix(".index.json").rpartition(".")
    shards = re.compile(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}")
    parts_of_it = [file for file in files if shards.fullmatch(file)] if chosen.endswith(".index.json") else []
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=[*_SMALL_HUB_FILES, chosen, *parts_of_it])
    except Exception as error:
        raise _unreachable(name, error) from error
    return Path(folder)


def _unreachable(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{name!r} is no existing file or folder, and the Hugging Face hub did not give it: {reason} "
        "(Without a connection only models that were downloaded before can be loaded.)"
    )


def _choose(place: str, names: Collection[str]) -> str:
    """The file with the weights, or their index, among all names of a folder."""
    for preferred, suffixes in zip(_NAMES, _SUFFIXES, strict=True):
        found = [name for name in preferred if name in names][:1] or sorted(
            name for name in names if name.endswith(suffixes) and "/" not in name and not _NO_WEIGHTS.fullmatch(name)
        )
        if len(found) > 1:
            raise UserError(f"{place} holds several weights, name one: {', '.join(found)}.")
        if found:
            return found[0]
    raise UserError(f"{place} holds no {WEIGHTS}, nor weights in another form.")


def _weights(folder: Path) -> Path:
    return folder / _choose(str(folder), [path.name for path in folder.iterdir()])


def _tensors(path: Path) -> Tensors:
    if not path.name.endswith(".index.json"):
        return Tensors(path)
    shards = (_read_json(path) or {}).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards.values())
    ):
        raise UserError(f"{path}: `weight_map` must map tensors to files of the same folder.")
    return Tensors({name: path.parent / shard for name, shard in shards.items()})


def _tokenizer(folder: Path) -> Path | None:
    openai = [(f"bpe_simple_vocab_16e6.txt{packed}",) for packed in (".gz", "")]
    kinds = ((TOKENIZER,), ("vocab.json", "merges.txt"), ("vocab.txt",), *openai, ("spiece.model",))
    return folder if any(all((folder / name).exists() for name in kind) for kind in kinds) else None


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
