"""Settings of all tests, made before JAX starts."""

import gc
import os
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


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives a file to one process, so that what its tests share is traced and compiled once.

    Files whose tests share less say so with groups of their own. What lasts longest starts first, so that no process
    is left alone with it at the end.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
    items.sort(key=lambda item: not item.get_closest_marker("xdist_group").args[0].startswith("notebook"))
