"""`python -m latent_shift.training RECIPE --output-dir DIR [table.key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from latent_shift.training import train


def main() -> int:
    """Runs a recipe; the exit status is 0 when it is done and 3 when the time ran out first."""
    parser = argparse.ArgumentParser(
        prog="python -m latent_shift.training", description="Run a training recipe."
    )
    parser.add_argument(
        "recipe", help="TOML file, or the name of a recipe that comes with the package"
    )
    parser.add_argument("overrides", nargs="*", metavar="table.key=value")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument(
        "--stage", action="append", dest="stages", help="run only this stage (repeatable)"
    )
    parser.add_argument("--max-seconds", type=float)
    options = parser.parse_intermixed_args()
    done = train(
        options.recipe,
        options.overrides,
        output_dir=options.output_dir,
        stages=options.stages,
        max_seconds=options.max_seconds,
    )
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
