"""Where a model lets reducers in. A method is a list of hooks; hooks at one site run in list order."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, Protocol, get_args

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import token_map
from tokjax.signals import Signals
from tokjax.tokens import Tokens

Where = Literal[
    "input",  # once, on the embedded tokens
    "before_block",
    "attend",  # changes the block's attention: `attend(tokens, signals) -> Signals` (rule, policy, weights, bias)
    "after_attention",  # on the residual stream, between attention and MLP
    "after_block",
    "around_attention",  # reduce, run, unmerge
    "around_cross_attention",
    "after_cross_attention",  # on a decoder's tokens, with the signals of its attention to the encoder
    "around_mlp",
    "readout",  # `readout(states) -> [B,C] | Logits`: a head that reads the tokens after every block
    "before_llm",  # on the tokens of an encoder, before they enter a language model
    "after_prefill",  # on a KV cache: `call(cache, tokens) -> Cache`, once the prompt is read
    "decode_step",  # the same after every token: `call(cache, weights) -> Cache`, of shapes that stay
    "depth",  # which blocks run: `call(column, prompt, end) -> Bool[L, *column]`, see `models.decoder`
]
CROSS: frozenset[Where] = frozenset({"around_cross_attention", "after_cross_attention"})


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What a method may know of a model to lay out its hooks; all static."""

    depth: int
    width: int
    heads: int
    length: int  # N at the input, prefix included
    prefix: int = 0
    grid: tuple[int, int] | None = None
    pooling: str = "cls"  # what the head reads: "cls", "mean", "size_mean", "cls_mean" or "map"
    sites: frozenset[str] = frozenset(get_args(Where))
    classes: int = 0  # 0: no classifier
    patch: int = 0  # values that a patch is embedded from; 0: no patches
    mlp: int = 0  # multiply-accumulates of an MLP for one token; 0: those of one four times as wide as the model
    decoder_depth: int = 0  # blocks with cross-attention, where they are a stack of their own

    @property
    def mlp_macs(self) -> int:
        return self.mlp or 8 * self.width**2


class Logits(struct.PyTreeNode):
    """What a `readout` gives that is a classifier of its own: in place of the model's logits, not of its pooling.

    `aux` is collected as that of a plan. Under "statistics" it may have new values of the reducer's moving statistics,
    a part of the tree of its parameters; see `tokjax.api.Model.statistics`.
    """

    value: Float[Array, "B K"]
    aux: Mapping[str, Any] = struct.field(default_factory=dict)


# What a plan's aux has below it, of shape [] or [B], is a term of the training loss, its weight included.
LOSS = "loss/"


class Reducer(Protocol):
    """A frozen dataclass of hyper-parameters (static, hashable), or an NNX module if it learns.

    One whose model is another has `change(model)`, which `tokjax.reduce` calls first and which gives that one.
    """

    def hooks(self, info: ModelInfo) -> "list[Hook]":
        """Turns the method's schedule into per-layer settings."""
        ...


@dataclasses.dataclass(frozen=True)
class Hook:
    """Calls `reducer.<call>(tokens, signals)` at a site; it holds the reducer itself, so that equal hooks are equal.

    By convention `plan` decides which tokens stay; calls of other names prepare that, or bring tokens back.
    """

    where: Where
    layer: int
    reducer: Any
    call: str = "plan"

    def __call__(self, *args):
        with jax.named_scope(f"reducer.{type(self.reducer).__name__}"):
            return getattr(self.reducer, self.call)(*args)


def at(hooks: Sequence[Hook], where: Where, layer: int = 0) -> list[Hook]:
    return [hook for hook in hooks if hook.where == where and hook.layer == layer]


def reducing(hooks: Sequence[Hook]) -> tuple[int, ...]:
    """The blocks with a hook that decides which tokens stay, in ascending order."""
    return tuple(sorted({hook.layer for hook in hooks if hook.call == "plan" and hook.where != "input"}))


def check(hooks: Sequence[Hook], info: ModelInfo) -> None:
    """Refuses hooks that this model would never call.

    Raises:
        ValueError: a site that the model does not have, or a layer outside of it.
    """
    for hook in hooks:
        name = type(hook.reducer).__name__
        if hook.where not in info.sites:
            raise ValueError(f"{name} hooks in at {hook.where!r}; this model has {', '.join(sorted(info.sites))}")
        depth = info.decoder_depth if info.decoder_depth and hook.where in CROSS else info.depth
        if not 0 <= hook.layer < depth:
            raise ValueError(f"{name} hooks in at layer {hook.layer}; this model has layers 0 to {depth - 1}")


def reduce(
    hooks: Sequence[Hook], where: Where, layer: int, tokens: Tokens, signals: Signals, then: Where | None = None
) -> tuple[Tokens, Signals]:
    """Runs the hooks of one site; signals follow the tokens for the next hook here and those at the site `then`."""
    here = at(hooks, where, layer)
    for i, hook in enumerate(here):
        plan = hook(tokens, signals)
        if plan is None:
            continue
        before, tokens = tokens, _note(hook, plan.aux, _applied(hook, plan, tokens))
        if here[i + 1 :] or (then is not None and at(hooks, then, layer)):
            with _scope(hook):
                signals = follow(signals, plan, before, tokens)
    return tokens, signals


def follow(signals: Signals, plan: token_map.Plan, before: Tokens, after: Tokens) -> Signals:
    """The signals of the tokens that a plan leaves: queries, keys and values move as features do.

    Maps over pairs and log-sum-exps do not survive a change of the keys; appended tokens have no signals at all.
    """
    if plan.append is not None:
        return Signals(context=signals.context)
    if plan.map is None or signals.key is None:
        return signals
    bias, policy = after.attention_bias(), signals.policy
    moved = {name: token_map.move(plan, signals.need(name), before.size)[0] for name in ("query", "key", "value")}
    return signals.replace(
        **moved,
        bias=None if bias is None else bias[:, None, None],
        policy=None if policy is None else token_map.rows(policy, plan.map.anchor),
        lse=None,
        weights=None,
        pair_bias=None,
    )


def attend(hooks: Sequence[Hook], layer: int, tokens: Tokens, signals: Signals) -> Signals:
    """What the attention of this block uses after its `attend` hooks."""
    for hook in at(hooks, "attend", layer):
        signals = hook(tokens, signals)
    return signals


def around(
    hooks: Sequence[Hook],
    where: Where,
    layer: int,
    tokens: Tokens,
    signals: Signals,
    run: Callable[[Tokens], Float[Array, "B M C"]],
) -> tuple[Float[Array, "B N C"], Tokens]:
    """Reduces, runs, un-merges: the output of `run` at full length, and the tokens with what the plans left behind."""
    here = at(hooks, where, layer)
    if not here:
        return run(tokens), tokens
    hook, others = here[0], [h for h in hooks if h is not here[0]]
    plan = hook(tokens, signals)
    if plan is None:
        return around(others, where, layer, tokens, signals, run)
    y, inner = around(others, where, layer, _applied(hook, plan, tokens), signals, run)
    if plan.map is not None:
        with _scope(hook):
            y = plan.map.unmerge(y)
    return y, _note(hook, plan.aux, tokens.replace(carry=inner.carry, aux=inner.aux))


def readout(
    hooks: Sequence[Hook], states: tuple[Tokens, ...], tokens: Tokens
) -> tuple[Float[Array, "B C"] | None, Float[Array, "B K"] | None, Tokens]:
    """What the first `readout` hook reads of the tokens after every block: pooled features or logits, None without one.

    `tokens` come back with what it noted.
    """
    here = at(hooks, "readout")
    if not here:
        return None, None, tokens
    read = here[0](states)
    if isinstance(read, Logits):
        return None, read.value, _note(here[0], read.aux, tokens)
    return read, None, tokens


def losses(aux: Mapping[str, Mapping[str, Any]]) -> dict[str, Float[Array, "*B"]]:
    """The terms that the reducers of a model add to its training loss, by name, each summed over the sites.

    Args:
        aux: `out.tokens.aux` of a forward pass: for every site what its plan noted; `loss/<name>` there is a term.

    Returns:
        float32, of shape [] for the whole batch, or [B] for every row of it.
    """
    terms: dict[str, Array] = {}
    for noted in aux.values():
        for name, value in noted.items():
            if name.startswith(LOSS):
                term = name.removeprefix(LOSS)
                terms[term] = terms.get(term, 0.0) + jnp.asarray(value, jnp.float32)
    return terms


def _scope(hook: Hook):
    return jax.named_scope(f"reducer.{type(hook.reducer).__name__}")


def _applied(hook: Hook, plan: token_map.Plan, tokens: Tokens) -> Tokens:
    with _scope(hook):
        return token_map.apply(plan, tokens)


def _note(hook: Hook, aux: Mapping[str, Any], tokens: Tokens) -> Tokens:
    if not aux:
        return tokens
    site = f"{hook.layer:02d}.{hook.where}.{type(hook.reducer).__name__}"
    name, again = site, 2
    while name in tokens.aux:  # two hooks of one kind at one site
        name, again = f"{site}.{again}", again + 1
    return tokens.replace(aux={**tokens.aux, name: dict(aux)})
