"""K-Medoids: of every cluster of tokens, the most central one stays.

Source: JoakimHaurum/TokenReduction, `models/kmedoids.py` (Haurum et al., "Which Tokens to Use?", ICCVW 2023), after
        Marin et al., "Token Pooling in Vision Transformers", WACV 2023 (arXiv 2110.03860).
Kind:   hard cluster selection, training-free; static length.
Needs:  all attention rows of the block before the location (the attention that each token receives).

Steps, on the patch tokens:
1. Start: the tokens that receive most attention; without attention, a first token and then, one by one, the token
   farthest from any centre.
2. Three times: every token goes to its nearest centre, the first on ties; of each cluster the token with the smallest
   weight * (sum of its distances) becomes the centre.
3. The centres stay, unchanged; the map remembers which cluster every token went to.

Where we follow the code:
- The sum of distances runs over all tokens, not over the cluster, and the weight is the received attention, so that
  much attention makes a token less likely to be chosen.
- The farthest-point start takes the token with the largest *maximum* distance to the centres.
- A cluster without members takes token 0. Centres can coincide; the later ones are copies.
- The first token is drawn at random there; here it is `first`.

The hook stands behind the block before the location, where the tokens are the same and the attention is at hand.
Rows with padding are not supported. Cost: n^2 C for the distances, and as much for the attention rows.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.hooks import Hook, ModelInfo
from tokjax.reducers.vit.dpcknn import distances, nearest
from tokjax.reducers.vit.staged import Tabled
from tokjax.signals import Signals, column_mean
from tokjax.token_map import Plan, SoftMap, behind_prefix, first_true, rows
from tokjax.tokens import Tokens

Start = Literal["attention", "farthest"]


def farthest(distance: Float[Array, "B n n"], k: int, first: int = 0) -> Int[Array, "B k"]:
    """Step 1 without attention."""

    def row(distance):
        centres = jnp.zeros(k, jnp.int32).at[0].set(first)

        def add(i, state):
            centres, far = state
            new = far.argmax().astype(jnp.int32)
            far = jnp.maximum(far, distance[new])
            centres = centres.at[i].set(new)
            chosen = jnp.where(jnp.arange(k) <= i, centres, distance.shape[0])
            return centres, far.at[chosen].set(0, mode="drop")

        return jax.lax.fori_loop(1, k, add, (centres, distance[first].at[first].set(0)))[0]

    return jax.vmap(row)(distance)


def medoids(
    z: Float[Array, "B n C"],
    k: int,
    weight: Float[Array, "B n"] | None = None,
    *,
    iters: int = 3,
    first: int = 0,
) -> tuple[Int[Array, "B k"], Int[Array, "B n"]]:
    """Steps 1 and 2: the centres, and the cluster of every token.

    Args:
        z: tokens without the prefix.
        k: centres.
        weight: None: one each, with the farthest-point start.
        iters: of step 2.
        first: token of the farthest-point start.
    """
    apart = distances(z)
    cost = apart.sum(-1)
    if weight is None:
        centres = farthest(apart, k, first)
    else:
        centres = jnp.argsort(-weight, axis=-1, stable=True)[:, :k]
        cost = weight * cost
    for _ in range(iters):
        member = nearest(rows(apart, centres))[:, None] == jnp.arange(k)[:, None]
        own = jnp.where(member, cost[:, None], jnp.inf)
        # An empty cluster has no finite cost: all are equal, and token 0 is the first.
        centres = first_true(own == own.min(-1, keepdims=True))
    return centres, nearest(rows(apart, centres))


@dataclasses.dataclass(frozen=True)
class KMedoids(Tabled):
    """Medoids before some blocks; settings as of `Tabled`.

    Attributes:
        start: "attention" or "farthest"; a location at block 0 has no attention before it.
        iters: of the alternation, 3 in the benchmark.
        first: token of the farthest-point start.
    """

    start: Start = "attention"
    iters: int = 3
    first: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.start not in get_args(Start):
            raise ValueError(f"start={self.start!r}: must be one of {', '.join(get_args(Start))}")
        if self.iters < 1:
            raise ValueError(f"iters={self.iters}: must be at least 1")
        if self.first < 0:
            raise ValueError(f"first={self.first}: must be at least 0")

    def hooks(self, info: ModelInfo) -> list[Hook]:
        def moved(hook: Hook) -> Hook:
            if self.start == "attention" and hook.layer > 0:
                return Hook("after_block", hook.layer - 1, hook.reducer)
            return dataclasses.replace(hook, reducer=dataclasses.replace(hook.reducer, start="farthest"))

        return [moved(hook) for hook in self.located(info)]

    def plan(self, tokens: Tokens, signals: Signals) -> Plan | None:
        p, n, k = tokens.prefix, tokens.length - tokens.prefix, self.most(tokens)
        if tokens.valid is not None:
            raise ValueError("tokens.valid: K-Medoids takes no padded rows")
        if k >= n:
            return None
        weight = None
        if self.start == "attention":
            weight = jax.lax.stop_gradient(column_mean(signals))[:, p:]
        centres, to = medoids(tokens.x[:, p:], k, weight, iters=self.iters, first=min(self.first, n - 1))
        assigned = jax.nn.one_hot(to, k, axis=1)
        return Plan(behind_prefix(SoftMap(assigned, centres), p), how="keep")
