"""Small data sets on disk."""

import json
from pathlib import Path

from image_files import encode, plain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def write_parquet():
    """Writes a split; returns what went in: images [n, 8, 8, 3] and labels [n]."""

    def write(file: Path, n=20, first=0, names=None, image="img", label="label", struct=True, group=6, bad=()):
        images = [plain(first + index) for index in range(n)]
        blobs = [b"" if index in bad else encode(pixels) for index, pixels in enumerate(images)]
        labels = [(first + index) % 3 for index in range(n)]
        column = (
            pa.array([{"bytes": blob, "path": f"{i}.png"} for i, blob in enumerate(blobs)])
            if struct
            else pa.array(blobs, pa.binary())
        )
        table = pa.table({image: column, label: pa.array(labels, pa.int64())})
        if names:
            features = {label: {"names": names, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file, row_group_size=group)
        return np.stack(images), np.array(labels)

    return write


@pytest.fixture
def write_folder():
    """Writes `root/class/index.png` for a dict class -> number of images."""

    def write(root: Path, counts: dict[str, int]) -> None:
        index = 0
        for name, count in counts.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                (root / name / f"{index:03}.png").write_bytes(encode(plain(index)))
                index += 1

    return write
