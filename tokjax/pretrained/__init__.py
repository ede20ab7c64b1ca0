"""Published checkpoints: loading, saving, positions and preprocessing."""

from tokjax.pretrained.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tokjax.pretrained.positions import resize_grid, resize_positions
from tokjax.pretrained.preprocess import Preprocess

__all__ = ["Checkpoint", "Preprocess", "load_checkpoint", "resize_grid", "resize_positions", "save_checkpoint"]
