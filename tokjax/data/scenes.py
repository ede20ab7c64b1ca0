"""Small real data for retrieval, zero-shot and dense tasks: handwritten digits in space, described and labelled.

Nothing is downloaded: the digits are scikit-learn's copy of the UCI set. A scene is a black canvas with one to three
digits side by side or one above the other, each with a colour and a distance. What is near is large and bright.
"""

import dataclasses

import numpy as np
from PIL import Image

from tokjax.data.sources import Digits, Example, Labelled
from tokjax.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (255, 50, 50),
    "green": (50, 220, 50),
    "blue": (70, 110, 255),
    "yellow": (255, 230, 40),
    "purple": (200, 60, 255),
    "white": (255, 255, 255),
}
SEGMENTS = ("background", *WORDS)  # names of the segmentation's classes
NEAR, FAR, BACKGROUND = 1.0, 2.0, 3.0  # distances: of digits, and of what is behind them
INK = 0.1  # a patch belongs to a digit if this share of it is inked

# Every sentence is true of {0} left of (above) {1}, and of a row (column) {0}, {1}, {2}.
_ALONE = ("{0} alone", "a picture of {0}", "only {0}", "there is {0} and nothing else")
_TWO = {
    "across": (
        "{0} left of {1}",
        "{0} to the left of {1}",
        "{1} right of {0}",
        "{1} to the right of {0}",
        "from left to right {0} and {1}",
    ),
    "down": (
        "{0} above {1}",
        "{0} over {1}",
        "{1} below {0}",
        "{1} under {0}",
        "from top to bottom {0} and {1}",
    ),
}
_THREE = {
    "across": (
        "from left to right {0}, {1} and {2}",
        "from right to left {2}, {1} and {0}",
        "{1} between {0} on the left and {2} on the right",
    ),
    "down": (
        "from top to bottom {0}, {1} and {2}",
        "from bottom to top {2}, {1} and {0}",
        "{1} between {0} above and {2} below",
    ),
}
_SPLITS = {"train": 0, "test": 1}
_TRIES = 1000


@dataclasses.dataclass(frozen=True)
class Digit:
    """One digit of a scene.

    Attributes:
        image: which image of the split's digits.
        value: 0 to 9.
        colour: its name.
        distance: `NEAR` to `FAR`.
        box: (top, left, side) in pixels.
    """

    image: int
    value: int
    colour: str
    distance: float
    box: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a scene shows: `digits` from left to right or from top to bottom, `layout` "across" or "down"."""

    digits: tuple[Digit, ...]
    layout: str
    caption: str


class Scenes(Labelled):
    """Canvases of digits; scene i is a function of (split, seed, i) and the other arguments.

    The digits of `train` and `test` are different images, those of `Digits`. An example holds, beside `image`:

    - `label`: the digit that is leftmost or uppermost (the only one of scenes with one).
    - `caption`: such as "a red three above a blue seven", in several wordings, always true.
    - `segmentation` int32 [h, w]: of every patch the class of `SEGMENTS` (0 background, 1 + digit). It is the digit
      with the most ink in the patch if its ink, relative to full colour, covers at least `INK` of the patch.
    - `depth` float32 [h, w]: of every patch the distance of the digit that it belongs to, or `BACKGROUND`. A digit at
      distance d has the side min(size) / 2 / d and the brightness 1.5 - d / 2.

    Args:
        split: `train` or `test`.
        size: height and width in pixels, whole patches, at least 16 each.
        patch_size: side of a patch of `segmentation` and `depth`.
        digits: fewest and most in a scene, within 1..3.
        colours: six colours, named in the caption; False: all are white.
        distinct: no two scenes of the split show the same digits, colours and layout.
        count: how many scenes; None: 8192 of `train`, 1024 of `test`.
        seed: of the scenes. Which digits are in which split does not depend on it.

    Raises:
        UserError: another split, or more `distinct` scenes than there are.
        ValueError: an argument out of range.
    """

    in_memory = True
    dense = True
    segments = SEGMENTS

    def __init__(
        self,
        split: str = "train",
        *,
        size: tuple[int, int] = (48, 48),
        patch_size: int = 8,
        digits: tuple[int, int] = (1, 3),
        colours: bool = True,
        distinct: bool = False,
        count: int | None = None,
        seed: int = 0,
    ):
        if split not in _SPLITS:
            raise UserError(f"no split {split!r} in scenes: it has train, test")
        if patch_size < 1 or len(size) != 2 or min(size) < 16 or any(side % patch_size for side in size):
            raise ValueError(
                f"size must be height and width, at least 16 each and whole patches of {patch_size}, got {size}"
            )
        if len(digits) != 2 or not 1 <= digits[0] <= digits[1] <= 3:
            raise ValueError(f"digits must be the fewest and the most in a scene, within 1..3, got {digits}")
        if count is None:
            count = 8192 if split == "train" else 1024
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.size, self.patch_size = tuple(size), patch_size
        source = Digits(split, size=8)
        self._ink = [source[index]["image"][..., 0] for index in range(len(source))]
        self._names = [source.name_of(index) for index in range(len(source))]
        self._split, self._number = split, digits
        self._colours = tuple(COLOURS) if colours else ("white",)
        self._named = colours
        values = source.labels

        self.scenes: list[Scene] = []
        seen = set()
        for index in range(count):
            rng = np.random.default_rng([seed, _SPLITS[split], index])
            for _ in range(_TRIES):
                scene = self._draw(values, rng)
                facts = scene.layout, tuple((digit.value, digit.colour) for digit in scene.digits)
                if not (distinct and facts in seen):
                    break
            else:
                raise UserError(f"scenes: only about {index} of {count} can be distinct with these digits and colours")
            seen.add(facts)
            self.scenes.append(scene)
        self.class_names = WORDS
        self.labels = np.array([scene.digits[0].value for scene in self.scenes], np.int32)
        self.captions = [(scene.caption,) for scene in self.scenes]
        grid = size[0] // patch_size, size[1] // patch_size
        self.fields = {"segmentation": (grid, "int32"), "depth": (grid, "float32")}

    def __getitem__(self, index: int) -> Example:
        scene = self.scenes[index]
        height, width = self.size
        canvas = np.zeros((height, width, 3), np.float32)
        ink = np.zeros((len(scene.digits), height, width), np.float32)
        for layer, digit in zip(ink, scene.digits, strict=True):
            top, left, side = digit.box
            small = Image.fromarray(self._ink[digit.image])
            layer[top : top + side, left : left + side] = (
                np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)) / 255
            )
            canvas += layer[..., None] * (np.array(COLOURS[digit.colour], np.float32) * (1.5 - digit.distance / 2))
        patch = self.patch_size
        shares = ink.reshape(len(ink), height // patch, patch, width // patch, patch).mean((2, 4))
        owner = np.where(shares.max(0) >= INK, shares.argmax(0), -1)  # -1 takes what is last in the tables below
        classes = np.array([*(1 + digit.value for digit in scene.digits), 0], np.int32)
        distances = np.array([*(digit.distance for digit in scene.digits), BACKGROUND], np.float32)
        return {
            "image": np.round(canvas).astype(np.uint8),
            "label": int(self.labels[index]),
            "caption": scene.caption,
            "segmentation": classes[owner],
            "depth": distances[owner],
        }

    def name_of(self, index: int) -> str:
        shown = ", ".join(self._names[digit.image] for digit in self.scenes[index].digits)
        return f"scenes/{self._split} {index} ({shown})"

    def _draw(self, values: np.ndarray, rng: np.random.Generator) -> Scene:
        number = int(rng.integers(self._number[0], self._number[1], endpoint=True))
        layout = "across" if number == 1 else ("across", "down")[rng.integers(2)]
        along, other = (self.size[1], self.size[0]) if layout == "across" else self.size
        images = rng.integers(len(values), size=number)
        colours = rng.integers(len(self._colours), size=number)
        while True:  # until they fit, which at the greatest distance three always do
            distances = rng.uniform(NEAR, FAR, number)
            sides = np.round(min(self.size) / 2 / distances).astype(int)
            if sides.sum() <= along:
                break
        # The free pixels fall into the gaps at random; across the line of digits each has its own place.
        gaps = np.diff(np.sort(rng.integers(0, along - sides.sum(), number, endpoint=True)), prepend=0)
        starts = np.cumsum(gaps) + np.cumsum(sides) - sides
        offsets = [int(rng.integers(0, other - side, endpoint=True)) for side in sides]
        digits = tuple(
            Digit(
                image=int(images[i]),
                value=int(values[images[i]]),
                colour=self._colours[colours[i]],
                distance=float(distances[i]),
                box=(offsets[i], int(starts[i]), int(sides[i]))
                if layout == "across"
                else (int(starts[i]), offsets[i], int(sides[i])),
            )
            for i in range(number)
        )
        wordings = (_ALONE, _TWO[layout], _THREE[layout])[number - 1]
        names = [f"a {digit.colour} {WORDS[digit.value]}" if self._named else _with_article(digit) for digit in digits]
        return Scene(digits, layout, wordings[rng.integers(len(wordings))].format(*names))


def _with_article(digit: Digit) -> str:
    return f"{'an' if digit.value == 8 else 'a'} {WORDS[digit.value]}"
