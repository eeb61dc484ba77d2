"""``mupjax sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mupjax.commands.devices import one_device_per_core

__all__ = ["sweep"]


def sweep(
    config: Annotated[Path, tyro.conf.Positional],
    out: Path | None = None,
    replace: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> None:
    """Run the sweep described by a TOML file.

    Args:
      config: the file (sections: model, setting, optimizer, schedule, sweep, hyperparameters).
      out: folder to write to; default runs/ and the file's name.
      replace: overwrite an earlier sweep in that folder.
      resume: complete an interrupted one: finished widths are not run again.
      quiet: no progress bar.
    """
    one_device_per_core()
    import mupjax
    from mupjax.config_file import read_sweep_file
    from mupjax.quickstart import DATASET, check_folder
    from mupjax.verdict import format_summaries, summarize, write_analysis

    if replace and resume:
        raise ValueError("--replace and --resume exclude each other.")
    file = read_sweep_file(config)
    out = out or Path("runs") / config.stem
    earlier = check_folder(out)
    if earlier and not (replace or resume):
        raise FileExistsError(
            f"{str(out)!r} holds an earlier sweep: choose another folder with --out, or say "
            "--replace or --resume."
        )
    dataset = mupjax.sweep(
        file.model,
        file.setting,
        file.optimizer,
        file.parametrizations,
        out=out / DATASET,
        existing="resume" if resume else "replace",
        progress=False if quiet else None,
        **file.arguments,
    )
    written = [out / DATASET]
    if dataset.sizes.get("learning_rate", 0) >= 3:
        summaries = summarize(dataset)
        written += write_analysis(out, dataset, summaries, title=f"Sweep {config.stem}")
        print(format_summaries(summaries))
    else:
        print("no verdict: that takes a grid of at least three learning rates")
    print(f"\nwrote {', '.join(map(str, written))}")
