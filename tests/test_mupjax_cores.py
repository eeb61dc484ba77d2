"""Every core as a device of its own: only before JAX starts, and never silently in vain."""

import os
import subprocess
import sys

import jax
import pytest

import mupjax


def run(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    ).stdout.split()


def test_before_jax_starts_it_makes_as_many_devices_as_asked():
    code = "import jax, mupjax; print(mupjax.use_all_cores(3), len(jax.devices('cpu')))"
    assert run(code) == ["3", "3"]


def test_the_users_own_flag_is_left_alone():
    code = "import jax, mupjax; print(mupjax.use_all_cores(3), len(jax.devices('cpu')))"
    flag = "--xla_force_host_platform_device_count=2"
    assert run(code, XLA_FLAGS=flag) == ["2", "2"]


def test_after_jax_has_started_it_says_so():
    found = len(jax.devices("cpu"))
    assert mupjax.use_all_cores(found) == found
    with pytest.raises(RuntimeError, match="before anything that computes"):
        mupjax.use_all_cores(found + 1)
