"""Helpers of the two commands of this package: an argument type, and lines for the user."""

from __future__ import annotations

import argparse
import os
import sys


def at_least_one(text: str) -> int:
    """Parse an argument of the command line as an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is no integer, or below 1.
    """
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def say(message: str) -> None:
    """Print a line to stderr, on the first rank only.

    It is not logged, because the script that configures logging has not run yet.
    """
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
        print(f"step37_bridge: {message}", file=sys.stderr, flush=True)
