"""Settings of all tests, made before JAX starts."""

import gc
import os
from pathlib import Path
import tempfile

import pytest

# Eight devices for the laws of sharding; a device that no test asks for costs nothing.
# Programs here are small and run once or twice: LLVM's dear passes cost more than they give back.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true")

# What one process of the run has compiled, the others load; the folder goes when the run ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="tokjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Traces are millions of small objects that hardly ever are garbage: looking through them all took a tenth of the time.
gc.set_threshold(100_000, 50, 100)


def group_of(nodeid: str) -> str:
    """The tests that belong into one process, since they share programs and fixtures.

    Those are a file's; of the large ones the laws of one reducer, the vectors of one folder, and every notebook alone.
    """
    file, _, test = nodeid.partition("::")
    case = test.partition("[")[2].removesuffix("]")
    match Path(file).name:
        case "test_contract.py":
            return f"{file}[{case.rpartition('-')[2]}]"  # the name stands behind other parameters
        case "test_golden.py":
            return f"{file}[{case.partition('/')[0]}]"
        case "test_colabs.py":
            return nodeid
    return file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Groups by the names of the tests: marks of xdist are not seen under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lasts longest starts first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_colabs.py", "test_end_to_end.py"))
