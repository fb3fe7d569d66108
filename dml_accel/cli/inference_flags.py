"""The flags of evaluate, predict and export; the docstrings are the help of the commands."""

import argparse


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """Evaluate trained networks on a data set: top-1, top-5, NLL and calibration of every peer and
    of their ensemble, as in training; accuracy by class and the confusion matrix, as tables and
    a picture. Each network's inputs are prepared as in its training. The classes of the data set
    are matched by name with those of the training: their order is free, and some may be missing.

    examples:
      %(prog)s runs/pair                             # on the test split of its own data set
      %(prog)s runs/pair --dataset path/to/folder --test-split validation
      %(prog)s runs/pair/peers/resnet8-0 --dataset digits --to digits-of-resnet8
    """
    _add_source(parser, "RUN|PEER")
    _add_checkpoint(parser)
    _add_weights(parser)
    parser.add_argument("--dataset", metavar="TEXT", help="as for train (default: that of the run)")
    for name, text in (
        ("dataset-config", "configuration of a data set that has several"),
        ("image-column", "column of images (default: the only image column)"),
        ("label-column", "column of classes (default: inferred as in training)"),
        ("test-split", "split to evaluate on; . is all of a folder (default: as in the run)"),
    ):
        parser.add_argument(f"--{name}", metavar="TEXT", help=text)
    parser.add_argument(
        "--test-fraction",
        type=float,
        metavar="X",
        help="share of unsplit class folders to evaluate on, as for train (default: as in the run)",
    )
    parser.add_argument(
        "--bad-images",
        choices=("refuse", "skip"),
        help="what to do about an image that cannot be read: refuse to evaluate, or leave it out "
        "and name it (default: as in the run)",
    )
    parser.add_argument(
        "--feed",
        choices=("auto", "memory", "loader"),
        default="auto",
        help="where images come from, as for train; the numbers are the same (default: auto)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode images which are not in memory, as for train (default: as for "
        "train)",
    )
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="folder for evaluation.json, confusion.csv and confusion.png (default: "
        "evaluations/<dataset>-<split> in RUN or PEER; needed with hf-hub:)",
    )
    _add_cpu(parser)


def add_prediction(parser: argparse.ArgumentParser) -> None:
    """Predict the classes of images: the five most likely classes of each. A run predicts as an
    ensemble, by the mean posterior of its peers. Images are resized to squares as in training;
    only the first frame of an animation is used. A file that cannot be read is named on stderr and
    skipped; the exit code is then 1, or 2 if there was no image at all.

    examples:
      %(prog)s runs/pair cat.png holiday/       # files, and folders with all that is in them
      %(prog)s runs/pair --peer resnet8-0 'photos/**/*.jpg'
      find photos -name '*.png' | %(prog)s runs/pair - --format jsonl
    """
    _add_source(parser, "RUN|PEER")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders or quoted globs; - reads names from stdin, one per line",
    )
    parser.add_argument("--peer", metavar="NAME", help="use only this peer of the run")
    _add_checkpoint(parser)
    _add_weights(parser)
    parser.add_argument(
        "--format",
        choices=("table", "jsonl", "csv"),
        help="table; jsonl: one object per image; csv: one line per image and class (default: "
        "table on a terminal, else jsonl)",
    )
    _add_cpu(parser)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Write a trained network, or all of a run, to a folder of its own. safetensors: a folder that
    timm loads (local-dir:DIR); for an ensemble, one folder per peer. onnx: a model.onnx, from
    normalised float32 images [batch, 3, size, size] to logits, or to the log of the ensemble's
    mean posterior; its outputs are compared with torch's before it is kept. config.json holds
    the class names, the input size, mean and standard deviation; README.md is a model card.
    With --push-to these files become a commit of a model repository on the Hugging Face Hub.

    examples:
      %(prog)s runs/pair --peer resnet8-0 --to resnet8
      %(prog)s runs/pair --peer best --to best          # needs a run with --val-fraction
      %(prog)s runs/pair --peer ensemble --format onnx --to ensemble
      %(prog)s runs/pair --peer best --push-to owner/name --private
    """
    _add_source(parser, "RUN")
    parser.add_argument(
        "--peer",
        metavar="NAME",
        help="a peer's name, best (by validation accuracy) or ensemble (default: the only peer)",
    )
    _add_checkpoint(parser)
    kept = "the best ones if RUN has them"
    _add_weights(parser, f"last; with --peer best and no --checkpoint, {kept}")
    parser.add_argument(
        "--to", metavar="DIR", help="a new or empty folder; optional with --push-to"
    )
    parser.add_argument(
        "--push-to",
        metavar="OWNER/NAME",
        help="a model repository on the hub, which is created if it is missing. Files of an "
        "earlier export are replaced by a new commit; a repository of something else is refused. "
        "The token is that of HF_TOKEN or hf auth login",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="create the repository of --push-to as a private one",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "onnx"),
        default="safetensors",
        help="(default: safetensors)",
    )


def _add_source(parser: argparse.ArgumentParser, name: str) -> None:
    text = "a run folder, peers/<name> of one, or hf-hub:owner/name[@revision]"
    parser.add_argument("source", metavar=name, help=text)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="latest|STEP|PATH",
        help="use the networks of a checkpoint of RUN, which need not be finished: the newest good "
        "one, that of a step, or its path (default: the trained peers of a finished run)",
    )


def _add_weights(parser: argparse.ArgumentParser, default: str = "last") -> None:
    parser.add_argument(
        "--weights",
        choices=("last", "ema", "best"),
        help="which weights of RUN: the last, their averages (a run with --ema), or those of each "
        f"network's best evaluation by validation (a run with --keep best) (default: {default})",
    )


def _add_cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")
