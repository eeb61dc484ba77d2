"""The command line: ``mupjax quickstart | sweep | coord-check | show``.

Exit codes: 0 done; 2 bad input, with one line on standard error; 1 a fault, with a traceback.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["main"]

# Imports of the package are inside the commands: `mupjax --help` must not wait for JAX.


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
    _one_device_per_core()
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
    _one_device_per_core()
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


def coord_check(
    config: Annotated[Path | None, tyro.conf.Positional] = None,
    out: Path = Path("runs/coord-check"),
    steps: int = 5,
    seeds: int = 5,
    learning_rate: float | None = None,
) -> None:
    """Check how activations and their change scale with width, for a few steps.

    Args:
      config: a sweep's TOML file; without one, the quickstart's MLP with one more hidden layer.
      out: folder to write to.
      steps: number of updates.
      seeds: number of seeds.
      learning_rate: default 2^-8, or the geometric middle of the file's grid.
    """
    _one_device_per_core()
    import optax

    from mupjax import results
    from mupjax.coord_check import coord_check as check
    from mupjax.coord_check import slope_table
    from mupjax.data import digits
    from mupjax.figures import save
    from mupjax.figures.coordinates import coordinate_figure
    from mupjax.quickstart import digits_mlp

    dataset_path = out / "coordinates.nc"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not dataset_path.exists())):
        raise FileExistsError(
            f"{str(out)!r} holds something else: choose another folder with --out."
        )
    if config is None:
        dataset = check(
            digits_mlp(2),
            digits(),
            lambda learning_rate: optax.adam(learning_rate),
            ["SP", "NTP", "muP"],
            widths=(64, 128, 256, 512, 1024),
            hyperparameters={"learning_rate": learning_rate or 2.0**-8},
            base_width=64,
            steps=steps,
            seeds=seeds,
        )
    else:
        from mupjax.config_file import read_sweep_file

        file = read_sweep_file(config)
        fixed = {k: _middle(v) for k, v in file.arguments["hyperparameters"].items()}
        if learning_rate is not None:
            fixed["learning_rate"] = learning_rate
        taken = ("hyperparameters", "steps", "seeds", "evaluations", "schedule", "strategy")
        options = {k: v for k, v in file.arguments.items() if k not in taken}
        dataset = check(
            file.model,
            file.setting,
            file.optimizer,
            file.parametrizations,
            hyperparameters=fixed,
            steps=steps,
            seeds=seeds,
            **options,
        )
    results.save(dataset, dataset_path)
    written = save(coordinate_figure(dataset), out / "coordinates", formats=("png", "svg"))
    print(slope_table(dataset))
    print(
        "about 0: stable; positive: blows up with width; negative: vanishes. Under muP the readout "
        "may start as width^-0.5."
    )
    print(f"\nwrote {', '.join(map(str, [dataset_path, *written]))}")


def _middle(values: object) -> float:
    import numpy as np

    grid = np.atleast_1d(np.asarray(values, float))
    if grid.size == 0:
        raise ValueError("a hyperparameter's grid is empty.")
    return float(grid[len(grid) // 2])


def show(run: Annotated[Path, tyro.conf.Positional], configuration: bool = False) -> None:
    """Print what a run found.

    Args:
      run: a run's folder, or its dataset (.nc or .zarr).
      configuration: print how it was run as well.
    """
    from mupjax import results
    from mupjax.coord_check import slope_table
    from mupjax.verdict import format_summaries, summarize

    if run.suffix not in (".nc", ".zarr"):
        named = [run / name for name in ("sweep.nc", "sweep.zarr", "coordinates.nc")]
        found = [path for path in named if path.exists()]
        if not found:
            raise FileNotFoundError(f"{str(run)!r} holds no result of a sweep.")
        run = found[0]
    dataset = results.load(run)
    print(
        f"{run}: {dict(dataset.sizes)}, run {dataset.attrs['created']} on {dataset.attrs['device']}"
    )
    if configuration:
        print(json.dumps(results.configuration_of(dataset), indent=2))
    if "coordinate_change" in dataset:
        print(slope_table(dataset))
    elif dataset.sizes.get("learning_rate", 0) >= 3:
        print(format_summaries(summarize(dataset)))
    else:
        print(dataset)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="mupjax: %(message)s")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"quickstart": quickstart, "sweep": sweep, "coord-check": coord_check, "show": show},
            prog="mupjax",
            description="Does a learning rate tuned on a small network stay best on a large one?",
            args=arguments,
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except (ValueError, TypeError, OSError) as error:
        if not _meant(error):
            traceback.print_exc()
            return 1
        print(f"mupjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mupjax: interrupted; finished widths are kept (see --resume)", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _one_device_per_core() -> None:
    from mupjax.cores import use_all_cores

    try:
        use_all_cores()
    except RuntimeError:
        logging.getLogger("mupjax").info("JAX has started already; its devices stay as they are")


def _meant(error: BaseException) -> bool:
    """Whether this package raised the error on purpose: then it speaks of the user's input."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "")
    return module.split(".")[0] in ("mupjax", "synthetic", "theory")


if __name__ == "__main__":
    sys.exit(main())
