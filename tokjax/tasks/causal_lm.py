"""Decoder language models: trained on a text, gone on with, and measured with fewer tokens in their prompts and caches.

What a reducer of prompts or caches costs shows in what comes behind the prompt. A test text of `data.prompt` tokens is
read with the reducer at work; the tokens behind it are then given one by one through the cache that it has left
(teacher forcing), which gives their perplexity. Beside it stand questions whose answers are a few tokens of the prompt
(`tokjax.data.causal`): a cache without them cannot answer.

The vocabulary is that of a checkpoint, bytes, or a byte-level BPE that is learned from the text and lies in
`workdir/vocabulary` and beside the saved model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import math
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import ml_collections
from ml_collections import config_dict
import numpy as np

from tokjax import api, parallel, viz
from tokjax.bench import report, timing
from tokjax.cache import held
from tokjax.data import causal, texts
from tokjax.data.bytes import ByteTokenizer
from tokjax.data.corruption import IGNORE
from tokjax.data.stream import AUGMENT
from tokjax.errors import UserError
from tokjax.generate import Console
from tokjax.models.decoder import DecoderConfig, preset
from tokjax.reducers.llm import swiftkv
from tokjax.tasks.experiment import RESULTS, common_config, lines, shape_config, shape_of, user_input
from tokjax.tasks.on_texts import OnTexts
from tokjax.tasks.train_reducer import TEACHER
from tokjax.train.config import default_config as train_config
from tokjax.train.losses import swift_kv
from tokjax.train.state import LossFn

VOCABULARIES = ("bpe", "bytes")
GENERATED = "generated.jsonl"
COSTS = ("macs", "macs_step", "cache_bytes")
TIMES = ("prefill_ms", "prefill_speedup", "step_ms", "step_speedup")
Read = Callable[[PyTree, Mapping[str, Array]], Mapping[str, Array]]


def default_config() -> ml_collections.ConfigDict:
    """Every field of an experiment with a decoder, with its meaning; configs start from it."""
    config = common_config("causal_lm")
    config.title = "Decoder language model"
    config.batch_size, config.eval_batch_size = 32, 50
    config.model = model_config("")
    config.vocabulary = vocabulary = ml_collections.ConfigDict()
    vocabulary.kind = "bpe"  # learned from the text; or bytes. A checkpoint of `init` brings its own
    vocabulary.size = 1024  # at most, of a BPE
    config.reduce = ml_collections.ConfigDict({"name": ""})  # a reducer and its settings, not on in training; or none
    config.data = causal.default_config()
    config.train = train_config(total_steps=1000, best_metric="bits_per_byte", best_mode="min", keep_best=False)

    config.distil = distil = ml_collections.ConfigDict()
    distil.on = False  # train a SwiftKV of `reduce` to give what the model of `init` gives, and nothing else of it
    distil.temperature = 2.0  # published (Qiao et al. 2024), as the next
    distil.hidden = 1.0  # weight of the error of what enters the last block

    config.generate = generate = ml_collections.ConfigDict()
    generate.prompts = ("The",)
    generate.file = ""  # one prompt a line, in place of `prompts`
    generate.max_tokens = 64
    generate.temperature = 0.8  # 0: the likeliest token
    generate.top_k = config_dict.placeholder(int)
    generate.top_p = config_dict.placeholder(float)
    generate.seed = 0

    config.bench = bench = ml_collections.ConfigDict()  # reading and going on apart, beside no reducer
    bench.batch_sizes = (1, 8)
    bench.repeats = 5
    bench.seconds = 0.5

    config.viz = ml_collections.ConfigDict()
    config.viz.texts = 4  # test texts to draw
    return config


def model_config(name: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """A preset such as "llama-3.2-1b" ("": DecoderConfig's defaults) and fields to change; None changes nothing.

    Vocabulary and lengths are those of the data, `max_length` where none is given.
    """
    return shape_config(DecoderConfig, ("vocab_size", "length", "bos_id", "eos_ids", "pad_id"), name, **changes)


class CausalLM(OnTexts):
    """Perplexity of texts and of what comes behind a prompt, and answers to questions about the prompt."""

    modes: ClassVar[tuple[str, ...]] = ("train", "eval", "generate", "bench", "viz")
    metrics = ("bits_per_byte", "perplexity", "retrieval")
    shared = ("train",)
    kind, takes = DecoderConfig, "decoder"

    @property
    def steps(self) -> tuple[str, ...]:
        return ("train", "eval", "generate", "viz")

    def variant(self) -> dict[str, Any]:
        """The test data."""
        data = self.config.data
        return {"data": f"{data.path or 'embedded'}, {data.test_split}, {data.prompt} of {data.length}"}

    # Vocabulary

    @functools.cached_property
    def tokenizer(self) -> Any:
        """As other tasks on texts have it, or bytes.

        Raises:
            UserError: as those, or another kind.
        """
        kind = self.config.vocabulary.kind
        if kind not in VOCABULARIES:
            raise UserError(f"config.vocabulary.kind={kind!r}: must be one of {', '.join(VOCABULARIES)}")
        return ByteTokenizer(self.config.data.length) if kind == "bytes" and self.initial is None else self.learned

    @property
    def eos_id(self) -> int:
        """Of the end of a text."""
        ends = self.initial.config.eos_ids if self.initial is not None else ()
        found = next((index for index in (self.tokenizer.eos_id, *ends) if index is not None), None)
        if found is None:
            raise UserError(f"config.init={self.config.init}: has no token for the end of a text")
        return found

    # Models

    def build(self) -> api.Model:
        length, tokenizer = self.config.data.length, self.tokenizer
        given = {"vocab_size": tokenizer.vocab_size, "bos_id": None, "eos_ids": (self.eos_id,), "length": length}
        longest = self.config.model.max_length or length
        shape = shape_of(self.config.model, DecoderConfig, preset, **given, max_length=longest)
        if longest < length:
            raise UserError(f"config.model.max_length={longest}: must be at least config.data.length={length}")
        return api.build(shape, self.config.seed, preprocess=tokenizer)

    # Data

    def loader(self, split: str, *, train: bool) -> Any:
        config = self.config
        return causal.make(
            config.data,
            split,
            self.tokenizer,
            eos_id=self.eos_id,
            **self.share(train),
            train=train,
            seed=config.seed if train else 0,
        )

    def prompts(self, count: int) -> Int[np.ndarray, "B P"]:
        """The first tokens of so many examples of running text (of few: again from the first)."""
        task = self.test_loader().task
        there = int((task.group == 0).sum())
        rows = [task(index % there, np.random.default_rng(0))[0] for index in range(count)]
        return np.stack(rows)[:, : self.config.data.prompt]

    # Training

    def train(self) -> None:
        """Trains the network without its reducer, or goes on; the result lies in `workdir/model`.

        Raises:
            UserError: distillation without a model to start from, or of another reducer.
        """
        if self.config.distil.on:
            self.distil()
            return
        model = self.fresh().unreduced
        self.fit(model, self.loader("train", train=True), self.loss(model), self.evaluation(model))

    def distil(self) -> None:
        """Trains the shared norm and the projections of a SwiftKV, all else frozen."""
        name, _ = self.reduction()
        if name != "swiftkv" or self.initial is None:
            raise UserError(
                f"config.distil.on=True: needs config.reduce.name='swiftkv', got {name!r}, and a model in config.init"
            )
        model = self.fresh()
        if (layer := model.config.kv_layers) is None:
            raise UserError(f"config.reduce={self.reduction()[1]}: leaves all {model.config.depth} blocks as they are")
        frozen = *(f"model/{pattern}" for pattern in swiftkv.frozen(layer)), f"{TEACHER}/.*"
        data = self.loader("train", train=True)
        self.fit(model, data, self.distillation(model), self.evaluation(model), frozen=frozen)

    def parameters(self, model: api.Model) -> PyTree:
        """The teacher's too, in distillation."""
        if not self.config.distil.on or self.initial is None:
            return model.params
        return {**model.params, TEACHER: self.initial.unreduced.params["model"]}

    def with_parameters(self, model: api.Model, parameters: PyTree) -> api.Model:
        return model.with_params({name: parameters[name] for name in model.params})

    def distillation(self, model: api.Model) -> LossFn:
        """SwiftKV's loss, of all places of the texts."""
        assert self.initial is not None
        config, teacher = self.config.distil, self.initial.unreduced

        def forward(params, ids, keys) -> dict[str, Array]:
            own = {name: params[name] for name in model.params}
            out = model.forward(own, ids, key=keys, train=True, states=True)
            told = teacher.forward({"model": params[TEACHER], "reducers": {}}, ids, states=True)
            assert out.states is not None and told.states is not None
            features = out.states[-2].x, told.states[-2].x
            return swift_kv(out.logits, told.logits, *features, temperature=config.temperature)[1]

        run = self.by_rows(forward)

        def loss(params, batch, key):
            terms = run(params, batch["ids"], parallel.row_keys(key, len(batch["ids"])))
            metrics = {f"loss/{name}": value for name, value in terms.items()}
            return terms["logits"] + config.hidden * terms["hidden"], metrics

        return loss

    def loss(self, model: api.Model) -> LossFn:
        """The mean over examples of their labels' mean cross-entropy: few answers weigh as much as a whole text."""

        def forward(params, inputs, keys) -> dict[str, Array]:
            ids, labels = inputs
            return scored(model.forward(params, ids, key=keys, train=True).logits, labels)

        run = self.by_rows(forward)

        def loss(params, batch, key):
            own = {name: params[name] for name in model.params}
            keys = parallel.row_keys(key, len(batch["ids"]))
            found = run(own, (batch["ids"], batch["labels"]), keys)
            means = found["nats"] / jnp.maximum(found["count"], 1)
            metrics = {}
            for number, name in enumerate(causal.GROUPS):
                there = batch["group"] == number
                metrics[f"loss/{name}"] = jnp.where(there, means, 0).sum() / jnp.maximum(there.sum(), 1)
            return means.mean(), metrics

        return loss

    # Evaluation

    def whole(self, model: api.Model) -> Read:
        """From parameters and a batch to what is counted of every row, all tokens at once."""

        @jax.jit
        def read(params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
            return scored(model.forward(params, batch["ids"]).logits, batch["labels"])

        return read

    def continued(self, model: api.Model) -> Read:
        """The same of the tokens behind the prompt, given one by one through the cache that a reducer has left."""
        prompt, length = self.config.data.prompt, self.config.data.length

        @jax.jit
        def read(params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
            ids, labels = batch["ids"], batch["labels"][:, prompt - 1 : -1]
            first = model.prefill(params, ids[:, :prompt], capacity=length - prompt)
            later, _ = model.follow(params, first.cache, ids[:, prompt:-1])
            return scored(jnp.concatenate([first.logits[:, None], later], 1), labels)

        return read

    def totals(self, read: Read, params: PyTree, batches: Iterable[Mapping[str, Any]]) -> Float[np.ndarray, "n 4"]:
        """Nats, count, whether all was right, and group of every valid row."""
        rows = []
        for batch in batches:
            placed = self.placed(batch)
            found, group, valid = parallel.fetch(
                (read(params, {name: placed[name] for name in ("ids", "labels")}), placed["group"], placed["valid"])
            )
            columns = found["nats"], found["count"], found["right"], group
            rows.append(np.stack([np.asarray(column, np.float64) for column in columns], 1)[valid])
        return np.concatenate(rows)

    def summary(self, rows: Float[np.ndarray, "n 4"]) -> dict[str, Any]:
        """The metrics of rows as `totals` gives them; a byte of a BPE's text has less than a token."""
        nats, count, right, group = rows.T
        text, asked = group == 0, group == 1
        mean = nats[text].sum() / count[text].sum()
        found = {"bits_per_byte": mean / math.log(2) * self.test_loader().tokens_per_byte, "perplexity": math.exp(mean)}
        return {**found, "retrieval": float(right[asked].mean())} if asked.any() else found

    def evaluation(self, model: api.Model) -> Callable[[PyTree], Mapping[str, float]]:
        test, read = self.test_loader(), self.whole(model)

        def evaluate(params: PyTree) -> Mapping[str, float]:
            return self.summary(self.totals(read, self.with_parameters(model, params).params, test))

        return evaluate

    def evaluate(self, model: api.Model, name: str) -> dict[str, Any]:
        """The metrics behind the prompt, what the prompt's cache and reading cost, and how many texts counted.

        Of a model without reducers also `whole_bits_per_byte` and `whole_perplexity`, of all tokens of the texts.
        """
        rows = self.totals(self.continued(model), model.params, self.batches("test", name))
        row = {**self.summary(rows), **self.costs(model), "texts": len(rows)}
        if not model.methods:
            every = self.summary(self.totals(self.whole(model), model.params, self.batches("test", name)))
            row |= {f"whole_{name}": every[name] for name in ("bits_per_byte", "perplexity")}
        return row

    def costs(self, model: api.Model) -> dict[str, int]:
        """`macs` of reading one prompt, `macs_step` of a token behind it (the mean), `cache_bytes` of the prompt."""
        prompt, room = self.config.data.prompt, self.config.data.length - self.config.data.prompt
        model = model.with_config(length=prompt)
        return {
            "macs": model.cost(phase="prefill", tokens=room).total,
            "macs_step": model.cost(phase="decode", tokens=room).total // room,
            "cache_bytes": model.cache_bytes(),
        }

    def eval(self) -> None:
        """The metrics of the workdir's model behind a prompt, and of its unreduced form if it has reducers."""
        model, rows = self.model(), []
        base = model.unreduced
        for each in dict.fromkeys((base, model)):
            label = " + ".join(method.name for method in each.methods) or "unreduced"
            row = {"method": label, **self.evaluate(each, label)}
            report.append_jsonl(self.workdir / RESULTS, {**self._stamp("eval", base), **report.plain(row)})
            rows.append(row)
        whole = [f"whole_{name}" for name in ("bits_per_byte", "perplexity")]
        report.print_table(rows, ["method"], extra=[*self.metrics, *COSTS, *whole, "texts"], group=())

    # Going on

    def generate(self) -> None:
        """Goes on with the prompts of the config, or of a file, on the console; texts go to `generated.jsonl` too."""
        config, model = self.config.generate, self.model()
        names = ("max_tokens", "temperature", "top_k", "top_p")
        settings = {name: config[name] for name in names if config[name] is not None}
        key = jax.random.key(config.seed) if config.temperature else None
        for prompt in self.asked():
            print(prompt, end="", flush=True)
            with user_input():
                out = model.generate([prompt], key=key, stream=Console(model.preprocess.decode), **settings)
            text = model.preprocess.decode(np.asarray(out.ids[0, : int(out.length[0])]))
            report.append_jsonl(self.workdir / GENERATED, {"prompt": prompt, "text": text, **settings})

    def asked(self) -> Sequence[str]:
        """The prompts.

        Raises:
            UserError: no such file, or none in it.
        """
        config = self.config.generate
        if not config.file:
            return config.prompts
        return [text.decode() for text in texts.read_documents(Path(config.file).expanduser())]

    # Time

    def bench(self) -> None:
        """Times reading a prompt, and every token behind it, with the workdir's reducer and without."""
        model = self.model()
        label = " + ".join(method.name for method in model.methods)
        models = {"unreduced": model.unreduced} | ({label: model} if model.methods else {})
        rows = self.timed_rows(models)
        for row in rows:
            report.append_jsonl(self.workdir / RESULTS, {"mode": "bench", **row, **timing.device_summary()})
        report.print_table(rows, ["method"], extra=["batch", *TIMES], group="batch")

    def timed_rows(
        self, models: Mapping[str, api.Model], length: int | None = None, room: int | None = None
    ) -> list[dict[str, Any]]:
        """Milliseconds of reading a batch of prompts and of a step behind it, and speed-ups over the first model.

        All in one run, interleaved. A step is the mean over the tokens that there is room for.

        Args:
            models: by label.
            length: P, of prompts of random tokens; None: test prompts.
            room: G, of tokens behind them; None: as in the tests.
        """
        config, rows, data = self.config.bench, [], self.config.data
        room = data.length - data.prompt if room is None else room
        first = next(iter(models))
        for batch in config.batch_sizes:
            given = self.prompts(batch) if length is None else _random(batch, length, models[first].config.vocab_size)
            ids, runs = jnp.asarray(given), {}
            tokens = jnp.broadcast_to(ids[:, :1], (batch, room))
            for label, model in models.items():
                read = jax.jit(functools.partial(model.prefill, capacity=room))
                follow = jax.jit(lambda params, cache, ids, model=model: model.follow(params, cache, ids)[0])
                cache = read(model.params, ids).cache
                runs[f"{label} prefill"] = functools.partial(_logits, read, model.params, ids)
                runs[f"{label} step"] = functools.partial(follow, model.params, cache, tokens)
            with user_input():
                times = timing.interleaved(runs, repeats=config.repeats, min_seconds=config.seconds)
            for label in models:
                row: dict[str, Any] = {"method": label, "batch": batch}
                for part, count in (("prefill", 1), ("step", room)):
                    this = times[f"{label} {part}"]
                    row[f"{part}_ms"] = 1000 * this.median_s / count
                    row[f"{part}_speedup"] = timing.ratio(times[f"{first} {part}"], this)
                rows.append(row)
        return rows

    # Pictures

    def viz(self) -> None:
        """Which tokens of some prompts the layers' caches hold, and the curves of the training."""
        model, folder = self.model(), self.workdir / "pictures"
        if model.methods:
            viz.save_png(viz.shaded_tokens(self.kept(model)), folder / "kept.png")
        if curves := lines(self.workdir / "metrics.jsonl"):
            figure = viz.curves_plot(curves, ("loss/text", "loss/facts", *self.metrics), title=self.config.title)
            viz.save_png(figure, folder / "training.png")
        print(f"Pictures are in {folder}")

    def kept(self, model: api.Model, index: int | None = None) -> list[tuple[str, list[str], np.ndarray]]:
        """Test prompts, token by token, with the share of all layers' key heads whose cache holds each.

        Args:
            model: with a reducer.
            index: of one test example; None: as many as `config.viz.texts`, from the last on, which are questions.

        Returns:
            Number, tokens and shares of every example.
        """
        task = self.test_loader().task
        chosen = range(len(task) - 1, -1, -1)[: self.config.viz.texts] if index is None else [index]
        ids = np.stack(
            [task(i, self.test_loader().generator(0, AUGMENT, i))[0][: self.config.data.prompt] for i in chosen]
        )
        read = jax.jit(lambda params, ids: held(model.prefill(params, ids, capacity=0).cache))
        share = np.asarray(read(model.params, ids)).mean(0)
        decode = model.preprocess.decode
        return [
            (str(i), [decode([token]) for token in row], own) for i, row, own in zip(chosen, ids, share, strict=True)
        ]


def _random(batch: int, length: int, vocabulary: int) -> Int[np.ndarray, "B P"]:
    return np.random.default_rng(0).integers(0, vocabulary, (batch, length)).astype(np.int32)


def _logits(read: Callable[..., Any], params: PyTree, ids: Array) -> Array:
    return read(params, ids).logits


def scored(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> dict[str, Array]:
    """Of every row: `nats` of its labels (all but -100), their `count`, and whether all of them were the likeliest."""
    there, labels = labels != IGNORE, jnp.maximum(labels, 0)
    chances = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[..., None], -1)[..., 0]
    right = ((logits.argmax(-1) == labels) | ~there).all(1)
    return {"nats": -jnp.where(there, chances, 0).sum(1), "count": there.sum(1), "right": right}
