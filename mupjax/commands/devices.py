"""How commands that train use the machine."""

from __future__ import annotations

import logging

__all__ = ["one_device_per_core"]


def one_device_per_core() -> None:
    """Make every core of a CPU a device, unless JAX has started already."""
    from mupjax.cores import use_all_cores

    try:
        use_all_cores()
    except RuntimeError:
        logging.getLogger("mupjax").info("JAX has started already; its devices stay as they are")
