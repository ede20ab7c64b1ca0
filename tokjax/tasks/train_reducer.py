"""Training with a reducer: one that learns (its rates, gates, predictors), or a network that gets used to fewer tokens.

The loss is the classifier's, plus the terms that the reducer itself adds, plus, where they are asked for, the
distillation losses of DynamicViT (Rao et al., NeurIPS 2021, section 3.3) from the unreduced model that training starts
from. While it learns a reducer has its training form (`tokjax.Model.learning`); what is evaluated and saved is the
plain one, which prunes.
"""

from collections.abc import Mapping
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree
import ml_collections
from ml_collections import config_dict

from tokjax import api, budget, data, parallel, reducers
from tokjax.errors import UserError
from tokjax.hooks import LOSS, losses
from tokjax.models.transformer import Output
from tokjax.tasks import classify
from tokjax.tasks.classify import Classify, share
from tokjax.tasks.experiment import user_input
from tokjax.token_map import rows
from tokjax.train.losses import cross_entropy, distillation, token_distillation
from tokjax.train.state import STATISTICS, LossFn

__all__ = ["TrainReducer", "default_config"]

RATES = "rates.json"
TEACHER = "teacher"  # its parameters travel with those that are trained, frozen, so that checkpoints hold them


def default_config() -> ml_collections.ConfigDict:
    """Every field of a training with a reducer, with its meaning; `reduce` names the reducer and its settings."""
    config = classify.default_config()
    config.task = "train_reducer"
    config.learn = learn = ml_collections.ConfigDict()
    learn.network = True  # whether the network is trained too
    learn.head = True  # whether its head is
    learn.network_lr_scale = 1.0  # what the learning rate is multiplied by, for the network and its head
    learn.reducer_lr_scale = 1.0  # the same for the reducer's own parameters
    learn.macs = config_dict.placeholder(float)  # share of the MACs that the reducer's knob is turned to beforehand
    learn.logits = ml_collections.ConfigDict({"weight": 0.0, "temperature": 1.0})  # distillation of the classes
    learn.tokens = ml_collections.ConfigDict({"weight": 0.0})  # and of the tokens that are kept to the end
    config.ramp = ramp = ml_collections.ConfigDict()  # lowers the reducer's knob on the way; no knob: it stands still
    ramp.start = 0  # step up to which the first value holds
    ramp.steps = 0  # steps from there on that the other values share in equal parts; the last one then stays
    ramp.knob = ()  # its values, such as keep rates (1.0, 0.9, 0.8, 0.7); the last is what is evaluated
    return config


class TrainReducer(Classify):
    """Any registered reducer on any classifier, from `config.init` or from scratch."""

    @property
    def steps(self) -> tuple[str, ...]:
        return "train", "eval"

    @functools.cached_property
    def _reduction(self) -> tuple[str, dict[str, Any]]:
        name, settings = super().reduction()
        if not name:
            raise UserError(f"config.reduce.name is empty; it must be one of {', '.join(sorted(reducers.REGISTRY))}")
        macs, values = self.config.learn.macs, tuple(self.config.ramp.knob)
        with user_input():
            knob = reducers.entry(name).knob.field
            if values and (macs is not None or settings.get(knob, values[-1]) != values[-1]):
                raise UserError(f"config.ramp.knob={values}: sets {knob}, which nothing else may set beside it")
            if values:
                return name, {**settings, knob: values[-1]}
            if macs is None:
                return name, settings
            if reducers.entry(name).knob.learned:  # training turns it
                return name, {**settings, knob: macs}
            model = self.build() if self.initial is None else self.initial.unreduced
            found = budget.solve(name, model, macs=macs, **settings)
        if found.unreachable:
            raise UserError(f"config.learn.macs={macs}: {name} {found.unreachable}")
        return name, found.settings

    def reduction(self) -> tuple[str, dict[str, Any]]:
        """The reducer with the knob that `learn.macs` or the end of the ramp gives it.

        Raises:
            UserError: no reducer, a target out of reach, or two settings for one knob.
        """
        return self._reduction

    @property
    def teacher(self) -> api.Model | None:
        """The unreduced starting model, where anything is distilled from it.

        Raises:
            UserError: nothing to start from.
        """
        learn = self.config.learn
        if not (learn.logits.weight or learn.tokens.weight):
            return None
        if self.initial is None:
            raise UserError("config.init is empty: learn.logits and learn.tokens distil from the model named there")
        return self.initial.unreduced

    def parameters(self, model: api.Model) -> PyTree:
        """The teacher's too, where there is one."""
        return model.params if self.teacher is None else {**model.params, TEACHER: self.teacher.params["model"]}

    def with_parameters(self, model: api.Model, parameters: PyTree) -> api.Model:
        return model.with_params({name: parameters[name] for name in model.params})

    def model(self) -> api.Model:
        """As of any experiment; counts that were searched are fixed, so that they cost what they should."""
        with user_input():
            return super().model().settled()

    # Training

    def learn(self, model: api.Model, loader: data.Loader) -> None:
        config, learn = self.config, self.config.learn
        if self.initial is not None and self.initial.config.num_classes != model.config.num_classes:
            old, new = self.initial.config.num_classes, model.config.num_classes
            if self.teacher is not None:
                raise UserError(f"config.init={config.init}: has {old} classes, no teacher for data of {new}")
            if not learn.head:
                raise UserError(f"config.learn.head=False: the data have {new} classes, so that the head is a new one")
        rules = {
            "logits.weight": (learn.logits.weight >= 0, "at least 0"),
            "logits.temperature": (learn.logits.temperature > 0, "above 0"),
            "tokens.weight": (learn.tokens.weight >= 0, "at least 0"),
            "network_lr_scale": (learn.network_lr_scale >= 0, "at least 0"),
            "reducer_lr_scale": (learn.reducer_lr_scale >= 0, "at least 0"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UserError(f"config.learn.{name} is {operator.attrgetter(name)(learn)}; it must be {allowed}")
        stages = [(first, self.stage(model, value)) for first, value in self.ramp()]
        for _, stage in stages:
            _check_losses(stage)
        fitted = self.fit(
            model,
            loader,
            [(first, self.loss(stage)) for first, stage in stages],
            self.evaluation(model),
            frozen=self.frozen(),
            scales=self.scales(model),
        )
        self.write_tables(fitted)

    def write_tables(self, model: api.Model) -> None:
        """Counts that were searched go to `workdir/rates.json` too, which `diffrate` reads."""
        for i, method in enumerate(model.methods):
            if hasattr(method.reducer, "write_table") and jax.process_index() == 0:
                method.reducer.write_table(self.workdir / RATES, model.params["reducers"][i])
                print(f"The rates are in {self.workdir / RATES}", flush=True)

    def ramp(self) -> list[tuple[int, Any]]:
        """First step and value of the knob of every stage; None: as it is.

        Raises:
            UserError: steps that do not fit the values, or the run.
        """
        ramp, total = self.config.ramp, self.config.train.total_steps
        values = tuple(ramp.knob)
        if not values:
            return [(0, None)]
        if ramp.start < 0 or ramp.steps < 0 or ramp.start + ramp.steps > total:
            raise UserError(
                f"config.ramp.start={ramp.start}, steps={ramp.steps}: must be at least 0 and end in {total} steps"
            )
        later = len(values) - 1
        firsts = [0, *(ramp.start + ramp.steps * i // later for i in range(later))] if later else [0]
        stages = dict(zip(firsts, values, strict=True))  # of stages without a step the last one counts
        return list(stages.items())

    def stage(self, model: api.Model, value: Any) -> api.Model:
        """The model as it learns at this value of the knob.

        Raises:
            UserError: at this value the reducer has other parameters than at the last one.
        """
        name, settings = self.reduction()
        if value is not None:
            knob = reducers.entry(name).knob.field
            with user_input():
                reduced = api.reduce(model.unreduced, name, **{**settings, knob: value})
            shapes = [jax.tree.map(jnp.shape, each.params) for each in (reduced, model)]
            if shapes[0] != shapes[1]:
                raise UserError(f"config.ramp.knob: with {knob}={value} {name} has other parameters than at the end")
            model = reduced.with_params(model.params)
        with user_input():
            return model.learning()

    def frozen(self) -> tuple[str, ...]:
        """Patterns of what `learn` does not train."""
        learn, found = self.config.learn, []
        if not learn.network:
            found.append("model/(?!head).*")
        if not learn.head:
            found.append("model/head.*")
        if self.teacher is not None:
            found.append(f"{TEACHER}/.*")
        return tuple(found)

    def loss(self, model: api.Model) -> LossFn:
        """Of a model in its training form; every term is a metric, its weight included."""
        teacher, learn = self.teacher, self.config.learn
        by_tokens = learn.tokens.weight > 0

        def forward(params, inputs, keys) -> dict[str, Any]:
            own = {name: params[name] for name in model.params}
            out = model.forward(own, inputs, key=keys, train=True, trace=by_tokens)
            # Moving statistics are not one a row: each part gives its own, as one.
            statistics = jax.tree.map(lambda x: x[None], model.statistics(out.tokens.aux))
            ran = {"logits": out.logits, "terms": losses(out.tokens.aux), "statistics": statistics}
            ran["told"] = told_numbers(out.tokens.aux)
            if teacher is not None:
                told = teacher.forward({"model": params[TEACHER]}, inputs)
                ran["teacher"] = told.logits
                if by_tokens:
                    ran["tokens"] = (*kept_tokens(out, model.info.prefix), told.features[:, model.info.prefix :])
            return ran

        run = self.by_rows(forward)

        def loss(params, batch, key):
            valid, inputs = batch["valid"], self.inputs(model, batch)
            ran = run(params, inputs, parallel.row_keys(key, len(valid)))
            terms = {"cross_entropy": cross_entropy(ran["logits"], batch["label"], valid)}
            terms |= {name: mean(value, valid) for name, value in ran["terms"].items()}
            if learn.logits.weight:
                value = distillation(ran["logits"], ran["teacher"], valid, learn.logits.temperature)
                terms["distillation"] = learn.logits.weight * value
            if by_tokens:
                tokens, kept, told = ran["tokens"]
                terms["token_distillation"] = learn.tokens.weight * token_distillation(tokens, told, kept, valid)
            metrics = {f"loss/{name}": value for name, value in terms.items()}
            metrics |= {f"reducer/{name}": value for name, value in ran["told"].items()}
            if ran["statistics"]:
                metrics[STATISTICS] = jax.tree.map(lambda x: x.mean(0), ran["statistics"])
            return sum(terms.values()), {"accuracy": share(ran["logits"], batch), **metrics}

        return loss


def kept_tokens(out: Output, prefix: int) -> tuple[Float[Array, "B P C"], Bool[Array, "B P"]]:
    """What became of every patch at the input: the final features of its slot, and whether it is still there.

    Args:
        out: of a traced forward pass. A reducer that masks tells its last decision in its aux as `decision`.
        prefix: tokens before the patches.
    """
    origin = out.tokens.origin
    assert origin is not None
    kept = origin < out.features.shape[1]
    told = [noted["decision"] for noted in out.tokens.aux.values() if "decision" in noted]
    if told:
        kept &= jnp.pad(told[-1] > 0.5, ((0, 0), (prefix, 0)), constant_values=True)[:, : kept.shape[1]]
    features = rows(out.features, jnp.where(kept, origin, 0))
    return features[:, prefix:], kept[:, prefix:]


def told_numbers(aux: Mapping[str, Mapping[str, Any]]) -> dict[str, Float[Array, ""]]:
    """What reducers note of themselves for the curves of a training: scalars, and `kept`, tokens block by block."""
    found: dict[str, Array] = {}
    for noted in aux.values():
        for name, value in noted.items():
            if isinstance(value, Mapping):  # such as moving statistics
                continue
            if name == "kept" and jnp.ndim(value) == 1:
                found |= {f"kept/{block:02d}": jnp.float32(value[block]) for block in range(len(value))}
            elif not name.startswith(LOSS) and jnp.ndim(value) == 0:
                found[name] = jnp.float32(value)
    return found


def mean(term: Float[Array, "*B"], valid: Bool[Array, "B"]) -> Float[Array, ""]:
    """A term of a reducer: as it is, or the mean over the valid rows."""
    if not term.ndim:
        return term
    return jnp.where(valid, term, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def _check_losses(model: api.Model) -> None:
    """Refuses a reducer that would not learn as it should.

    Raises:
        UserError: a term that its entry in the registry promises does not arrive.
    """

    def terms(params: Mapping[str, Any], inputs: PyTree) -> dict[str, Array]:
        return losses(model.forward(params, inputs, key=jax.random.key(0), train=True).tokens.aux)

    found = jax.eval_shape(terms, model.params, model.config.example(2))
    for method in model.methods:
        registered = reducers.REGISTRY.get(method.name)
        for name in () if registered is None else registered.losses:
            if name not in found:
                raise UserError(
                    f"{method.name} has no loss term {name!r} with the settings {dict(method.settings)}: it would not "
                    f"learn what it is for; there are {', '.join(found) or 'none'}"
                )
