"""The compilation cache: on by default where users keep caches, and never against their word."""

import os
import subprocess
import sys

CODE = "import tokjax, jax; print(jax.config.values['jax_compilation_cache_dir'])"


def cache_of(**changes):
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "TOKJAX_CACHE")} | changes
    return subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_on_in_the_users_cache_directory(tmp_path):
    assert cache_of(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "tokjax" / "xla")


def test_the_users_own_folder_wins_and_0_is_off(tmp_path):
    assert cache_of(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == str(tmp_path)
    assert cache_of(TOKJAX_CACHE="0") == "None"
