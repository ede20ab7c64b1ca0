"""DiffRate's search: counts, masks against pruning, gradients, padded rows, targets, and the table that is left."""

import dataclasses
import functools
import json
import time

from contract_setup import QUICK
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tokjax
from tokjax.bench.flops import vit_macs
from tokjax.hooks import losses
from tokjax.models.vit import Patches, ViTConfig, preset
from tokjax.reducers.vit import diffrate_search as search
from tokjax.reducers.vit.diffrate import DiffRate
from tokjax.reducers.vit.diffrate_search import DiffRateSearch

CFG = ViTConfig((32, 32), 8, width=16, depth=3, heads=2, num_classes=5)
MAE4 = dataclasses.replace(CFG, pooling="size_mean", fc_norm=True, depth=4)
NAFLEX = dataclasses.replace(CFG, position="naflex", class_token=False, pooling="mean")
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(3, 32, 32, 3)), jnp.float32)


def drawn(tree, scale=0.4, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32), tree)


def searching(cfg, slope=0.2, **settings):
    """A model with drawn parameters, in whose rates every operation leaves fewer tokens than the one before."""
    settings = {"target": 0.85, "granularity": 2, **settings}
    model = tokjax.build(cfg)
    model = model.with_params(drawn(model.params))
    reduced = tokjax.reduce(model, "diffrate_search", **settings)
    rates = drawn(reduced.params["reducers"], 0.2, 1)
    for j, stage in rates[0]["stages"].items():
        for number, name in enumerate(("prune", "merge"), 2 * j):
            stage[name] += slope * (number - 1) * jnp.arange(len(stage[name]))
    return model, reduced.with_params({**reduced.params, "reducers": rates})


def forward(model, inputs, **options):
    jitted = jax.jit(lambda p, x: model.forward(p, x, **options), compiler_options=QUICK)
    return jitted(model.params, inputs)


def table_of(model):
    return model.methods[0].reducer.table(model.params["reducers"][0])


@pytest.mark.parametrize(("patches", "kept"), [(196, 101), (256, 131)])
def test_rates_start_at_the_mean_candidate(patches, kept):
    info = dataclasses.replace(CFG.info, length=patches + 1)
    reducer = DiffRateSearch(info, target=0.9)
    assert reducer.table()["prune_kept"] == reducer.table()["merge_kept"] == [patches + 1, kept, kept]
    assert all(float(k) + 1 == kept for k in reducer.stages[0].kept())


def test_macs_are_those_of_the_published_formula():
    cfg = preset("s/16")
    reducer = DiffRateSearch(cfg.info, gmacs=2.9)
    table = reducer.table()
    counts = np.minimum.accumulate(np.minimum(table["prune_kept"], table["merge_kept"]))
    whole = {"width": 384, "patch": 16, "num_patches": 196, "convention": "diffrate"}
    assert table["gmacs"] * 1e9 == vit_macs([197, *counts[:-1]], counts, **whole)
    full = vit_macs([197] * 12, [197] * 12, **whole)
    assert table["target"] == pytest.approx(2.9e9 / full) and table["macs"] == table["gmacs"] * 1e9 / full
    gated = dataclasses.replace(cfg, mlp="swiglu", mlp_ratio=2.0).info
    assert gated.mlp_macs == 3 * 384 * 768 and cfg.info.mlp_macs == 8 * 384**2


@pytest.mark.parametrize(("cfg", "slope"), [(CFG, 0.2), (dataclasses.replace(MAE4, distilled=True), 0.2)])
def test_slots_keep_what_the_table_keeps(cfg, slope, tmp_path):
    model, reduced = searching(cfg, slope)
    table = table_of(reduced)
    counts = np.minimum.accumulate(np.minimum(table["prune_kept"], table["merge_kept"]))
    assert counts[-1] < cfg.info.length and any(
        p > m for p, m in zip(table["prune_kept"], table["merge_kept"], strict=True)
    )
    reduced.methods[0].reducer.write_table(tmp_path / "rates.json", reduced.params["reducers"][0])
    assert json.loads((tmp_path / "rates.json").read_text()) == table
    given = tokjax.reduce(model, "diffrate", rates=str(tmp_path / "rates.json"))
    pruned, found = (forward(each, IMAGES, trace=True) for each in (given, reduced))
    np.testing.assert_array_equal([layer.tokens[0] for layer in pruned.trace], counts)
    for a, b in zip(pruned.trace, found.trace, strict=True):  # the same tokens live on together
        np.testing.assert_array_equal(a.tokens, b.tokens)
        slots = a.slots, b.slots
        alive = [np.asarray(layer.origin) < n for layer, n in zip((a, b), slots, strict=True)]
        np.testing.assert_array_equal(*alive)
        together = [np.asarray(layer.origin)[:, :, None] == np.asarray(layer.origin)[:, None] for layer in (a, b)]
        both = alive[0][:, :, None] & alive[0][:, None]
        np.testing.assert_array_equal(together[0] & both, together[1] & both)
    np.testing.assert_allclose(found.logits, pruned.logits, atol=2e-5)
    assert np.abs(pruned.logits - forward(model, IMAGES).logits).max() > 1e-2


def test_learning_masks_keep_what_pruning_keeps():
    """Merged tokens have other sizes while it learns; those that are pruned have none."""
    model, reduced = searching(MAE4)
    rates = reduced.params["reducers"]
    for stage in rates[0]["stages"].values():
        stage["merge"] = jnp.zeros_like(stage["merge"]).at[0].set(20.0)
    reduced = reduced.with_params({**reduced.params, "reducers": rates})
    learning, table = reduced.learning(), table_of(reduced)
    masked = forward(learning, IMAGES)
    given = {name: tuple(table[name]) for name in ("prune_kept", "merge_kept")}
    pruned = forward(tokjax.reduce(model, "diffrate", **given), IMAGES)
    np.testing.assert_allclose(masked.logits, pruned.logits, atol=1e-4)
    np.testing.assert_array_equal(masked.tokens.gate.sum(1), min(table["prune_kept"]))
    assert min(table["prune_kept"]) < 14 and learning.token_counts() == (17,) * 4


@pytest.mark.parametrize("cfg", [CFG, MAE4])
def test_every_rate_has_a_gradient_from_the_logits_and_from_the_macs(cfg):
    _, reduced = searching(cfg)
    learning = reduced.learning()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(rates):
        def terms(rates):
            out = learning.forward({**learning.params, "reducers": rates}, IMAGES)
            return (out.logits * jnp.arange(5)).sum(), losses(out.tokens.aux)["flops"]

        return jax.jacrev(terms)(rates)

    unread = 2 * (cfg.pooling == "cls")  # counts: the head reads nothing of what the last block leaves but CLS
    for tree, without in zip(gradients(learning.params["reducers"]), (unread, 0), strict=True):
        leaves = jax.tree.leaves(tree)
        assert len(leaves) == 2 * (cfg.depth - 1 - (cfg.pooling != "cls"))
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        assert [bool(np.abs(leaf).max() > 0) for leaf in leaves] == [
            i < len(leaves) - without for i in range(len(leaves))
        ]
        np.testing.assert_allclose([leaf.sum() for leaf in leaves], 0, atol=2e-3)  # of a softmax


def test_a_padded_row_learns_what_the_row_alone_learns():
    cfg, shapes = NAFLEX, np.array([[4, 4], [3, 4], [2, 3], [1, 1]], np.int32)
    _, reduced = searching(cfg)
    learning = reduced.learning()
    values = np.random.default_rng(2).normal(size=(4, 16, 192)).astype(np.float32)
    inside = np.arange(16) < shapes.prod(1)[:, None]
    beside = Patches(np.where(inside[..., None], values, 9.0).astype(np.float32), inside, shapes)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params, patches):
        def loss(rates):
            logits = learning.forward({**params, "reducers": rates}, patches).logits
            return (logits * jnp.arange(5)).sum(-1), logits

        gradient, logits = jax.jacrev(loss, has_aux=True)(params["reducers"])
        return logits, gradient

    logits, gradient = both(learning.params, beside)
    assert np.isfinite(logits).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    for row in (1,):
        n = int(shapes[row].prod())
        alone = Patches(*(part[row : row + 1] for part in (values[:, :n], inside[:, :n], shapes)))
        own, slope = both(learning.params, alone)
        np.testing.assert_allclose(logits[row : row + 1], own, atol=2e-5)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
            np.testing.assert_allclose(a[row], b[0], atol=1e-4 * max(1.0, float(np.abs(b).max())))


def test_learning_comes_to_the_target():
    model, _ = searching(CFG)
    reduced = tokjax.reduce(model, "diffrate_search", target=0.92, granularity=1)
    learning, labels = reduced.learning(), jnp.array([0, 1, 2])
    optimiser = optax.adam(0.1)

    def loss(rates):
        out = learning.forward({**learning.params, "reducers": rates}, IMAGES)
        entropy = optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()
        return entropy + losses(out.tokens.aux)["flops"]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(rates, state):
        value, gradient = jax.value_and_grad(loss)(rates)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(rates, updates), state, value

    rates = learning.params["reducers"]
    state, values = optimiser.init(rates), []
    for _ in range(60):
        rates, state, value = step(rates, state)
        values.append(float(value))
    start, end = reduced.methods[0].reducer.table()["macs"], reduced.methods[0].reducer.table(rates[0])["macs"]
    assert abs(start - 0.92) > 0.09 and abs(end - 0.92) < 0.03
    assert np.mean(values[-5:]) < values[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": 0.3},
            r"target=0\.3: must be in 0\.7\d+ to 1, from the fewest tokens in all blocks but protected=\(0,\)",
        ),
        ({"target": 1.01}, r"target=1\.01: must be in 0\.\d+ to 1"),
        ({"target": float("nan")}, r"target=nan"),
        ({"gmacs": 1.0}, r"gmacs=1\.0: must be in 0\.000\d+ to 0\.000\d+"),
        ({"target": 0.8, "gmacs": 1.0}, r"target=0\.8, gmacs=1\.0: give one of the two"),
        ({"granularity": 0}, r"granularity=0: must be at least 1"),
        ({"weight": 0.0}, r"weight=0\.0: must be above 0"),
        ({"min_size": -1.0}, r"min_size=-1\.0: must be above 0"),
        ({"protected": (3,)}, r"protected=\(3,\): must be blocks of 0 to 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffRateSearch(CFG.info, **settings)


def test_tables_that_cannot_be(tmp_path):
    reducer = DiffRateSearch(CFG.info, target=0.85)
    bad = {"stages": {i: {"prune": jnp.zeros(4), "merge": jnp.zeros(4).at[1].set(jnp.nan)} for i in range(2)}}
    with pytest.raises(ValueError, match=r"1\.merge: 1 of its 4 logits are not finite"):
        reducer.table(bad)
    path = tmp_path / "rates.json"
    reducer.write_table(path)
    rates = DiffRate(rates=str(path))
    for change, message in (
        ({"depth": 4}, r"table for depth=3; this model has depth=4"),
        ({"length": 18}, "patches=16"),
    ):
        with pytest.raises(ValueError, match=message):
            rates.hooks(dataclasses.replace(CFG.info, **change))
    with pytest.raises(ValueError, match=r"depth=4: these rates were made for depth=3"):
        reducer.hooks(dataclasses.replace(CFG.info, depth=4))
    table = reducer.table()
    for change in ({"prune_kept": [9]}, {"merge_kept": [17, 9, 1]}, {"depth": "3"}, {"prefix": None}):
        path.write_text(json.dumps({**table, **change}))
        with pytest.raises(ValueError, match="rates="):
            DiffRate(rates=str(path))
    with pytest.raises(ValueError, match="no table of rates can be read there"):
        DiffRate(rates=str(tmp_path / "none.json"))


def test_what_was_learned_is_saved_and_comes_back(tmp_path):
    _, reduced = searching(CFG)
    tokjax.save(reduced, tmp_path)
    loaded = tokjax.load(tmp_path)
    for a, b in zip(*(jax.tree.leaves(each.params["reducers"]) for each in (loaded, reduced)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert table_of(loaded) == table_of(reduced)


def test_a_mask_leaves_shorter_sequences_alone():
    probability = jnp.linspace(1, 0, 6)[None]
    told = [search.kept_mask(jnp.float32(k), jnp.array([[4]]), probability) for k in (2, 4, 5)]
    np.testing.assert_array_equal(told[0], [[1, 1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(told[1], np.ones((1, 6)))
    np.testing.assert_array_equal(told[2], np.ones((1, 6)))


@pytest.mark.long
def test_learning_rates_costs_no_more_than_training():
    """The step of the rates alone, beside that of the whole network without them, in turns."""
    cfg = ViTConfig((32, 32), 4, width=96, depth=12, heads=3, num_classes=10)
    model = tokjax.build(cfg)
    learning = tokjax.reduce(model, "diffrate_search", target=0.6).learning()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32, 32, 3)), jnp.float32)
    labels = jnp.arange(64) % 10

    def entropy(out):
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()

    def loss(rates, params):
        out = learning.forward({**params, "reducers": rates}, images)
        return entropy(out) + losses(out.tokens.aux)["flops"]

    masked, plain = (
        jax.jit(jax.value_and_grad(loss)),
        jax.jit(jax.value_and_grad(lambda p: entropy(model.forward(p, images)))),
    )
    runs = {
        "masked": lambda: masked(learning.params["reducers"], learning.params),
        "plain": lambda: plain(model.params),
    }
    times = {name: [] for name in runs}
    for _ in range(8):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    ratios = np.array(times["masked"][1:]) / np.array(times["plain"][1:])
    print({name: np.median(each[1:]) for name, each in times.items()}, np.median(ratios), ratios)
    assert np.median(ratios) <= 1.15
