"""What a user holds: a model with its parameters and reducers, as one callable; load, reduce and save it."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal, get_args

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
import numpy as np
from safetensors.numpy import save_file

from tokjax import reducers, token_map
from tokjax.bench import flops
from tokjax.errors import UserError
from tokjax.hooks import Hook, ModelInfo, Reducer, check
from tokjax.models import layers
from tokjax.models.transformer import LayerTrace, Output
from tokjax.models.vit import ViT, ViTConfig
from tokjax.pretrained.files import Tensors
from tokjax.pretrained.preprocess import Preprocess
from tokjax.pretrained.vit import load_checkpoint, save_checkpoint

Family = Literal["hf", "timm"]
REDUCERS, REDUCER_WEIGHTS = "reducers.json", "reducers.safetensors"


class Trace(struct.PyTreeNode):
    """Where every input token went, block by block, and what the reducers noted on the way."""

    layers: tuple[LayerTrace, ...]
    aux: Mapping[str, Any]
    prefix: int = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)
    patch_size: int = struct.field(pytree_node=False)

    @property
    def tokens(self) -> Int[np.ndarray, "L B"]:
        """Valid tokens that entered the MLP of every block."""
        return np.stack([np.asarray(layer.tokens) for layer in self.layers])

    def pictures(
        self, image: UInt8[np.ndarray, "height width 3"], row: int = 0, layers: Sequence[int] | None = None
    ) -> list:
        """The image and its merged regions after the chosen blocks (all by default), each with a caption."""
        from tokjax import viz  # matplotlib comes with it, which most users of a model do not need

        origins, slots = (
            [np.asarray(layer.origin)[row] for layer in self.layers],
            [layer.slots for layer in self.layers],
        )
        return viz.merge_pictures(image, origins, slots, self.patch_size, self.grid, prefix=self.prefix, layers=layers)

    def draw(
        self, image: UInt8[np.ndarray, "height width 3"], row: int = 0, layers: Sequence[int] | None = None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """`pictures`, side by side in one."""
        from tokjax import viz

        return viz.strip(self.pictures(image, row, layers))


@dataclasses.dataclass(frozen=True)
class Method:
    """A reducer with the name and settings that it was made from."""

    name: str
    settings: Mapping[str, Any]
    reducer: Reducer


class Model:
    """A module, split once; calls run `jax.jit` over the pure dict of its parameters, the graph closed over.

    Attributes:
        params: `{"model": ..., "reducers": {index: ...}}`, a pure dict of arrays; the second only for reducers that
            learn.
        config: of the module.
        methods: the reducers, in the order in which they were added.
        preprocess: from PIL images or uint8 arrays to the input; None for a model made without.
        form: how hard maps are applied, see `tokjax.token_map.apply_form`.
    """

    def __init__(
        self,
        module: ViT,
        methods: Sequence[Method] = (),
        *,
        preprocess: Preprocess | None = None,
        family: Family = "timm",
        form: token_map.Form = "auto",
    ):
        self.config: ViTConfig = module.cfg
        self.methods, self.preprocess, self.family, self.form = tuple(methods), preprocess, family, form
        learned = {i: m.reducer for i, m in enumerate(methods) if isinstance(m.reducer, nnx.Module)}
        self._graph, state = nnx.split({"model": module, "reducers": learned})
        self.params = nnx.to_pure_dict(state)
        check(self.hooks, self.info)
        self._logits = jax.jit(lambda params, images, key: self.forward(params, images, key=key).logits)
        self._traced = jax.jit(functools.partial(self._trace, self.forward))

    @property
    def info(self) -> ModelInfo:
        return self.config.info

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """All hooks of the methods, as this model runs them."""
        return self._hooks({})

    def _hooks(self, learned: Mapping[int, Reducer]) -> tuple[Hook, ...]:
        chosen = (learned.get(i, method.reducer) for i, method in enumerate(self.methods))
        return tuple(hook for reducer in chosen for hook in reducer.hooks(self.info))

    def forward(
        self,
        params: Mapping[str, Any],
        images: Float[Array, "B height width channels"],
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
    ) -> Output:
        """The whole output as a pure function of the parameters, to be jitted, differentiated or vmapped."""
        parts: Any = nnx.merge(self._graph, params)
        with token_map.apply_form(self.form):
            hooks = self._hooks(parts["reducers"])
            return parts["model"](images, hooks, key=key, train=train, trace=trace)

    def _trace(self, forward: Callable, params, images, key) -> tuple[Array, Trace]:
        out, cfg = forward(params, images, key=key, trace=True), self.config
        return out.logits, Trace(out.trace, out.tokens.aux, cfg.prefix, cfg.grid, cfg.patch_size)

    def __call__(
        self, images: Float[Array, "B height width channels"], *, key: Array | None = None, trace: bool = False
    ):
        """Logits [B, classes] of normalised images; with `trace`, logits and a `Trace`.

        Args:
            images: as `preprocess` gives them.
            key: for reducers that draw; they use their seed where there is none.
            trace: whether to follow every token through the blocks.

        Raises:
            ValueError: images of another size.
        """
        return (self._traced if trace else self._logits)(self.params, images, key)

    def with_params(self, params: Mapping[str, Any]) -> "Model":
        """The same model and compiled programs with other parameters of the same shapes."""
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__, params=params)
        return other

    def compiled(self, images: Float[Array, "B height width channels"]) -> jax.stages.Compiled:
        """The compiled program of a call, for its memory analysis and text."""
        return self._logits.lower(self.params, images, None).compile()

    @property
    def unreduced(self) -> "Model":
        """The same parameters without any reducer."""
        return self if not self.methods else self._rebuilt(())

    def _rebuilt(self, methods: Sequence[Method], form: token_map.Form | None = None) -> "Model":
        parts: Any = nnx.merge(self._graph, self.params)
        learned = parts["reducers"]  # as `params` has them now
        methods = [dataclasses.replace(m, reducer=learned.get(i, m.reducer)) for i, m in enumerate(methods)]
        form = self.form if form is None else form
        return Model(parts["model"], methods, preprocess=self.preprocess, family=self.family, form=form)

    def cost(self, batch: int = 1) -> flops.Cost:
        """Multiply-accumulates of one call on `batch` images, the model's and the reducers' own."""
        images = jax.ShapeDtypeStruct((batch, *self.config.image_size, self.config.channels), jnp.float32)
        return flops.count(lambda params, x: self.forward(params, x).logits, self.params, images)

    def token_counts(self) -> tuple[int, ...]:
        """Tokens that enter the MLP of every block, empty slots included; nothing is computed."""
        images = jax.ShapeDtypeStruct((1, *self.config.image_size, self.config.channels), jnp.float32)
        out = jax.eval_shape(functools.partial(self.forward, trace=True), self.params, images)
        return tuple(layer.length for layer in out.trace)

    def __repr__(self) -> str:
        methods = ", ".join(f"{m.name}({', '.join(f'{k}={v!r}' for k, v in m.settings.items())})" for m in self.methods)
        c = self.config
        size = f"{c.width}x{c.depth}, {c.prefix}+{c.num_patches} tokens"
        return f"Model(ViT {size}, {methods or 'no reducer'})"


def build(config: ViTConfig, seed: int = 0, *, preprocess: Preprocess | None = None) -> Model:
    """A model with random weights."""
    return Model(ViT(config, rngs=nnx.Rngs(seed)), preprocess=preprocess)


def load(
    source: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    scan: bool = False,
) -> Model:
    """Loads a checkpoint with its preprocessing, and with its reducers if `tokjax.save` wrote some beside it.

    Args:
        source: a local folder, a safetensors file, or an id on the Hugging Face hub.
        image_size: height, width in pixels, if other than the checkpoint's; positions are interpolated as its
            family does.
        dtype: of activations; None: float32.
        scan: whether to store equal blocks stacked and scan them.

    Raises:
        UserError: nothing readable there, or tensors that do not fit.
    """
    folder = Path(source) / "model"  # a training workdir holds its model there
    checkpoint = load_checkpoint(folder if folder.is_dir() else source, image_size=image_size, dtype=dtype)
    config = dataclasses.replace(checkpoint.config, scan=scan)
    params = {**checkpoint.params, "blocks": layers.stack(checkpoint.params["blocks"])} if scan else checkpoint.params
    graph, _ = nnx.split(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0))))
    module = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    model = Model(module, preprocess=checkpoint.preprocess, family=checkpoint.source["family"])
    beside = (folder if folder.is_dir() else Path(source)) / REDUCERS
    return _with_saved_reducers(model, beside) if beside.is_file() else model


def _with_saved_reducers(model: Model, path: Path) -> Model:
    try:
        for entry in json.loads(path.read_text()):
            model = reduce(model, entry["name"], **entry["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of reducers with name and settings that fit: {error}") from error
    if "reducers" not in model.params:
        return model
    weights = Tensors(path.with_name(REDUCER_WEIGHTS))

    def saved(key, leaf):
        name = jax.tree_util.keystr(key)
        if name not in weights or weights.shape(name) != leaf.shape:
            raise UserError(f"{path.with_name(REDUCER_WEIGHTS)} has no tensor {name} of shape {leaf.shape}")
        return jnp.asarray(weights[name])

    learned = jax.tree.map_with_path(saved, model.params["reducers"])
    return model.with_params({**model.params, "reducers": learned})


def reduce(model: Model, method: str | Reducer, *, form: token_map.Form | None = None, **settings: Any) -> Model:
    """The same weights, fewer tokens.

    Args:
        model: what to reduce; it stays as it is. Its own reducers run first.
        method: a registered name, with its settings as keywords, or a reducer.
        form: how hard maps are applied; None: as the model does.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or a site that the model does not have.
    """
    if form is not None and form not in get_args(token_map.Form):
        raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(token_map.Form))}")
    if isinstance(method, str):
        made = Method(method, dict(settings), reducers.create(method, **settings))
    elif settings:
        raise ValueError(f"settings={settings}: go with a registered name, not with a reducer that is made already")
    else:
        fields: dict[str, Any] = vars(method) if dataclasses.is_dataclass(method) else {}
        made = Method(reducers.name_of(method), dict(fields), method)
    return model._rebuilt((*model.methods, made), form)


def save(model: Model, folder: str | Path) -> None:
    """Writes weights, config and preprocessing as the model's family names them, and the reducers beside them.

    Nothing is left half-written: files appear under their names when they are whole.

    Raises:
        ValueError: a reducer that `load` could not make again, because it is not registered or its settings are no
            plain values.
    """
    folder, params = Path(folder), dict(model.params["model"])
    text = _reducers_text(model.methods)
    if model.config.scan:
        params["blocks"] = layers.unstack(params["blocks"])
    config = dataclasses.replace(model.config, scan=False)
    save_checkpoint(folder, config, params, model.preprocess, family=model.family)
    for name in (REDUCERS, REDUCER_WEIGHTS):  # perhaps of an earlier model in this folder
        (folder / name).unlink(missing_ok=True)
    if "reducers" in model.params:
        leaves = jax.tree.leaves_with_path(model.params["reducers"])
        part = folder / f"{REDUCER_WEIGHTS}.part"
        save_file({jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}, part)
        part.replace(folder / REDUCER_WEIGHTS)
    if model.methods:
        part = folder / f"{REDUCERS}.part"
        part.write_text(text)
        part.replace(folder / REDUCERS)


def _reducers_text(methods: Sequence[Method]) -> str:
    for method in methods:
        if method.name not in reducers.REGISTRY:
            raise ValueError(f"reducer {method.name} is not registered: load could not make it; save model.unreduced")
    try:
        return json.dumps([{"name": m.name, "settings": dict(m.settings)} for m in methods], indent=1)
    except TypeError as error:
        raise ValueError(
            f"settings of {', '.join(m.name for m in methods)}: {error}, so that they cannot be saved"
        ) from error
