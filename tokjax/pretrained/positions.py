"""Resizes tables of learned positions to another grid, with the numbers of the frameworks that trained them.

Checkpoints are read at another image size by interpolating their position table, and the published code does so in four
ways, which differ by up to a few percent of a row's norm:

* timm and Hugging Face's DINOv2 with registers: bicubic with anti-aliasing;
* the DeiT and MAE scripts and Hugging Face's `vit`, `deit`, `clip`, `siglip`, `dinov2`: bicubic without;
* SigLIP2 NaFlex: bilinear with anti-aliasing;
* Evo-ViT, ATS and the AugReg `.npz` reader: bilinear without.

All four follow `torch.nn.functional.interpolate(..., align_corners=False)`. `jax.image.resize` has all of them but
bicubic without anti-aliasing (jax uses Keys' kernel with a = -0.5 and renormalises at the edge, torch uses a = -0.75
and repeats the edge row), so every mode is written here as two small dense matrices, one per axis; nothing is compiled.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

Method = Literal["bicubic", "bilinear"]

_RADIUS = {"bilinear": 1, "bicubic": 2}


def _kernel(distance: np.ndarray, method: Method, a: float) -> np.ndarray:
    """The triangle, or Keys' cubic convolution kernel with parameter `a` (IEEE TASSP 1981)."""
    t = np.abs(distance)
    if method == "bilinear":
        return np.maximum(1 - t, 0)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def resize_matrix(old: int, new: int, method: Method = "bicubic", antialias: bool = False) -> np.ndarray:
    """The linear map that resizes one axis.

    Args:
        old: length of the axis.
        new: length after resizing.
        method: "bicubic" or "bilinear".
        antialias: whether the kernel widens when the axis shrinks.

    Returns:
        float64 `[new, old]`; every row sums to one.

    Raises:
        ValueError: an unknown method, or a length below one.
    """
    if method not in _RADIUS:
        raise ValueError(f"method = {method!r} is unknown; allowed are {', '.join(map(repr, sorted(_RADIUS)))}.")
    if old < 1 or new < 1:
        raise ValueError(f"An axis of {old} rows cannot be resized to {new}: both must be at least 1.")
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5  # of every output row, in input rows
    if antialias:
        weight = _kernel((np.arange(old) - centre[:, None]) / max(scale, 1.0), method, a=-0.5)
        return weight / weight.sum(1, keepdims=True)
    radius = _RADIUS[method]
    taps = np.floor(centre)[:, None] + np.arange(1 - radius, radius + 1)
    weight = _kernel(taps - centre[:, None], method, a=-0.75)
    matrix = np.zeros((new, old))
    # Taps beyond the edge count for the edge row.
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), weight)
    return matrix


def resize_grid(
    grid: Float[Array | np.ndarray, "h w C"],
    size: tuple[int, int],
    method: Method = "bicubic",
    antialias: bool = False,
) -> Float[Array | np.ndarray, "p q C"]:
    """Resizes a grid of vectors.

    Args:
        grid: `[h, w, C]`, a numpy array or a jax one (possibly traced).
        size: the new height and width, static.
        method: "bicubic" or "bilinear".
        antialias: whether the kernel widens when an axis shrinks.

    Returns:
        float32 `[*size, C]`, of the kind that was given.

    Raises:
        ValueError: an unknown method, a grid without three axes, or a size below one.
    """
    if grid.ndim != 3:
        raise ValueError(f"grid has shape {grid.shape}; it must be [height, width, channels].")
    rows, columns = (resize_matrix(old, new, method, antialias) for old, new in zip(grid.shape, size, strict=False))
    if isinstance(grid, jax.Array):
        maps = jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)
        return jnp.einsum("ph,hwc,qw->pqc", maps[0], grid.astype(jnp.float32), maps[1], precision="highest")
    wide = np.tensordot(rows, np.asarray(grid, np.float64), 1)
    return np.einsum("qw,pwc->pqc", columns, wide).astype(np.float32)


def resize_positions(
    table: Float[Array | np.ndarray, "1 T C"],
    prefix: int,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    method: Method = "bicubic",
    antialias: bool = False,
) -> Float[Array | np.ndarray, "1 U C"]:
    """Resizes a table of positions; its first rows, which belong to no patch, are kept.

    Args:
        table: `[1, prefix + h * w, C]` of any float type, numpy or jax.
        prefix: rows of leading tokens (0, 1 for CLS, 2 with a distillation token).
        old_grid: rows and columns of patches that the table was made for.
        new_grid: rows and columns wanted.
        method: "bicubic" or "bilinear".
        antialias: whether the kernel widens when an axis shrinks.

    Returns:
        float32 `[1, prefix + new_grid[0] * new_grid[1], C]`; the same values when the grid stays the same.

    Raises:
        ValueError: the table does not have `prefix + old_grid[0] * old_grid[1]` rows, or an argument out of range.
    """
    (height, width), rows = old_grid, table.shape[1] if table.ndim == 3 else -1
    if table.ndim != 3 or table.shape[0] != 1 or rows != prefix + height * width:
        raise ValueError(
            f"table has shape {table.shape}; with prefix = {prefix} and old_grid = {height}x{width} "
            f"it must be [1, {prefix + height * width}, C]."
        )
    xp = jnp if isinstance(table, jax.Array) else np
    table = table.astype(np.float32)
    if tuple(old_grid) == tuple(new_grid):
        return table
    grid = resize_grid(table[0, prefix:].reshape(height, width, -1), new_grid, method, antialias)
    return xp.concatenate([table[:, :prefix], grid.reshape(1, -1, table.shape[-1])], axis=1)
