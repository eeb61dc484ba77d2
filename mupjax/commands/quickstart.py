"""``mupjax quickstart``."""

from __future__ import annotations

from pathlib import Path

from mupjax.commands.devices import one_device_per_core

__all__ = ["quickstart"]


def quickstart(
    out: Path = Path("runs/quickstart"), steps: int = 100, seeds: int = 3, quiet: bool = False
) -> None:
    """Sweep the learning rate of an MLP on handwritten digits, under SP and under muP.

    Writes the dataset, the figure and a report, and prints the verdict.

    Args:
      out: folder to write to; an earlier run in it is replaced.
      steps: updates per trial.
      seeds: number of seeds.
      quiet: no progress bar.
    """
    one_device_per_core()
    from mupjax.quickstart import DATASET, Quickstart, check_folder, run_quickstart
    from mupjax.verdict import format_summaries, summarize, write_analysis

    if check_folder(out):
        print(f"replacing the earlier run in {out}/")
    dataset = run_quickstart(Quickstart(steps=steps, seeds=seeds), out, False if quiet else None)
    summaries = summarize(dataset)
    written = write_analysis(
        out, dataset, summaries, title="Does the learning rate transfer across width?"
    )
    print(format_summaries(summaries))
    print(f"\nwrote {', '.join(str(p) for p in [out / DATASET, *written])}")
