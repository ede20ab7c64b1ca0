"""Settings of all tests, made before JAX starts."""

import os

# Eight devices for the laws of sharding; a device that no test asks for costs nothing.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
