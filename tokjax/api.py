"""What a user holds: a model with its parameters and reducers, as one callable; load, reduce and save it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import operator
from pathlib import Path
from typing import Any, Literal, get_args, overload

from flax import nnx, struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8
import numpy as np
from safetensors.numpy import save_file

from tokjax import generate, reducers, token_map
from tokjax.bench import flops
from tokjax.cache import Cache
from tokjax.errors import UserError
from tokjax.generate import Decoding, Generated, Going
from tokjax.hooks import Hook, ModelInfo, Reducer, check
from tokjax.models.bert import Bert, BertConfig
from tokjax.models.decoder import Decoder, DecoderConfig, Prefilled, Prompts, Shares, share_keys
from tokjax.models.dual import DualConfig, DualOutput, unit
from tokjax.models.t5 import T5, T5Config
from tokjax.models.text import Text, TextConfig
from tokjax.models.transformer import Blocks, LayerTrace, Output, skeleton
from tokjax.models.vit import Patches, ViT, ViTConfig
from tokjax.models.weave import Weave, WovenDecoder
from tokjax.pretrained.checkpoint import NAMES, REDUCER_WEIGHTS, REDUCERS, load_checkpoint, write_checkpoint
from tokjax.pretrained.files import Tensors
from tokjax.pretrained.names import TextModel
from tokjax.signals import Context
from tokjax.writing import whole_folder, write_whole

Family = Literal["hf", "timm"]
Tower = Literal["vision", "text"]
Place = jax.sharding.Sharding | Callable[[tuple[str | int, ...], tuple[int, ...]], jax.sharding.Sharding]
_SHORTEST = 64  # lengths of padded texts are multiples of this
MODULES: dict[type, Any] = {
    ViTConfig: ViT,
    TextConfig: Text,
    BertConfig: Bert,
    T5Config: T5,
    DecoderConfig: Decoder,
}


class Trace(struct.PyTreeNode):
    """Where every input token went, block by block, and what the reducers noted on the way."""

    layers: tuple[LayerTrace, ...]
    aux: Mapping[str, Any]
    prefix: int = struct.field(pytree_node=False)
    grid: tuple[int, int] | None = struct.field(pytree_node=False)  # patches down and across; None: text
    patch_size: int = struct.field(pytree_node=False)
    shape: Int[Array, "B 2"] | None = None  # the same of every image, where they differ

    @property
    def tokens(self) -> Int[np.ndarray, "L B"]:
        """Valid tokens that entered the MLP of every block."""
        return np.stack([np.asarray(layer.tokens) for layer in self.layers])

    def pictures(
        self, image: UInt8[np.ndarray, "height width 3"], row: int = 0, layers: Sequence[int] | None = None
    ) -> list:
        """The image and its merged regions after the chosen blocks (all by default), each with a caption.

        Raises:
            ValueError: the trace of a text.
        """
        from tokjax import viz  # matplotlib comes with it, which most users of a model do not need

        if self.grid is None:
            raise ValueError("This trace is of texts, which have no picture; see `layers` for where its tokens went.")
        down, across = self.grid if self.shape is None else map(int, np.asarray(self.shape)[row])
        inputs = self.prefix + down * across
        origins = [np.asarray(layer.origin)[row, :inputs] for layer in self.layers]
        slots = [layer.slots for layer in self.layers]
        grid, patch = (down, across), self.patch_size
        return viz.merge_pictures(image, origins, slots, patch, grid, prefix=self.prefix, layers=layers)

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
        preprocess: from PIL images or uint8 arrays (texts for a text encoder) to the input, from texts to ids for a
            T5; None for a model made without.
        form: how hard maps are applied, see `tokjax.token_map.apply_form`.
    """

    def __init__(
        self,
        module: Blocks,
        methods: Sequence[Method] = (),
        *,
        preprocess: Any = None,
        family: Family = "timm",
        form: token_map.Form = "auto",
    ):
        self.config: Any = module.cfg
        self.methods, self.preprocess, self.family, self.form = tuple(methods), preprocess, family, form
        learned = {i: m.reducer for i, m in enumerate(methods) if isinstance(m.reducer, nnx.Module)}
        self._graph, state = nnx.split({"model": module, "reducers": learned})
        self.params = nnx.to_pure_dict(state)
        check(self.hooks, self.info)
        self._logits = jax.jit(lambda params, inputs, key: self.forward(params, inputs, key=key).logits)
        self._traced = jax.jit(functools.partial(self._trace, self.forward))
        self._dense = jax.jit(self._dense_features, static_argnames="fill")
        self._generated = jax.jit(self._generate, static_argnames="how")
        self._begun = jax.jit(self._begin, static_argnames="how")
        self._gone_on = jax.jit(self._go_on, donate_argnames="now")

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
        inputs: PyTree,
        *,
        key: Array | None = None,
        train: bool = False,
        trace: bool = False,
        states: bool = False,
        context: Context | None = None,
    ) -> Output:
        """The whole output as a pure function of the parameters, to be jitted, differentiated or vmapped.

        Args:
            params: as `self.params`.
            inputs: as `preprocess` gives them.
            key: PRNG key, for stochastic depth and for reducers that draw.
            train: whether stochastic depth is on.
            trace: whether to follow every token through the blocks.
            states: whether to give the tokens after every block.
            context: what the reducers shall know beside (the relevance of patches, a text); grid and key are set here.

        Raises:
            ValueError: inputs of another shape.
        """
        with self._running(params) as (module, hooks):
            return module(inputs, hooks, key=key, train=train, trace=trace, states=states, context=context)

    def _trace(self, forward: Callable, params, inputs, key) -> tuple[Array, Trace]:
        out, cfg = forward(params, inputs, key=key, trace=True), self.config
        grid, patch = getattr(cfg, "grid", None), getattr(cfg, "patch_size", 1)
        shape = inputs.shape if isinstance(inputs, Patches) else None
        return out.logits, Trace(out.trace, out.tokens.aux, self.info.prefix, grid, patch, shape)

    def __call__(self, inputs: PyTree, *, key: Array | None = None, trace: bool = False):
        """Logits [B, classes] of normalised images, the features [B, E] of texts; with `trace`, also a `Trace`.

        A T5 takes a `Seq2Seq` and gives logits [B, T, V]; see `generate`.

        Args:
            inputs: as `preprocess` gives them: images [B, height, width, channels], `Patches`, or ids [B, T].
            key: for reducers that draw; they use their seed where there is none.
            trace: whether to follow every token through the blocks.

        Raises:
            ValueError: inputs of another shape.
        """
        self.config.check(inputs)
        return (self._traced if trace else self._logits)(self.params, inputs, key)

    def dense(
        self,
        images: Float[Array, "B height width channels"],
        *,
        fill: token_map.Fill = "nearest",
        key: Array | None = None,
    ) -> Float[Array, "B h w C"]:
        """Features after the last norm at every patch, float32, however few tokens are left.

        Args:
            images: as `preprocess` gives them.
            fill: what a dropped patch gets, see `token_map.restore`.
            key: for reducers that draw.

        Raises:
            ValueError: images of another shape, an unknown fill, or a model without one grid of patches (of texts, or
                of images of any size).
        """
        self._grid()
        self.config.check(images)
        return self._dense(self.params, images, key, fill=fill)

    def _grid(self) -> tuple[int, int]:
        if self.info.grid is None:
            raise ValueError("This model has no one grid of patches, on which features could stand.")
        return self.info.grid

    def _dense_features(self, params, images, key, *, fill) -> Array:
        output = self.forward(params, images, key=key, trace=bool(self.methods))
        return self.restore(output, fill=fill)

    def restore(self, output: Output, *, fill: token_map.Fill = "nearest") -> Float[Array, "B h w C"]:
        """`dense` of an output of `forward`, as a pure function.

        Args:
            output: of this model; traced if it has reducers.
            fill: what a dropped patch gets, see `token_map.restore`.

        Raises:
            ValueError: no trace, an unknown fill, or a model without one grid of patches.
        """
        grid, prefix, origin = self._grid(), self.info.prefix, output.tokens.origin
        if origin is None and self.methods:
            raise ValueError("output is of a reduced model: it needs trace=True")
        if fill not in get_args(token_map.Fill):
            raise ValueError(f"fill={fill!r}: must be one of {', '.join(get_args(token_map.Fill))}")
        if origin is None:
            features = output.features[:, prefix:]
        else:
            features = token_map.restore(output.features, origin, grid, prefix=prefix, fill=fill)
        return features.astype(jnp.float32).reshape(-1, *grid, features.shape[-1])

    def generate(
        self,
        texts: Int[Array, "B N"] | Sequence[str],
        *,
        valid: Bool[Array, "B N"] | None = None,
        key: Array | None = None,
        stream: Callable[[Int[np.ndarray, "B t"], bool], Any] | None = None,
        every: int = 8,
        **settings: Any,
    ) -> Generated:
        """Reads texts and goes on with them: greedily, by sampling, or by beam search.

        Every combination of settings and shapes is compiled once: for a T5 as one program; for a decoder reading is one
        and going on another, into which the cache is donated.

        Args:
            texts: ids, or strings for `preprocess`; `preprocess.decode` of a row of the result is a string again.
            valid: which of the ids count, on either side; None: those that are no padding.
            key: for sampling and for reducers that draw.
            stream: of a decoder, without a search: called as tokens come, with all new ones so far and whether they are
                the last; see `tokjax.generate.Console`.
            every: tokens between its calls.
            **settings: fields of `tokjax.generate.Decoding`; ends and padding are the model's own.

        Raises:
            ValueError: a model of images, ids of another shape or outside of the vocabulary, a text that is empty or
                too long, a setting out of range, or sampling without a key.
        """
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        if not self._decodes or settings.get("beams", 1) > 1:
            if stream is not None:
                raise ValueError("stream: needs a decoder and beams=1")
            how, ids, valid = self._to_go_on_with(texts, valid, key, settings)
            return self._generated(self.params, ids, valid, key, how=how)
        now = self.begin(texts, valid=valid, key=key, **settings)
        if stream is None:
            return self.go_on(now).result
        end, t = now.how.max_tokens, 1
        while t < end and bool(now.open.any()):
            stream(np.asarray(now.ids)[:, :t], False)
            now = self.go_on(now, t + every)
            t = int(now.t)
        stream(np.asarray(now.ids)[:, :t], True)
        return now.result

    def begin(
        self,
        texts: Int[Array, "B N"] | Sequence[str],
        *,
        valid: Bool[Array, "B N"] | None = None,
        key: Array | None = None,
        **settings: Any,
    ) -> Going:
        """The first half of `generate` for decoders: reads texts and chooses the first tokens.

        Raises:
            ValueError: as `generate`; a beam search; a model that is no decoder.
        """
        self._needs_decoder("begin")
        how, ids, valid = self._to_go_on_with(texts, valid, key, settings)
        return self._begun(self.params, ids, valid, key, how=how)

    def go_on(self, now: Going, until: int | None = None) -> Going:
        """The second half: goes on to `until` tokens (None: to the end) and gives what can be gone on with again.

        `now` is used up: its arrays are donated.
        """
        return self._gone_on(self.params, now, now.how.max_tokens if until is None else until)

    @property
    def _decodes(self) -> bool:
        return isinstance(self.config, DecoderConfig)

    def _to_go_on_with(
        self, texts: Any, valid: Any, key: Any, settings: Mapping[str, Any]
    ) -> tuple[Decoding, Any, Any]:
        """Settings, ids and their mask, checked."""
        cfg = self.config
        ends: Any
        if isinstance(cfg, T5Config):
            ends, pad = cfg.eos_id, cfg.pad_id
        elif isinstance(cfg, DecoderConfig):
            ends = cfg.eos_ids or None
            pad = next(i for i in (cfg.pad_id, *cfg.eos_ids, 0) if i is not None)
        else:
            raise ValueError("This model gives no tokens that could be gone on with.")
        how = Decoding(**{"eos_id": ends, "pad_id": pad, **settings})
        if how.temperature and key is None:
            raise ValueError(f"key=None: temperature={how.temperature} draws tokens, which needs one")
        if not isinstance(texts, Sequence):
            ids = texts
        elif self.preprocess is None:
            raise ValueError("texts are strings: this model was made without a tokenizer, give ids")
        elif self._decodes:
            if isinstance(texts, str):
                raise ValueError(f"texts must be a list of strings, got the string {texts!r}")
            if not texts:
                raise ValueError("texts is empty: must have at least one")
            if valid is not None:
                raise ValueError("valid: goes with ids; what of a string counts is known")
            ids, valid = _padded(self.preprocess.prompts(texts), cfg.max_length, how.pad_id)
        else:
            ids = self.preprocess(texts)
            longest = int(np.max(np.sum(ids != how.pad_id, 1), initial=1))
            ids = ids[:, : -(-longest // _SHORTEST) * _SHORTEST]  # few lengths, few programs
        cfg.check_ids("texts", ids)
        if self._decodes:
            if valid is None and cfg.pad_id is not None:
                valid = np.asarray(ids) != cfg.pad_id
            if valid is not None and valid.shape != ids.shape:
                raise ValueError(f"valid has shape {valid.shape}: must be that of texts, {ids.shape}")
            counts = np.full(len(ids), ids.shape[1]) if valid is None else np.asarray(valid).sum(1)
            if not counts.all():
                raise ValueError(f"texts[{int(np.argmin(counts))}] has no token: there is nothing to go on with")
            if (most := int(counts.max(initial=0))) + how.max_tokens > cfg.max_length:
                end = f"goes beyond the {cfg.max_length} positions of this model"
                raise ValueError(f"max_tokens={how.max_tokens}: with a text of {most} tokens {end}")
        return how, ids, valid

    @contextlib.contextmanager
    def _running(self, params: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[Hook, ...]]]:
        """The module with these parameters, and its hooks."""
        parts: Any = nnx.merge(self._graph, params)
        with token_map.apply_form(self.form):
            yield parts["model"], self._hooks(parts["reducers"])

    def _begin(self, params, ids, valid, key, *, how: Decoding) -> Going:
        read = self.prefill(params, Prompts(ids, valid), capacity=how.max_tokens, key=key)
        return generate.start(read.cache, read.logits, how, key)

    def _go_on(self, params, now: Going, until) -> Going:
        with self._running(params) as (module, hooks):
            return generate.go_on(module.steps(hooks), now, until)

    def _generate(self, params, ids, valid, key, *, how: Decoding) -> Generated:
        with self._running(params) as (module, hooks):
            options = {"length": how.max_tokens, "beams": how.beams, "valid": valid, "key": key}
            step, cache, logits = module.begin(ids, hooks, **options)
        return generate.run(step, cache, logits, how, key)

    def prefill(
        self, params: Mapping[str, Any], inputs: PyTree, *, capacity: int, key: Array | None = None
    ) -> Prefilled:
        """Reads texts into a cache, the reducers at work, as a pure function of the parameters.

        Args:
            params: as `self.params`.
            inputs: ids [B, N], or `Prompts`.
            capacity: tokens that there shall be room for behind the prompt.
            key: for reducers that draw.

        Raises:
            ValueError: texts of another shape, or a model that is no decoder.
        """
        self._needs_decoder("prefill")
        with self._running(params) as (module, hooks):
            return module.prefill(inputs, hooks, capacity=capacity, key=key)

    def follow(
        self, params: Mapping[str, Any], cache: Cache, ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Takes in given tokens one by one (teacher forcing): the logits behind each, and the cache with all of them.

        Args:
            params: as `self.params`.
            cache: of `prefill`, with room for T tokens.
            ids: of the tokens.

        Raises:
            ValueError: a cache of another model, batch or rotation, or a model that is no decoder.
        """
        self._needs_decoder("follow")
        with self._running(params) as (module, hooks):
            step = module.steps(hooks)

            def take(cache: Cache, ids: Int[Array, "B"]) -> tuple[Cache, Array]:
                logits, cache = step(cache, ids)
                return cache, logits

            cache, logits = jax.lax.scan(take, cache, ids.T)
        return jnp.swapaxes(logits, 0, 1), cache

    def _needs_decoder(self, name: str) -> None:
        if not self._decodes:
            raise ValueError(f"This model is a {MODULES[type(self.config)].__name__}: {name} needs a Decoder.")

    def module(self, params: Mapping[str, Any]) -> Any:
        """The NNX module with these parameters, for its other functions; within `jax.jit` or outside of it."""
        return nnx.merge(self._graph, params)["model"]

    def woven(self, mesh: jax.sharding.Mesh, **how: Any) -> "Model":
        """Of a decoder: the same numbers from the devices of a mesh, each with some heads and a share of the MLP.

        Prompts go in two parts, so that what is sent for one may hide behind the products of the other (TokenWeave).
        What is saved is the model that it was made of.

        Args:
            mesh: with an axis "model", over which heads and MLP are split; rows are over its axis "data", if any.
            **how: fields of `tokjax.models.weave.Weave`.

        Raises:
            ValueError: no decoder, or one that does not divide.
        """
        if not self._decodes:
            raise ValueError(f"This model is a {MODULES[type(self.config)].__name__}: woven needs a Decoder.")
        module = WovenDecoder(self.module(self.params), Weave(mesh, **how))
        return Model(module, self.methods, preprocess=self.preprocess, family=self.family, form=self.form)

    def with_params(self, params: Mapping[str, Any]) -> "Model":
        """The same model and compiled programs with other parameters of the same shapes."""
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__, params=params)
        return other

    def with_config(self, **changes: Any) -> "Model":
        """The same parameters and reducers under a config with some fields changed, such as lengths or dropout.

        Raises:
            ValueError: the changed model, or one of its reducers, would have other parameters.
        """
        config = dataclasses.replace(self.config, **changes)
        if config == self.config:
            return self
        graph, state = nnx.split(skeleton(MODULES[type(config)], config))
        shapes, ours = jax.tree.map(jnp.shape, nnx.to_pure_dict(state)), jax.tree.map(jnp.shape, self.params)
        if shapes != ours["model"]:
            raise ValueError(f"changes={changes}: the model would have other parameters")
        module: Any = nnx.merge(graph, self.params["model"])
        other = Model(module, preprocess=self.preprocess, family=self.family, form=self.form)
        for method in self.methods:
            known = method.name in reducers.REGISTRY
            other = reduce(other, method.name if known else method.reducer, **(method.settings if known else {}))
        if jax.tree.map(jnp.shape, other.params) != ours:
            raise ValueError(f"changes={changes}: its reducers would have other parameters")
        return other.with_params(self.params)

    def share_keys(self, layer: int, group: int = 1, shares: Shares = "mean") -> "Model":
        """A decoder whose blocks from `layer` on make keys and values of what enters the first of them.

        The reducers stay; arguments and errors are those of `tokjax.models.decoder.share_keys`.

        Raises:
            ValueError: a model that is no decoder.
        """
        self._needs_decoder("share_keys")
        config, params = share_keys(self.config, self.params["model"], layer, group, shares)
        if config == self.config:
            return self
        graph, _ = nnx.split(skeleton(Decoder, config))
        learned: Any = nnx.merge(self._graph, self.params)["reducers"]
        methods = [dataclasses.replace(m, reducer=learned.get(i, m.reducer)) for i, m in enumerate(self.methods)]
        module: Any = nnx.merge(graph, params)
        return Model(module, methods, preprocess=self.preprocess, family=self.family, form=self.form)

    def compiled(self, inputs: PyTree) -> jax.stages.Compiled:
        """The compiled program of a call, for its memory analysis and text."""
        return self._logits.lower(self.params, inputs, None).compile()

    @property
    def unreduced(self) -> "Model":
        """The same parameters without any reducer."""
        return self if not self.methods else self._rebuilt(())

    def learning(self) -> "Model":
        """The same parameters with every reducer in the form in which it learns, see `reducers.Entry.training`."""
        if not any(_training(method) for method in self.methods):
            return self
        methods = [_in_training(method, self.info) for method in self.methods]
        module: Any = nnx.merge(self._graph, self.params)["model"]
        other = Model(module, methods, preprocess=self.preprocess, family=self.family, form=self.form)
        return other.with_params(self.params)

    def settled(self) -> "Model":
        """The same with the counts that a search has learned as fixed ones, at their real cost.

        A reducer whose lengths are parameters has `settled(params)`, which names the registered reducer and the
        settings that do the same with static lengths. Others stay as they are.

        Raises:
            UserError: parameters that are not finite.
        """
        parts: Any = nnx.merge(self._graph, self.params)
        methods = []
        for i, method in enumerate(self.methods):
            if hasattr(method.reducer, "settled"):
                name, settings = method.reducer.settled(self.params["reducers"][i])
                methods.append(Method(name, settings, reducers.create(name, self.info, **settings)))
            else:
                methods.append(dataclasses.replace(method, reducer=parts["reducers"].get(i, method.reducer)))
        if [m.name for m in methods] == [m.name for m in self.methods]:
            return self
        return Model(parts["model"], methods, preprocess=self.preprocess, family=self.family, form=self.form)

    def statistics(self, aux: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """New values of the moving statistics of a head that learns, at their place in `params`; {} without any.

        What a loss hands to the training step as `metrics["statistics"]`, see `tokjax.train.state.make_step`.

        Args:
            aux: `out.tokens.aux` of a forward pass of this model.
        """
        new = [noted["statistics"] for noted in aux.values() if "statistics" in noted]
        if not new:
            return {}
        reads = [any(h.where == "readout" for h in method.reducer.hooks(self.info)) for method in self.methods]
        return {"reducers": {reads.index(True): new[0]}}  # one head reads, the first

    def _rebuilt(self, methods: Sequence[Method], form: token_map.Form | None = None) -> "Model":
        parts: Any = nnx.merge(self._graph, self.params)
        learned = parts["reducers"]  # as `params` has them now
        methods = [dataclasses.replace(m, reducer=learned.get(i, m.reducer)) for i, m in enumerate(methods)]
        form = self.form if form is None else form
        return Model(parts["model"], methods, preprocess=self.preprocess, family=self.family, form=form)

    def cost(self, batch: int = 1, phase: reducers.Phase = "call", tokens: int = 64) -> flops.Cost:
        """Multiply-accumulates, the model's and the reducers' own.

        Args:
            batch: inputs.
            phase: what of: "call", one call; of a decoder also "prefill", reading texts up to the logits of the first
                new token, or "decode", all steps that take in the new tokens.
            tokens: new tokens that there is room for, and that "decode" takes in.

        Raises:
            ValueError: an unknown phase, or one that this model does not have.
        """
        inputs = self.config.example(batch)
        if phase == "call":
            return flops.count(lambda params, x: self.forward(params, x).logits, self.params, inputs)
        if phase not in get_args(reducers.Phase):
            raise ValueError(f"phase={phase!r}: must be one of {', '.join(get_args(reducers.Phase))}")
        if not self._decodes:
            raise ValueError(f"phase={phase!r}: needs a Decoder, this is a {MODULES[type(self.config)].__name__}")

        def read(params: Any, ids: Any) -> tuple[Array, Cache]:
            out = self.prefill(params, ids, capacity=tokens)
            return out.logits, out.cache

        if phase == "prefill":
            return flops.count(read, self.params, inputs)
        _, cache = jax.eval_shape(read, self.params, inputs)
        ids = jax.ShapeDtypeStruct((batch,), jnp.int32)

        def take(params: Any, cache: Cache, ids: Any, t: int) -> tuple[Array, Cache]:
            with self._running(params) as (module, hooks):
                return module.steps(hooks)(cache.replace(at=np.int32(t)), ids)

        # Steps in which the same blocks run cost the same.
        columns = cache.length + np.arange(tokens)
        active = self.module(self.params).active(self.hooks, columns, cache.length, cache.length + tokens)
        alike = Counter([0] * tokens if active is None else map(active.T.tolist().index, active.T.tolist()))
        costs = (flops.count(functools.partial(take, t=t), self.params, cache, ids) * n for t, n in alike.items())
        return functools.reduce(operator.add, costs)

    def cache_bytes(self, batch: int = 1) -> int:
        """Bytes of a decoder's cache behind prompts of `config.length` tokens, without room for more.

        Raises:
            ValueError: a model that is no decoder.
        """
        read = functools.partial(self.prefill, capacity=0)
        cache = jax.eval_shape(read, self.params, self.config.example(batch)).cache
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.groups))

    def token_counts(self) -> tuple[int, ...]:
        """Tokens that enter the MLP of every block, empty slots included; nothing is computed."""
        out = jax.eval_shape(functools.partial(self.forward, trace=True), self.params, self.config.example(1))
        return tuple(layer.length for layer in out.trace)

    def __repr__(self) -> str:
        methods = ", ".join(f"{m.name}({', '.join(f'{k}={v!r}' for k, v in m.settings.items())})" for m in self.methods)
        c, info = self.config, self.info
        size = f"{c.width}x{c.depth}, {info.prefix}+{info.length - info.prefix} tokens"
        return f"Model({MODULES[type(c)].__name__} {size}, {methods or 'no reducer'})"


def _padded(texts: Sequence[Sequence[int]], most: int, pad_id: int) -> tuple[Int[np.ndarray, "B N"], Any]:
    """Ids padded on the right to one of few lengths, so that few programs serve, and which of them count.

    Raises:
        ValueError: a text of more than `most` tokens.
    """
    counts = [len(text) for text in texts]
    if wrong := [i for i, count in enumerate(counts) if count > most]:
        raise ValueError(f"texts[{wrong[0]}] has {counts[wrong[0]]} tokens: must have at most {most}")
    length = min(most, -(-max([1, *counts]) // _SHORTEST) * _SHORTEST)
    ids = np.full((len(texts), length), pad_id, np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    return ids, np.arange(length) < np.array(counts).reshape(-1, 1)


def _training(method: Method) -> Mapping[str, Any]:
    registered = reducers.REGISTRY.get(method.name)
    return {} if registered is None else registered.training


def _in_training(method: Method, info: ModelInfo) -> Method:
    if not (training := _training(method)):
        return method
    settings = {**method.settings, **training}
    return Method(method.name, settings, reducers.create(method.name, info, **settings))


class DualModel:
    """An image encoder and a text encoder with one space of features: CLIP, SigLIP.

    Attributes:
        vision: the image encoder, a model of its own.
        text: the text encoder, another; its `preprocess` is the tokenizer.
        config: of both.
    """

    def __init__(self, vision: Model, text: Model, config: DualConfig, temperature: Mapping[str, Array]):
        self.vision, self.text, self.config, self._temperature = vision, text, config, dict(temperature)
        self._logits = jax.jit(lambda image, text, t: DualOutput(image, text, *_scale_and_bias(t)).logits)
        self._unit = jax.jit(unit)

    @property
    def params(self) -> dict[str, Any]:
        """`{"vision": ..., "text": ..., "logit_scale": [] (, "logit_bias": [])}`; the towers' as in `Model.params`."""
        return {"vision": self.vision.params, "text": self.text.params, **self._temperature}

    @property
    def towers(self) -> dict[Tower, Model]:
        return {"vision": self.vision, "text": self.text}

    @property
    def preprocess(self) -> Any:
        """From PIL images or uint8 arrays to the input."""
        return self.vision.preprocess

    @property
    def tokenizer(self) -> Any:
        """From texts to ids [T, length]; None for a model made without."""
        return self.text.preprocess

    @property
    def methods(self) -> tuple[Method, ...]:
        """The reducers of the image encoder, then those of the text encoder."""
        return (*self.vision.methods, *self.text.methods)

    @property
    def unreduced(self) -> "DualModel":
        """The same parameters without any reducer."""
        return self.replace(vision=self.vision.unreduced, text=self.text.unreduced) if self.methods else self

    def learning(self) -> "DualModel":
        """The same parameters with every reducer in the form in which it learns."""
        return self.replace(vision=self.vision.learning(), text=self.text.learning())

    def replace(self, vision: Model | None = None, text: Model | None = None) -> "DualModel":
        """The same with another image or text encoder."""
        return DualModel(vision or self.vision, text or self.text, self.config, self._temperature)

    def with_params(self, params: Mapping[str, Any]) -> "DualModel":
        """The same model and compiled programs with other parameters of the same shapes."""
        other = object.__new__(DualModel)
        other.__dict__.update(self.__dict__)
        other.vision = self.vision.with_params(params["vision"])
        other.text = self.text.with_params(params["text"])
        other._temperature = {name: params[name] for name in self._temperature}
        return other

    def forward(
        self,
        params: Mapping[str, Any],
        images: PyTree,
        ids: Int[Array, "T length"],
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> DualOutput:
        """Features and temperature as a pure function of the parameters."""
        keys = (None, None) if key is None else jax.random.split(key)
        image = self.vision.forward(params["vision"], images, key=keys[0], train=train).logits
        text = self.text.forward(params["text"], ids, key=keys[1], train=train).logits
        return DualOutput(unit(image), unit(text), *_scale_and_bias(params))

    def encode_image(self, images: PyTree, *, key: Array | None = None) -> Float[Array, "B E"]:
        """Features of preprocessed images, float32, at length 1."""
        return self._unit(self.vision(images, key=key))

    def encode_text(self, ids: Int[Array, "T length"], *, key: Array | None = None) -> Float[Array, "T E"]:
        """Features of tokenized texts, float32, at length 1."""
        return self._unit(self.text(ids, key=key))

    def logits(self, image: Float[Array, "B E"], text: Float[Array, "T E"]) -> Float[Array, "B T"]:
        """Logits per image of features at length 1; CLIP takes their softmax over texts, SigLIP their sigmoid."""
        return self._logits(image, text, self._temperature)

    def __call__(self, images: PyTree, ids: Int[Array, "T length"], *, key: Array | None = None) -> Float[Array, "B T"]:
        """Logits per image of every image with every text.

        Raises:
            ValueError: inputs of another shape, or ids outside of the vocabulary.
        """
        return self.logits(self.encode_image(images, key=key), self.encode_text(ids, key=key))

    def cost(self, batch: int = 1) -> flops.Cost:
        """Multiply-accumulates of encoding `batch` images: texts are encoded once for all of them (`text.cost()`)."""
        return self.vision.cost(batch)

    def token_counts(self) -> tuple[int, ...]:
        """Of the image encoder, see `Model.token_counts`."""
        return self.vision.token_counts()

    def __repr__(self) -> str:
        return f"DualModel({self.vision}, {self.text})"


def _scale_and_bias(temperature: Mapping[str, Array]) -> tuple[Array, Array | None]:
    return jnp.exp(temperature["logit_scale"]), temperature.get("logit_bias")


@overload
def build(
    config: ViTConfig | TextConfig | BertConfig | T5Config | DecoderConfig, seed: int = 0, *, preprocess: Any = None
) -> Model: ...
@overload
def build(config: DualConfig, seed: int = 0, *, preprocess: Any = None, tokenizer: Any = None) -> DualModel: ...
def build(config: Any, seed: int = 0, *, preprocess: Any = None, tokenizer: Any = None) -> Any:
    """A model with random weights.

    Args:
        config: of a ViT, a text encoder, both, a BERT, a T5, or a decoder.
        seed: of the weights.
        preprocess: from images (for a text encoder: from texts) to the input.
        tokenizer: from texts to ids, of the two-tower model.
    """
    if not isinstance(config, DualConfig):
        return Model(MODULES[type(config)](config, rngs=nnx.Rngs(seed)), preprocess=preprocess)
    vision = build(config.vision, seed, preprocess=preprocess)
    if config.vision.num_classes:  # a projection to learn, not a classifier that starts at zero
        kernel = vision.params["model"]["head"]["kernel"]
        drawn = jax.random.normal(jax.random.key(seed), kernel.shape) * config.vision.width**-0.5
        head = {**vision.params["model"]["head"], "kernel": drawn}
        vision = vision.with_params({**vision.params, "model": {**vision.params["model"], "head": head}})
    temperature = {"logit_scale": jnp.float32(config.logit_scale)}
    if config.logit_bias is not None:
        temperature["logit_bias"] = jnp.float32(config.logit_bias)
    return DualModel(vision, build(config.text, seed + 1, preprocess=tokenizer), config, temperature)


def load(
    source: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    scan: bool = False,
    sharding: Place | None = None,
) -> Any:
    """Loads a checkpoint with its preprocessing, and with its reducers if `tokjax.save` wrote some beside it.

    Args:
        source: a local folder, a file (safetensors, a torch pickle or archive, `.npz`), or an id on the Hugging Face
            hub.
        image_size: height, width in pixels, if other than the checkpoint's; positions are interpolated as its
            family does.
        dtype: of activations; None: float32.
        scan: whether to store equal blocks stacked and scan them.
        sharding: where every array goes as soon as it is read: one sharding for all, or a function of an array's path
            in `params` and its shape, as `tokjax.parallel.placing` gives; None: the first device. A process reads only
            what its own devices hold.

    Returns:
        A `Model`; for checkpoints with two towers (CLIP, SigLIP) a `DualModel`.

    Raises:
        UserError: nothing readable there, or tensors that do not fit.
    """
    local = Path(source).expanduser()
    folder = local / "model"  # a training workdir holds its model there
    source, local = (folder, folder) if folder.is_dir() else (source, local)

    def place(path: tuple[str | int, ...], array: np.ndarray) -> jax.Array:
        return jax.device_put(array).block_until_ready()  # one array at a time in the host's memory

    def place_parts(path: tuple[str | int, ...], shape: tuple[int, ...], part: Callable) -> jax.Array:
        where = sharding(path, shape) if callable(sharding) else sharding
        assert where is not None
        return _split(shape, where, part).block_until_ready()

    put: dict[str, Any] = {"place": place} if sharding is None else {"place_parts": place_parts}
    checkpoint = load_checkpoint(source, image_size=image_size, dtype=dtype, scan=scan, **put)
    config, params, side = checkpoint.config, checkpoint.params, checkpoint.source["family"]

    def model(config: Any, params: Mapping[str, Any], preprocess: Any) -> Model:
        graph, _ = nnx.split(skeleton(MODULES[type(config)], config))
        return Model(nnx.merge(graph, params), preprocess=preprocess, family=side)

    if not isinstance(config, DualConfig):
        preprocess = checkpoint.tokenizer if isinstance(config, TextModel) else checkpoint.preprocess
        return _with_saved_reducers(model(config, params, preprocess), local / REDUCERS)
    dual = DualModel(
        model(config.vision, params["vision"], checkpoint.preprocess),
        model(config.text, params["text"], checkpoint.tokenizer),
        config,
        {name: params[name] for name in ("logit_scale", "logit_bias") if name in params},
    )
    return _with_saved_reducers(dual, local / REDUCERS)


def _split(
    shape: tuple[int, ...], where: jax.sharding.Sharding, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array of which this process makes its parts, each once however many of its devices hold it."""
    made: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def one(index: Any) -> np.ndarray:
        key = tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))
        if key not in made:
            made[key] = part(tuple(slice(start, stop) for start, stop, _ in key))
        return made[key]

    return jax.make_array_from_callback(shape, where, one)


def _with_saved_reducers(model: Any, path: Path) -> Any:
    if not path.is_file():
        return model
    try:
        for entry in json.loads(path.read_text()):
            model = reduce(model, entry["name"], tower=entry.get("tower"), **entry["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of reducers with name and settings that fit: {error}") from error
    for tower, each in _parts(model):
        if "reducers" not in each.params:
            continue
        weights = Tensors(path.with_name(REDUCER_WEIGHTS))

        def saved(key, leaf, tower=tower, weights=weights):
            name = tower + jax.tree_util.keystr(key)
            if name not in weights or weights.shape(name) != leaf.shape:
                raise UserError(f"{path.with_name(REDUCER_WEIGHTS)} has no tensor {name} of shape {leaf.shape}")
            return jnp.asarray(weights[name])

        learned = jax.tree.map_with_path(saved, each.params["reducers"])
        each = each.with_params({**each.params, "reducers": learned})
        model = model.replace(**{tower: each}) if tower else each
    return model


def _parts(model: Model | DualModel) -> Iterator[tuple[str, Model]]:
    """The towers by name; a model of one tower has none."""
    if isinstance(model, DualModel):
        yield from model.towers.items()
    else:
        yield "", model


@overload
def reduce(model: Model, method: str | Reducer, *, form: token_map.Form | None = None, **settings: Any) -> Model: ...
@overload
def reduce(
    model: DualModel,
    method: str | Reducer,
    *,
    form: token_map.Form | None = None,
    tower: Tower | None = None,
    **settings: Any,
) -> DualModel: ...
def reduce(
    model: Any,
    method: str | Reducer,
    *,
    form: token_map.Form | None = None,
    tower: Tower | None = None,
    **settings: Any,
) -> Any:
    """The same weights, fewer tokens.

    Args:
        model: what to reduce; it stays as it is. Its own reducers run first.
        method: a registered name, with its settings as keywords, or a reducer.
        form: how hard maps are applied; None: as the model does.
        tower: of a model with two, "vision" (which None stands for) or "text".

    Raises:
        ValueError: an unknown name, tower or setting, a value out of range, or a site that the model does not have.
    """
    if tower is not None and not (isinstance(model, DualModel) and tower in get_args(Tower)):
        raise ValueError(f"tower={tower!r}: must be 'vision' or 'text', of a model that has both")
    if isinstance(model, DualModel):
        tower = tower or "vision"
        return model.replace(**{tower: reduce(model.towers[tower], method, form=form, **settings)})
    if form is not None and form not in get_args(token_map.Form):
        raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(token_map.Form))}")
    if isinstance(method, str):
        made = Method(method, dict(settings), reducers.create(method, model.info, **settings))
    elif settings:
        raise ValueError(f"settings={settings}: go with a registered name, not with a reducer that is made already")
    else:
        fields: dict[str, Any] = vars(method) if dataclasses.is_dataclass(method) else {}
        made = Method(reducers.name_of(method), dict(fields), method)
    if hasattr(made.reducer, "change"):
        model = made.reducer.change(model)
    return model._rebuilt((*model.methods, made), form)


def save(model: Model | DualModel, folder: str | Path, *, dtype: str = "float32") -> None:
    """Writes weights, config, preprocessing and tokenizer as the model's family names them, and the reducers beside.

    All files appear or none, see `tokjax.writing.whole_folder`; files of other names in the folder stay as they are.

    Args:
        model: with or without reducers.
        folder: made if it does not exist.
        dtype: of the weights in the file, one of float32, bfloat16 and float16; a reducer's own stay in float32.

    Raises:
        UserError: `folder` is a file.
        ValueError: a reducer that `load` could not make again, because it is not registered or its settings are no
            plain values; a text encoder without its image encoder, which no family has; or another dtype.
    """
    folder, parts = Path(folder).expanduser(), dict(_parts(model))
    if isinstance(model, Model) and isinstance(model.config, TextConfig):
        raise ValueError("model is a text encoder alone; save the DualModel that it belongs to")
    text = _reducers_text(parts)
    trees = {tower: dict(part.params["model"]) for tower, part in parts.items()}
    if isinstance(model, DualModel):
        towers: dict[str, Any] = {t: dataclasses.replace(each.config, scan=False) for t, each in parts.items()}
        config, params = dataclasses.replace(model.config, **towers), {**model.params, **trees}
        family = model.vision.family
    else:
        config, params, family = dataclasses.replace(model.config, scan=False), trees[""], model.family
    preprocess, tokenizer = model.preprocess, model.tokenizer if isinstance(model, DualModel) else None
    if isinstance(config, TextModel):
        preprocess, tokenizer = None, preprocess
    learned = {
        tower + jax.tree_util.keystr(key): np.asarray(leaf)
        for tower, part in parts.items()
        for key, leaf in jax.tree.leaves_with_path(part.params.get("reducers", {}))
    }
    with whole_folder(folder, NAMES) as staged:
        write_checkpoint(staged, config, params, preprocess, family, tokenizer, dtype)
        if learned:
            write_whole(staged / REDUCER_WEIGHTS, lambda path: save_file(learned, path))
        if model.methods:
            (staged / REDUCERS).write_text(text)


def _reducers_text(parts: Mapping[str, Model]) -> str:
    methods = [(tower, method) for tower, part in parts.items() for method in part.methods]
    for _, method in methods:
        if method.name not in reducers.REGISTRY:
            raise ValueError(f"reducer {method.name} is not registered: load could not make it; save model.unreduced")
    try:
        return json.dumps(
            [
                {"name": m.name, "settings": dict(m.settings), **({"tower": tower} if tower else {})}
                for tower, m in methods
            ],
            indent=1,
        )
    except TypeError as error:
        names = ", ".join(m.name for _, m in methods)
        raise ValueError(f"settings of {names}: {error}, so that they cannot be saved") from error
