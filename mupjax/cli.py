"""The command line: ``mupjax`` and one of `COMMANDS`.

Exit codes: 0 done; 2 bad input, with one line on standard error; 1 a fault, with a traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

import tyro

from mupjax.commands.coord_check import coord_check
from mupjax.commands.diagnose import diagnose
from mupjax.commands.mechanism import mechanism
from mupjax.commands.plan import plan
from mupjax.commands.quickstart import quickstart
from mupjax.commands.reproduce import reproduce
from mupjax.commands.show import show
from mupjax.commands.sweep import sweep

__all__ = ["main"]

COMMANDS = {
    "quickstart": quickstart,
    "sweep": sweep,
    "coord-check": coord_check,
    "show": show,
    "diagnose": diagnose,
    "mechanism": mechanism,
    "plan": plan,
    "reproduce": reproduce,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="mupjax: %(message)s")
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="mupjax",
            description="Does a learning rate tuned on a small network stay best on a large one?",
            args=arguments,
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        # `mupjax ... | head`: the reader has what it wants. Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if not _meant(error):
            traceback.print_exc()
            return 1
        print(f"mupjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "mupjax: interrupted; finished widths are kept: call it again (sweep: with --resume)",
            file=sys.stderr,
        )
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _meant(error: BaseException) -> bool:
    """Whether this package raised the error on purpose: then it speaks of the user's input."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "")
    return module.split(".")[0] in ("mupjax", "synthetic", "theory")


if __name__ == "__main__":
    sys.exit(main())
