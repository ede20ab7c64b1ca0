"""Every golden vector under $TOKJAX_GOLDEN (default: tests/golden), by the adapter of its folder."""

import functools
import os
from pathlib import Path

from golden_harness import check_case, find_cases, folder_of, load_adapter
import pytest

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("TOKJAX_GOLDEN", HERE / "golden"))
CASES = find_cases(ROOT)

adapter_of = functools.cache(lambda folder: load_adapter(HERE / "golden_adapters" / f"{folder}.py"))


def test_there_are_golden_vectors():
    assert CASES, f"no golden vectors (*.npz) under {ROOT}: set TOKJAX_GOLDEN to a folder that has some"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.relative_to(ROOT).with_suffix("").as_posix())
def test_golden(case):
    print(check_case(case, adapter_of(folder_of(case, ROOT))))
