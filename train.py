"""Train a cohort of networks that teach each other. ``python train.py --help`` lists the flags.

    python train.py --cohort 'resnet8*2' --dataset digits --epochs 8 --batch-size 16 --lr 0.05

The same program as ``python -m dml_accel train``; dml_accel/training/train.py is the run itself,
from top to bottom.
"""

import sys

from dml_accel import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
