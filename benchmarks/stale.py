"""Compare a fresh exchange with a stale one: logits of every step, weights of 10 and of 50 steps.

    python -m benchmarks.stale --dataset DIR [flags of dml-accel compare]

The folder that ``--output-dir`` names has every run and the tables, as of any comparison.
"""

import sys

import dml_accel
from dml_accel import cli

COHORT = ("--cohort", "resnet8*2", "--seeds", "5")
METHODS = ("independent", "mutual", "every-10", "every-50")


def main() -> int:
    """Register the two methods, and compare; return the exit code."""
    for steps in (10, 50):
        text = f"peers learn from each other's weights of up to {steps} steps ago"
        dml_accel.register_method(f"every-{steps}", text, exchange_every=steps)
    return int(cli.main(["compare", *COHORT, "--methods", *METHODS, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
