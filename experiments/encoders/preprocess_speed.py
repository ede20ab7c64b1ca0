"""Preprocessing of JPEG files against the same steps written plainly with Pillow and NumPy.

python -m experiments.encoders.preprocess_speed     # prints a table; a quiet machine, a minute

Both sides decode, convert, resize, crop and normalise 256 files of 500 x 375 pixels (quality 90, some 70 kB each) in a
pool of as many threads as the machine has cores. They run interleaved, in rotating order; the ratio is the median over
the rounds.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from tokjax.pretrained.naflex import Naflex, fit
from tokjax.pretrained.preprocess import HALF, Preprocess, clip_eval, script_eval

COUNT, ROUNDS = 256, 7


def picture(seed: int) -> Image.Image:
    """Noise of all scales, larger ones stronger, as photographs have it, with a sensor's on top."""
    rng = np.random.default_rng(seed)
    width, height = (500, 375) if seed % 4 else (375, 500)
    total = np.zeros((height, width, 3))
    for octave in range(1, 9):
        coarse = rng.integers(0, 256, (max(1, 3 * 2**octave // 4), 2**octave, 3), np.uint8)
        total += 0.6**octave * np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    total = 255 * (total - total.min()) / np.ptp(total) + rng.normal(0, 12, total.shape)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def plainly(resize_and_crop: Callable[[Image.Image], Image.Image], mean, std) -> Callable[[list[Path]], np.ndarray]:
    mean, std = np.array(mean, np.float32), np.array(std, np.float32)

    def one(path: Path) -> np.ndarray:
        image = resize_and_crop(Image.open(path).convert("RGB"))
        return (np.asarray(image).astype(np.float32) / 255 - mean) / std

    def run(paths: list[Path]) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.stack(list(pool.map(one, paths)))

    return run


def short(resized: int, size: int) -> Callable[[Image.Image], Image.Image]:
    def run(image: Image.Image) -> Image.Image:
        scale = resized / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))

    return run


def square(size: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((size, size), Image.Resampling.BICUBIC)


def plainly_naflex(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    def one(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = Image.open(path).convert("RGB")
        height, width = fit(image.height, image.width, 16, 256)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image).astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
        cut = pixels.reshape(height // 16, 16, width // 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 768)
        return np.pad(cut, [(0, 256 - len(cut)), (0, 0)]), np.arange(256) < len(cut)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        patches, valid = zip(*pool.map(one, paths), strict=True)
    return np.stack(patches), np.stack(valid)


def main() -> None:
    size = (224, 224)
    mae, clip = script_eval(size), clip_eval(size)
    siglip = Preprocess(size, "square", size, crop=False, mean=HALF, std=HALF)
    sides = {
        "short side 256, crop 224 (DeiT, MAE)": (mae, plainly(short(256, 224), mae.mean, mae.std)),
        "short side 224, crop 224 (CLIP)": (clip, plainly(short(224, 224), clip.mean, clip.std)),
        "224 x 224 (SigLIP)": (siglip, plainly(square(224), siglip.mean, siglip.std)),
        "256 patches (NaFlex)": (Naflex(), plainly_naflex),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(COUNT)]
        for i, path in enumerate(paths):
            picture(i).save(path, quality=90)
        kilobytes = sum(path.stat().st_size for path in paths) / COUNT / 1000
        print(f"{COUNT} files of {kilobytes:.0f} kB, {os.cpu_count()} cores, Pillow {Image.__version__}\n")
        print("| preprocessing | Pillow, plainly | tokjax | ratio |\n| --- | --- | --- | --- |")
        for name, (ours, plain) in sides.items():
            seconds: dict[str, list[float]] = {"ours": [], "plain": []}
            for turn in range(-1, ROUNDS):  # the first one warms up
                runs = {"ours": ours, "plain": plain}
                for side in sorted(runs, reverse=turn % 2 == 0):
                    start = time.perf_counter()
                    runs[side](paths)
                    if turn >= 0:
                        seconds[side].append(time.perf_counter() - start)
            ratio = statistics.median(p / o for o, p in zip(seconds["ours"], seconds["plain"], strict=True))
            each = {side: 1000 * statistics.median(times) / COUNT for side, times in seconds.items()}
            print(f"| {name} | {each['plain']:.2f} ms an image | {each['ours']:.2f} ms | {ratio:.2f} |")


if __name__ == "__main__":
    main()
