"""The persistent compilation cache: a program that was compiled once starts in a fraction of the time."""

import os
from pathlib import Path

import jax


def enable_cache() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache directory.

    Does nothing where a folder is set already (`JAX_COMPILATION_CACHE_DIR`, `jax.config`); `TOKJAX_CACHE=0`: stays off.
    """
    if os.environ.get("TOKJAX_CACHE") == "0" or jax.config.values["jax_compilation_cache_dir"]:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "tokjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
