"""Images for training and evaluation: `make(config, split, ...)` opens a source and returns a `Loader`.

`sources` reads (`scenes`, `captions` and `dense` more than images and labels), `transforms` and `views` change,
`loader` batches. Texts for byte-level models have a `make` of their own, `tokjax.data.text.make`.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Int32
import ml_collections
from ml_collections import config_dict
import numpy as np

from tokjax.data.captions import Captions, Tokenized
from tokjax.data.config import complete
from tokjax.data.dense import SegmentationFolder
from tokjax.data.loader import Batch, Loader, Normaliser, Transform
from tokjax.data.scenes import Scenes
from tokjax.data.sources import Digits, ImageFolder, Only, Parquet, Source, keep_decoded, open_source, subset
from tokjax.data.stream import LoaderIterator
from tokjax.data.transforms import Evaluation, ImageError, Mix, Normalise, Training
from tokjax.errors import UserError

__all__ = [
    "Batch",
    "Captions",
    "Digits",
    "Evaluation",
    "ImageError",
    "ImageFolder",
    "Loader",
    "LoaderIterator",
    "Mix",
    "Normalise",
    "Normaliser",
    "Only",
    "Parquet",
    "Scenes",
    "SegmentationFolder",
    "Source",
    "Tokenized",
    "Training",
    "default_config",
    "keep_decoded",
    "make",
    "open_source",
    "subset",
]


def default_config() -> ml_collections.ConfigDict:
    """The data config of the embedded digits, every field with its meaning; configs start from it."""
    config = ml_collections.ConfigDict()
    # digits, parquet, imagefolder, scenes, captions, segmentation; auto: digits without a path, else parquet or
    # imagefolder, what the folder holds
    config.source = "auto"
    config.path = ""  # the folder of the data, except for digits and scenes
    config.train_split = "train"
    config.test_split = "test"  # val, validation and test stand for each other
    config.image_column = config_dict.placeholder(str)  # of parquet; None: found by its type
    config.label_column = config_dict.placeholder(str)
    config.cache_gb = 4.0  # of parquet: encoded images kept in memory
    config.decoded_gb = 1.0  # a source that decoded is no larger is decoded once and kept; 0: never
    config.only = ()  # names of the classes to keep, which are then counted in this order; (): all
    config.subset = config_dict.placeholder(int)  # this many training images, classes in proportion; None: all
    config.test_subset = config_dict.placeholder(int)
    config.image_size = (32, 32)  # height, width
    config.patch_size = 8  # of the labels of scenes and segmentation; 1: one for every pixel
    config.classes = config_dict.placeholder(int)  # of segmentation and parquet that do not name theirs
    config.mean = (0.5, 0.5, 0.5)  # of pixels in 0..1; ImageNet: (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225)
    config.std = (0.5, 0.5, 0.5)
    config.bad_image_limit = 0  # images that may fail to decode before it is an error
    config.num_threads = config_dict.placeholder(int)  # None: one a core, at most 16, and 0 for decoded sources

    config.resize = resize = ml_collections.ConfigDict()  # evaluation, and training unless crop is resized
    resize.mode = "short"  # short: keep the aspect ratio and cut the centre; square: stretch
    resize.crop_pct = 1.0  # share of the side that the centre cut keeps; ImageNet: 0.875 to 1.0

    config.scenes = scenes = ml_collections.ConfigDict()  # see Scenes
    scenes.digits = (1, 3)  # fewest and most in a scene
    scenes.colours = True
    scenes.distinct = False  # no two scenes of `test` show the same
    scenes.train_count = 8192
    scenes.test_count = 1024
    scenes.seed = 0

    config.augment = augment = ml_collections.ConfigDict()  # training only
    augment.flip = False  # left-right mirror images; not for digits
    augment.crop = "pad"  # pad: CIFAR; resized: ImageNet; none
    augment.pad = 4  # pixels of crop=pad
    augment.scale = (0.08, 1.0)  # area share of crop=resized
    augment.ratio = (3 / 4, 4 / 3)  # width / height of crop=resized
    augment.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off. DeiT: 0.8
    augment.cutmix = 0.0  # the same. DeiT: 1.0
    augment.mix_prob = 1.0  # share of the batches that are mixed
    augment.switch_prob = 0.5  # share of CutMix where both are on
    augment.label_smoothing = 0.0
    return config


def make(
    config: ml_collections.ConfigDict,
    split: str,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    num_epochs: int | None = None,
    transform: Transform | None = None,
    normalise: Normaliser | None = None,
    tokenizer: Callable[[Sequence[str]], Int32[np.ndarray, "B T"]] | None = None,
) -> Loader:
    """Opens a split and returns its loader.

    Scenes and segmentation come with labels of places: they bring their images to `image_size` themselves, and training
    must leave the pixels where they are (`augment.flip` False, `augment.crop` none).

    Args:
        config: fields of `default_config`; those that are missing have its values.
        split: `train` or `test` for the config's `train_split` or `test_split`, or the name of another split.
        batch_size: rows of this process.
        train: shuffled, augmented and endless, or in order, once and padded.
        seed: of order and augmentation. The subset does not depend on it.
        process_index: None: jax's.
        process_count: None: jax's.
        num_epochs: None: endless in training, one in evaluation.
        transform: in place of the config's resizing and augmentation, such as that of a pretrained model. Scenes and
            segmentation do without it; its size must be `image_size`. Only one with `fields`, which gives no image of
            one size, is for them too: it moves pixels, so that labels of places are of no use beside it.
        normalise: in place of the config's mean and std.
        tokenizer: of the captions; batches then have `ids`. In training every caption is an example.

    Raises:
        UserError: a field that does not exist or has a wrong value, or whatever the source or the loader finds.
    """
    config = complete(config, default_config())
    name = {"train": config.train_split, "test": config.test_split}.get(split, split)
    try:
        source = open_source(config, name, train)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data config: {error}") from error
    part = config.subset if split in ("train", config.train_split) else config.test_subset
    augment, resize = config.augment, config.resize
    try:
        if config.only:
            source = Only(source, tuple(map(str, config.only)))
        if part is not None:
            source = subset(source, part)
        if tokenizer is not None:
            source = Tokenized(source, tokenizer)
        source = keep_decoded(source, int(config.decoded_gb * (1 << 30)))
        size = tuple(config.image_size)
        mix = None
        if getattr(source, "dense", False) and not getattr(transform, "fields", None):
            if transform is not None and tuple(transform.size) != size:
                raise UserError(f"data config: image_size is {size}, the model's images are {tuple(transform.size)}")
            if getattr(transform, "channels", 3) != 3:
                raise UserError(f"data config: images of {config.source} are in colour, the model's are grey")
            if train and (augment.flip or augment.crop not in ("none", "", None)):
                raise UserError(
                    f"data config: labels of places allow neither augment.flip nor augment.crop: set them to False and "
                    f"'none', got {augment.flip} and {augment.crop!r}"
                )
            transform = Evaluation(size)  # of images that have this size: nothing
        elif transform is not None:
            pass
        elif train:
            transform = Training(
                size,
                flip=augment.flip,
                crop=None if augment.crop in ("none", "", None) else augment.crop,
                pad=augment.pad,
                scale=tuple(augment.scale),
                ratio=tuple(augment.ratio),
                mode=resize.mode,
                crop_pct=resize.crop_pct,
            )
        else:
            transform = Evaluation(size, mode=resize.mode, crop_pct=resize.crop_pct)
        if train and (augment.mixup or augment.cutmix or augment.label_smoothing):
            mix = Mix(
                source.num_classes,
                mixup=augment.mixup,
                cutmix=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.label_smoothing,
            )
        return Loader(
            source,
            batch_size=batch_size,
            train=train,
            transform=transform,
            normalise=normalise or Normalise(tuple(config.mean), tuple(config.std)),
            mix=mix,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            num_epochs=num_epochs,
            num_threads=config.num_threads,
            bad_image_limit=config.bad_image_limit,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"data config: {error}") from error
