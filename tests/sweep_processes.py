"""Sweeps in a process of their own, with XLA's optimisations: on four devices, or killed."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from small_sweeps import (
    TWO_WIDTHS,
    assert_close,
    assert_same_results,
    breaking,
    chunked,
    sweep_line,
    timing,
    two_widths,
)


def compare_devices():
    """Run in a process with four virtual devices."""
    assert jax.device_count() == 4
    one = chunked(devices=jax.devices()[:1])
    four = chunked()
    assert four.attrs["device"].startswith("4 x ")
    # 5 trials by 3 seeds: neither divides, and 6 chunks of 3 trials are not a multiple of 4.
    (program,) = timing(four)["programs"]
    assert program["chunking"] == {
        "trials": 3,
        "seeds": 1,
        "copy_batch": True,
        "library": "eigen",
    }
    assert program["chunks"] == 8
    assert_same_results(four, one, steps=5)
    # A setting without data, observers, progress.
    more: dict[str, Any] = TWO_WIDTHS | {"observers": [breaking(0)]}
    one = sweep_line(devices=jax.devices()[:1], **more)
    four = sweep_line(progress=True, **more)
    assert_same_results(four, one, steps=3)
    assert_close(four.loss_total, one.loss_total, 3)


def in_a_process(statement, *arguments, **environment):
    """A Python process that runs a statement with this module imported as `t`."""
    here = Path(__file__).resolve().parent
    return subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            f"import sweep_processes as t; {statement}",
            *arguments,
        ],
        cwd=here,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sleep_at_width_8(out):
    """Run in a process that is killed: width 4 ends, the program of width 8 never does."""
    observer = breaking(0)

    def update(state, seen):
        if seen.params["readout"]["kernel"].shape[0] == 8:
            jax.debug.callback(lambda: time.sleep(600))
        return observer.update(state, seen)

    slow = dataclasses.replace(observer, update=update)
    two_widths(out, observers=[slow])
