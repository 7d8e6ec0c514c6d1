"""The command ``python -m step37_bridge``: runs Bridge's ``run_recipe.py`` with our parts."""

from __future__ import annotations

import argparse
import contextlib
import runpy
import sys
from pathlib import Path

from step37_bridge.command_line import at_least_one, say

DESCRIPTION = """\
Run scripts/training/run_recipe.py of Megatron-Bridge with step37's embedding, data set and
forward step in place of Bridge's. Start it as that script is started:

    torchrun --nproc-per-node=4 -m step37_bridge /path/to/run_recipe.py \\
        --recipe step37_sft_flickr8k_smoke_config --step_func step37_flickr8k_step key=value

Options of ours go before the path; all that follows the path is the script's.
"""


def main() -> None:
    """Read the command line, replace Bridge's parts by ours, and run the script."""
    parser = argparse.ArgumentParser(
        prog="python -m step37_bridge",
        usage="%(prog)s [--stock | --compare N] PATH/TO/run_recipe.py [its arguments]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--stock", action="store_true", help="replace nothing, to see what Bridge does alone"
    )
    kind.add_argument(
        "--compare",
        type=at_least_one,
        metavar="N",
        help="measure N steps with Bridge's embedding, then N with the fused one",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.command:
        parser.error("the path of Megatron-Bridge's run_recipe.py is missing")
    script = Path(given.command[0])
    if not script.is_file():
        sys.exit(
            f"step37_bridge: there is no file {script}: give the path of run_recipe.py, which is "
            "in scripts/training of Megatron-Bridge's repository and containers, not in its wheel"
        )
    # As Python does for a script. The current folder, first for a module, comes second.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = given.command
    if given.stock:
        say("--stock: nothing is replaced")
        runpy.run_path(str(script), run_name="__main__")
    else:
        _run_with_our_parts(script, given.compare)


def _run_with_our_parts(script: Path, compared_steps: int | None) -> None:
    # Imported here, so that --help and --stock start fast.
    from step37_bridge.callbacks import CompareWithStock
    from step37_bridge.replacing import put_in_bridge
    from step37_data.forward_step import ForwardStep

    compare = None if compared_steps is None else CompareWithStock(steps=compared_steps)
    with contextlib.closing(ForwardStep()) as forward_step:
        try:
            replaced = put_in_bridge(forward_step, compare)
        except ImportError as error:
            sys.exit(f"step37_bridge: {error}")
        for line in replaced:
            say(line)
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
