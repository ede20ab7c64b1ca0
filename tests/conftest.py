"""Settings of all tests, made before JAX starts."""

import os
import tempfile

# Eight devices for the laws of sharding; a device that no test asks for costs nothing.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

# What one process of the run has compiled, the others load; the folder goes when the run ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="tokjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
