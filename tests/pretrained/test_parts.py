"""Checkpoints that are read part by part: the same arrays, and no more of a file than a part holds."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_decoder

import tokjax
from tokjax import api, parallel
from tokjax.models.dual import DualConfig
from tokjax.models.text import TextConfig
from tokjax.models.vit import ViTConfig
from tokjax.pretrained.names import Leaf

VIT = ViTConfig(image_size=(16, 16), patch_size=4, width=16, depth=2, heads=2, num_classes=4, mlp_ratio=2)


class Spied:
    """A stored tensor that counts what is read of it."""

    def __init__(self, array):
        self.array, self.shape, self.read = array, array.shape, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        self.read += self.array[index].size
        return self.array[index]


@pytest.mark.parametrize(
    ("kind", "transposed", "stored", "shape"),
    [
        ("linear", True, [(6, 4), (6, 4), (12, 4)], (4, 24)),
        ("linear", False, [(6,), (6,)], (12,)),
        ("matrix", False, [(4, 6)], (4, 6)),
        ("array", False, [(5, 6)], (5, 6)),
    ],
)
def test_a_part_reads_what_it_holds(kind, transposed, stored, shape):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=each).astype(np.float32) for each in stored]
    leaf = Leaf(tuple(map(str, range(len(stored)))), (1,) * len(stored), kind, transposed)
    whole = np.empty(shape, np.float32)
    leaf.decode(arrays, whole, VIT)
    for start, stop in ((0, 2), (1, 4), (2, 3)):
        index = tuple(slice(size * start // 4, size * stop // 4) for size in shape)
        spied = [Spied(array) for array in arrays]
        found = leaf.decode_part(spied, shape, index, VIT)
        np.testing.assert_array_equal(found, whole[index])
        assert found.dtype == np.float32 and sum(each.read for each in spied) == found.size


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (VIT, {"image_size": (24, 24)}),
        (VIT, {"scan": True}),
        (dataclasses.replace(tiny_decoder.TINY, width=16, hidden=32, head_width=8, depth=2), {}),
        (
            DualConfig(
                dataclasses.replace(
                    VIT, num_classes=16, head_bias=False, pre_norm=True, patch_bias=False, gelu="quick"
                ),
                TextConfig(vocab_size=32, length=8, width=16, depth=1, heads=2, embed_dim=16),
            ),
            {},
        ),
    ],
    ids=["positions", "stacked", "decoder", "towers"],
)
def test_straight_into_shards(tmp_path, config, options):
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    api.save(api.build(config), tmp_path)
    whole = tokjax.load(tmp_path, **options)
    split = tokjax.load(tmp_path, sharding=parallel.placing(mesh), **options)
    wanted = parallel.of_model(mesh, whole)
    for found, expected, where in zip(*map(jax.tree.leaves, (split.params, whole.params, wanted)), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(where, found.ndim)
