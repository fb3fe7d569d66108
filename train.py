"""Train a cohort of networks that teach each other. ``python train.py --help`` teaches the flags.

    python train.py --cohort 'resnet8*2' --dataset digits --epochs 8 --batch-size 16 --lr 0.05

The same program as ``python -m dml_accel train``; the run itself reads from top to bottom in
dml_accel/training.py.
"""

import sys

from dml_accel import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
