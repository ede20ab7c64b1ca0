"""Loading a ViT-L/16: time beside a bare loop over the same file, and peak memory.

python -m experiments.encoders.load_speed

The bare loop reads every tensor, transposes it and places it on the device, with safetensors and nothing else. Both run
in processes of their own, in turn. Memory is what the process holds beyond its state after the imports: anonymous (its
own), and with the pages of the file that the system may drop at any time.
"""

import json
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MB = 1 << 20
ROUNDS = 3


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("RssAnon", "VmRSS")))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in fields}


class Peak:
    """The highest memory since it was made, looked at every two milliseconds."""

    def __init__(self):
        self.start = self.most = _status()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            now = _status()
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}

    def end(self) -> dict[str, float]:
        self._ended.set()
        self._thread.join()
        return {name: (value - self.start[name]) / MB for name, value in self.most.items()}


def bare(file: Path) -> list:
    """Every tensor read, transposed and placed."""
    import jax
    import numpy as np
    from safetensors import safe_open

    arrays = []
    with safe_open(file, framework="np") as tensors:
        for name in list(tensors.keys()):
            array = tensors.get_tensor(name)
            arrays.append(jax.device_put(np.ascontiguousarray(array.T if array.ndim == 2 else array)))
    return arrays


def one(kind: str, folder: Path) -> None:
    """One measurement, printed as JSON."""
    import jax

    import tokjax

    jax.device_put(1.0).block_until_ready()
    peak = Peak()
    started = time.perf_counter()
    loaded = bare(folder / "model.safetensors") if kind == "bare" else tokjax.load(folder).params
    jax.block_until_ready(loaded)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, **peak.end()}))


def main() -> None:
    import jax

    import tokjax
    from tokjax.models.vit import preset

    with tempfile.TemporaryDirectory() as folder:
        model = tokjax.build(preset("l/16", head_bias=True))
        tokjax.save(model, folder)
        size = (Path(folder) / "model.safetensors").stat().st_size / MB
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / MB
        del model
        runs: dict[str, list[dict[str, float]]] = {"bare": [], "tokjax": []}
        for _ in range(ROUNDS):
            for kind, results in runs.items():
                command = [sys.executable, "-m", "experiments.encoders.load_speed", kind, folder]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(f"file {size:.0f} MiB, largest tensor {largest:.0f} MiB, {ROUNDS} rounds")
    median = {
        kind: {name: statistics.median(run[name] for run in results) for name in results[0]}
        for kind, results in runs.items()
    }
    for kind, row in median.items():
        print(f"{kind:7} {row['seconds']:.2f} s, peak {row['RssAnon']:.0f} MiB own, {row['VmRSS']:.0f} with file pages")
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs["tokjax"], runs["bare"], strict=True))
    print(f"time over the bare loop: {ratio:.2f} (asked: at most 1.3)")
    print(f"own memory over the file: {median['tokjax']['RssAnon'] - size:.0f} MiB (asked: at most {2 * largest:.0f})")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        one(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
