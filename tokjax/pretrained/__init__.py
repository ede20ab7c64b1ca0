"""Published checkpoints: loading, saving, positions and preprocessing."""

from tokjax.pretrained.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tokjax.pretrained.positions import resize_grid, resize_positions
from tokjax.pretrained.preprocess import Naflex, Preprocess
from tokjax.pretrained.tokenizer import Tokenizer

__all__ = [
    "Checkpoint",
    "Naflex",
    "Preprocess",
    "Tokenizer",
    "load_checkpoint",
    "resize_grid",
    "resize_positions",
    "save_checkpoint",
]
