"""What a family of checkpoints is, and what the families share."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any, Literal

from tokjax.errors import UserError
from tokjax.models.decoder import DecoderConfig
from tokjax.models.layers import GATED
from tokjax.models.t5 import T5Config
from tokjax.models.vit import ViTConfig
from tokjax.pretrained import names
from tokjax.pretrained.names import Config, Readable, Row, View
from tokjax.pretrained.positions import Method
from tokjax.pretrained.preprocess import Naflex, Preprocess, from_processor

Json = dict[str, Any]
Images = Preprocess | Naflex
Side = Literal["hf", "timm"]
SIDES: tuple[Side, ...] = ("hf", "timm")


def as_stored(config: Json, tensors: Readable) -> Readable:
    return tensors


@dataclasses.dataclass(frozen=True)
class Family:
    """One way of naming and describing a model.

    Attributes:
        name: of the family, Hugging Face's `model_type` where it has one.
        side: whose convention it is, "hf" or "timm"; where the model goes when it is saved.
        rows: the tree's names in the file, without `prefix`.
        configure: the model, from the configuration and the tensors' names (those of `view`) and shapes.
        preprocess: the images' pipeline for a model, from the configuration and the processor's; None for texts.
        describe: the inverse of `configure`: a `config.json`, with the pipeline if this side keeps it there.
        expresses: whether this family's own library can build the model.
        view: the stored tensors under the names of `rows`.
        prefix: what precedes the names of the backbone, but not of the heads, in the file of a whole model ("vit.").
        ignored: pattern of tensors that may be left unread.
        interpolation: method and anti-aliasing of the position table at another image size.
        gated: the rows of a gated MLP, where they differ.
        blank: names and shapes of tensors that the family's own library expects where the model does without; they are
            written as zeros.
        generates: whether `generation_config.json` beside a model has a say in what ends a text.
    """

    name: str
    side: Side
    rows: Mapping[str, Row]
    configure: Callable[[Json, Readable], Config]
    preprocess: Callable[[Json, Json | None, ViTConfig], Images | None]
    describe: Callable[[Any, Images | None], Json]
    expresses: Callable[[Any], bool]
    view: Callable[[Json, Readable], Readable] = as_stored
    prefix: str = ""
    ignored: str = ""
    interpolation: tuple[Method, bool] = ("bicubic", False)
    gated: Mapping[str, Row] = dataclasses.field(default_factory=dict)
    blank: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    generates: bool = False

    def naming(self, config: Config) -> Mapping[str, Row]:
        """The rows for one model."""
        if isinstance(config, T5Config | DecoderConfig):
            gated = config.feed in GATED
        else:
            gated = isinstance(config, ViTConfig) and config.mlp == "swiglu"
        return {**self.rows, **self.gated} if gated else self.rows


class Measured:
    """The sizes of an encoder as its tensors show them, for what a configuration leaves unsaid.

    Args:
        rows: the naming.
        tensors: where to look.
        tower: the encoder's path in the tree of a model with several, with a dot behind it.

    Raises:
        UserError: on asking for a size whose tensor is missing.
    """

    def __init__(self, rows: Mapping[str, Row], tensors: Readable, tower: str = ""):
        self._rows, self._tensors, self._tower = rows, tensors, tower

    def names(self, path: str) -> tuple[str, ...]:
        """The tensors of a part of the tree, of block 0 for `*`."""
        parts = (0 if part == "*" else part for part in (self._tower + path).split("."))
        return names.leaf(self._rows, tuple(parts)).names

    def has(self, path: str) -> bool:
        return all(name in self._tensors for name in self.names(path))

    def shape(self, path: str, *ranks: int) -> tuple[int, ...]:
        """The shape of a part's (first) tensor, which must have one of these numbers of axes."""
        name = self.names(path)[0]
        if name not in self._tensors or len(self._tensors.shape(name)) not in ranks:
            axes = " or ".join(map(str, ranks))
            raise UserError(f"The tensors do not fit. Missing: {name} with {axes} axes.")
        return self._tensors.shape(name)

    @property
    def width(self) -> int:
        return self.shape("norm.scale" if self.has("norm.scale") else "blocks.*.norm1.scale", 1)[0]

    @property
    def channels(self) -> int:
        return self.shape("patch_embed.kernel", 4)[1]

    @property
    def patch(self) -> int:
        return self.shape("patch_embed.kernel", 4)[2]

    @property
    def hidden(self) -> int:
        return self.shape("blocks.*.mlp.fc2.kernel", 2)[1]

    @property
    def depth(self) -> int:
        name = re.escape(self._rows[f"{self._tower}blocks.*.norm1"].files[0] + ".weight").replace(r"\*", r"\d+")
        return sum(re.fullmatch(name, other) is not None for other in self._tensors)

    @property
    def classes(self) -> int:
        """Outputs of the head; 0 without one."""
        row = self._rows[f"{self._tower}head"]
        return self.shape("head.kernel", 2)[1 if row.kind == "matrix" else 0] if self.has("head.kernel") else 0

    @property
    def positions(self) -> int:
        """Rows of the position table."""
        return self.shape("pos_embed", 2, 3)[-2]

    def image(self, prefix: int) -> int:
        """The side of a square image whose table has `prefix` rows that are not patches."""
        patches = max(self.positions - prefix, 0)
        side = math.isqrt(patches)
        if side * side != patches:
            raise UserError(f"The position table has {patches} rows for patches, no square; state the image size.")
        return side * self.patch


class Stated:
    """A configuration, and behind it what the tensors show and what a library takes where it is silent.

    Args:
        config: JSON; null counts as silence.
        measured: the sizes.
    """

    def __init__(self, config: Json, measured: Measured):
        self.config, self.measured = config, measured

    def get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def size(self, key: str, size: str) -> Any:
        """A stated size, else the measured one."""
        value = self.config.get(key)
        return getattr(self.measured, size) if value is None else value

    def choice(self, key: str, default: str, allowed: Mapping[str, Any]) -> Any:
        """What a value out of a closed set means.

        Raises:
            UserError: another value.
        """
        value = self.get(key, default)
        if value not in allowed:
            raise UserError(f"{key} = {value!r} is not known here; allowed are {', '.join(map(str, allowed))}.")
        return allowed[value]

    def blocks(self, default_heads: int, default_eps: float, default_act: str) -> Json:
        """The fields that Hugging Face's encoders call alike."""
        width = self.size("hidden_size", "width")
        return {
            "width": width,
            "depth": self.size("num_hidden_layers", "depth"),
            "heads": self.get("num_attention_heads", default_heads),
            "mlp_ratio": ratio(width, self.size("intermediate_size", "hidden")),
            "norm_eps": self.get("layer_norm_eps", default_eps),
            "gelu": self.choice("hidden_act", default_act, HF_GELU),
        }


HF_GELU: Json = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "quick_gelu": "quick"}


def hf_blocks(model: Any) -> Json:
    """The inverse of `Stated.blocks`."""
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": int(model.width * model.mlp_ratio),
        "hidden_act": key_of(HF_GELU, model.gelu),
        "layer_norm_eps": model.norm_eps,
    }


def hf_images(model: ViTConfig) -> Json:
    """What Hugging Face's configurations say about images."""
    return {"image_size": one_or_two(model.image_size), "patch_size": model.patch_size, "num_channels": model.channels}


def key_of(values: Mapping[str, Any], value: Any) -> str:
    """The first name of a value."""
    return next(key for key, other in values.items() if other == value)


def pair(size: Any) -> tuple[int, int]:
    """Height and width from either way of writing them."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def one_or_two(size: tuple[int, int]) -> int | list[int]:
    """The shorter of the two ways of writing height and width."""
    return size[0] if size[0] == size[1] else list(size)


def ratio(width: int, hidden: int) -> float:
    """The `mlp_ratio` for which int(width * mlp_ratio) is `hidden`, rounding errors notwithstanding."""
    value = hidden / width
    return value if int(width * value) == hidden else math.nextafter(value, math.inf)


def heads_of_64(width: int) -> int:
    """Heads of 64 channels, as in every published size, where no configuration tells."""
    if width % 64:
        raise UserError(f"No configuration tells the number of heads, and width {width} is no multiple of 64.")
    return width // 64


def stripped(*prefixes: str) -> Callable[[Json, Readable], Readable]:
    """A view without any of these prefixes."""

    def view(config: Json, tensors: Readable) -> Readable:
        def rename(name: str) -> str:
            for prefix in prefixes:
                name = name.removeprefix(prefix)
            return name

        return View(tensors, rename)

    return view


def processed(default: Callable[[ViTConfig], Images]) -> Callable[[Json, Json | None, ViTConfig], Images]:
    """Hugging Face's pipeline: its processor's file, and what usually holds where that is absent or silent."""

    def preprocess(config: Json, processor: Json | None, model: ViTConfig) -> Images:
        usual = default(model)
        images = usual if processor is None else from_processor(processor, usual)
        return images.at(model.image_size) if isinstance(images, Preprocess) else images

    return preprocess
