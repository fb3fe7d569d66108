"""The configuration of a run: a cohort, a seed and six sections, validated once. No torch here.

Every field is one flag of the command line. Its default, its help and its range stand on the field.
Sections group the fields by who reads them, and by what they may change:

    data       which images                        changes the result
    optim      batches, optimizer, learning rate   changes the result
    method     who learns what from whom           changes the result
    numerics   precision, batch statistics         changes the result
    compute    devices, processes, speed           same result
    run        files, evaluations, checkpoints     same result

Flags, ``config.json`` and the keywords of ``Config`` are flat; a value is read from its section, as
in ``config.optim.lr``.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import numbers
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dml_accel.core.assignments import assignment, number_of, peer_settings, refuse_repeated
from dml_accel.core.cohort import words_of
from dml_accel.core.errors import UsageError
from dml_accel.core.flags import (
    Differences,
    Interval,
    Range,
    Section,
    check_value,
    differences_of,
    flag,
    refuse,
    require,
)
from dml_accel.core.lessons import allow_recorded
from dml_accel.core.method import MethodConfig

# The words of ``--augment``, in the order in which they are applied.
AUGMENTATIONS = {
    "none": "nothing",
    "crop": "a crop from the image padded by reflection with an eighth of its side",
    "flip": "left and right, for half of the images",
    "crop-flip": "crop and flip",
    "random-resized-crop": "a crop of random area and shape, resized",
    "randaugment": "RandAugment (2 operations of magnitude 9)",
    "trivialaugment": "TrivialAugment",
    "color-jitter": "brightness, contrast and saturation",
    "erasing": "a box of random size replaced by the mean colour, for a quarter of the images",
}
# Those that are applied image by image, on the host.
_BY_ITSELF = ("random-resized-crop", "randaugment", "trivialaugment", "color-jitter")
# Images of at most so many pixels a side are small: 32 pixels suit them, and all are measured.
SMALL_IMAGES = 64
SMALL_SIZE, PHOTOGRAPH_SIZE = 32, 224
CROP_PCT = 0.875  # share of a photograph's side that is evaluated, as torchvision and timm have it
# Of a beta distribution: all shares are a half from here on.
_MOST_ALPHA = 1000
# Optimizers of one family: their usual rate is that of the paper.
_SGD = ("sgd", "nesterov", "momentum")
# What ``--peer-opt`` sets besides arguments of the optimizer.
OF_PEER = {"lr", "momentum", "optimizer", "weight_decay"}


def same_family(one: str, other: str) -> bool:
    """Return whether the learning rate of one optimizer suits another."""
    return one == other or (one in _SGD and other in _SGD)


# ---------------------------------------------------------------- the sections


@dataclass(frozen=True)
class DataConfig(Section):
    """Which images are trained on and evaluated."""

    title = "data"
    changes_result = True

    dataset: str = flag(
        "uoft-cs/cifar100",
        "local folder (class folders, parquet, metadata files, tar shards), hub id owner/name, or "
        "'digits' (offline)",
    )
    dataset_config: str | None = flag(
        None, "configuration of a data set that has several (default: its only one)"
    )
    image_column: str | None = flag(None, "column of images (default: the only image column)")
    label_column: str | None = flag(
        None,
        "column of classes (default: the only class column, else one named fine_label, else label)",
    )
    train_split: str = flag("train", "split to train on")
    test_split: str = flag("test", "split to report on")
    val_split: str = flag(
        "auto",
        "split to choose a peer or an epoch by; auto: one called val, validation or valid, if it "
        "is not --test-split and --val-fraction is 0; none: none",
    )
    test_fraction: float = flag(
        0.0,
        "for a data set without a test split: about this share of each class is held out to report "
        "on, chosen for each image by its path or row alone, the same for every seed",
        Range(at_least=0, below=1),
    )
    image_size: int | None = flag(
        None,
        "pixels per side of what networks are given (default: 32 for images of at most 64 pixels; "
        "for larger ones what pretrained networks were trained with, else 224)",
        Range(at_least=8, at_most=4096),
    )
    eval_resize: int | None = flag(
        None,
        "pixels of the shorter side to which an image is resized before its centre is cut out "
        "(default: --image-size; with random-resized-crop above 64 pixels, --image-size / 0.875)",
        Range(at_least=8, at_most=8192),
    )
    crop_mode: str = flag(
        "center",
        "what is done with an image that is not a square: its centre is cut out (center), or it is "
        "squashed into one (squash)",
        choices=("center", "squash"),
    )
    mean: tuple[float, ...] = flag(
        (),
        "mean of the red, green and blue levels, from 0 to 1, to normalise with (default: measured "
        "on the training images, or on 10,000 of them if there are more and they are above 64 "
        "pixels)",
        Range(at_least=0, at_most=1),
        nargs=3,
        metavar=("R", "G", "B"),
    )
    std: tuple[float, ...] = flag(
        (),
        "their standard deviation (default: measured as --mean)",
        Range(above=0, at_most=1),
        nargs=3,
        metavar=("R", "G", "B"),
    )
    bad_images: str = flag(
        "refuse",
        "what to do about an image that cannot be read: refuse to train, or stop with a checkpoint "
        "where it is met later (refuse); or train on the next image of its class in its place, and "
        "leave it out of evaluations (skip)",
        choices=("refuse", "skip"),
    )
    augment: tuple[str, ...] | None = flag(
        None,
        "words side by side, applied in the order of this list: "
        + "; ".join(f"{word}: {text}" for word, text in AUGMENTATIONS.items())
        + ". Arguments stand in brackets: 'randaugment[magnitude=7]' (default: crop-flip; crop "
        "for digits, because a mirrored digit is not a digit)",
        nargs="+",
        metavar="WORD",
    )
    mixup: float = flag(
        0.0,
        "mix every batch with itself in another order; the shares are drawn from a beta "
        "distribution with this alpha, 0.2 or 1 for instance, once per batch; with --cutmix too, "
        "each batch has one of the two; 0 is off",
        Range(at_least=0, at_most=_MOST_ALPHA),
    )
    cutmix: float = flag(
        0.0,
        "paste a box from the same batch in another order into every batch; alpha as for --mixup; "
        "0 is off",
        Range(at_least=0, at_most=_MOST_ALPHA),
    )
    label_smoothing: float = flag(
        0.0,
        "share of each label that is spread evenly over all classes, 0.1 for instance",
        Range(at_least=0, below=1),
    )
    class_weights: str = flag(
        "none",
        "balanced: weight the cross-entropy of each training image by the inverse frequency of its "
        "class, with a mean weight of 1",
        choices=("none", "balanced"),
    )
    train_limit: int | None = flag(
        None,
        "train on this many images only, stratified by class, the same for every seed "
        "(default: all)",
        Range(at_least=1),
    )
    val_fraction: float = flag(
        0.0,
        "share of the training images held out for validation: to choose a peer or an epoch. The "
        "test split is for reporting only",
        Range(at_least=0, below=1),
    )
    labelled_fraction: float = flag(
        1.0,
        "share of the training images whose labels are used, stratified by class and keyed by the "
        "seed; the cross-entropy is averaged over the labelled images of a batch",
        Range(above=0, at_most=1),
    )

    def refused_on_resume(self, saved: "Section") -> Differences:
        """The data set may have another name or place: its content is compared instead."""
        found = self.differences(saved)
        # A run that refuses has met no bad image yet; one that skips may refuse the next.
        for name in ("dataset", "bad_images"):
            found.pop(name, None)
        return found

    def check(self) -> None:
        """Refuse mixed images where some have no label."""
        for name in ("mixup", "cutmix"):
            refuse(
                getattr(self, name) > 0 and self.labelled_fraction < 1,
                f"--{name} mixes labels, but with --labelled-fraction {self.labelled_fraction} "
                "some images have none: drop one of the two",
            )
        refuse(self.augment == (), "--augment names nothing: write none, or leave it out")
        refuse(
            self.augment is not None and "none" in self.augment and len(self.augment) > 1,
            f"--augment {' '.join(self.augment or ())}: none stands alone",
        )
        for name in ("mean", "std"):
            values = getattr(self, name)
            refuse(
                len(values) not in (0, 3),
                f"--{name} has {len(values)} values; it needs three: red, green and blue",
            )
        refuse(
            self.eval_resize is not None
            and self.image_size is not None
            and self.eval_resize < self.image_size,
            f"--eval-resize {self.eval_resize} is below --image-size {self.image_size}, which is "
            "cut out of it",
        )
        refuse(
            self.val_fraction > 0 and self.val_split not in ("auto", "none"),
            f"--val-fraction {self.val_fraction:g} cuts a validation split from the training "
            f"images, and --val-split {self.val_split} names one: drop one of the two",
        )
        refuse(
            self.val_split == self.train_split,
            f"--val-split and --train-split are both {self.val_split!r}: validation images must "
            "not be training images",
        )

    @property
    def augmentation(self) -> tuple[str, ...]:
        """``augment`` with the default of the data set filled in."""
        return self.augment or (("crop",) if self.dataset == "digits" else ("crop-flip",))

    @property
    def size(self) -> int:
        """``image_size``, which is 32 until the images are known."""
        return self.image_size or SMALL_SIZE

    @property
    def cuts_originals(self) -> bool:
        """Whether training images are cut from the originals, not from resized ones."""
        return any(word.startswith("random-resized-crop") for word in self.augmentation)

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the centre is cut out."""
        if self.eval_resize is not None:
            return self.eval_resize
        shrinks = self.cuts_originals and self.size > SMALL_IMAGES
        return round(self.size / CROP_PCT) if shrinks else self.size


@dataclass(frozen=True)
class OptimConfig(Section):
    """Batches, optimizer and learning rate."""

    title = "optim"
    changes_result = True
    epochs: int = flag(200, "passes over the training images", Range(at_least=1))
    max_steps: int | None = flag(
        None, "stop after this many optimizer steps (default: off)", Range(at_least=1)
    )
    batch_size: int = flag(
        64,
        "images per optimizer step, over all processes; the last partial batch is dropped",
        Range(at_least=1),
    )
    grad_accum: int = flag(
        1, "micro-batches per batch, computed one after the other", Range(at_least=1)
    )
    optimizer: str = flag(
        "sgd",
        "any optimizer of timm (timm.optim.list_optimizers()), such as adamw, lamb or lion; sgd "
        "has Nesterov momentum",
    )
    opt_args: tuple[str, ...] = flag(
        (),
        "further arguments of the optimizer, as betas=0.9,0.95 or eps=1e-6 (default: none)",
        nargs="+",
        metavar="KEY=VALUE",
    )
    lr: float | None = flag(
        None,
        "highest learning rate (default: 0.1 with sgd, nesterov and momentum, else 0.001)",
        Range(at_least=0),
    )
    lr_schedule: str = flag(
        "step",
        "how the rate falls after --warmup: by --lr-gamma every --lr-step epochs (step) or at "
        "each of --lr-milestones (milestones); to --lr-min at the end of --epochs along half a "
        "cosine or a power of what is left (poly); or never (constant)",
        choices=("step", "milestones", "cosine", "poly", "constant"),
    )
    lr_step: int = flag(60, "epochs between two drops of the learning rate", Range(at_least=1))
    lr_milestones: tuple[float, ...] = flag(
        (),
        "epochs of the drops of --lr-schedule milestones, as 150 180 210 (default: none)",
        Range(above=0),
        nargs="+",
        metavar="EPOCH",
    )
    lr_gamma: float = flag(0.1, "factor of each drop", Range(at_least=0, at_most=1))
    lr_min: float = flag(0.0, "rate at which cosine and poly end", Range(at_least=0))
    lr_power: float = flag(1.0, "power of --lr-schedule poly; 1 is a line", Range(above=0))
    lr_every: str = flag(
        "step",
        "whether cosine, poly and the warm-up change the rate every optimizer step or every epoch",
        choices=("step", "epoch"),
    )
    warmup: float = flag(
        0.0,
        "epochs over which the rate grows linearly to --lr; fractions are allowed",
        Range(at_least=0),
    )
    momentum: float = flag(
        0.9,
        "momentum of optimizers that take one; Nesterov's with sgd; 0 turns it off",
        Range(at_least=0, below=1),
    )
    weight_decay: float = flag(
        5e-4,
        "L2 penalty on all parameters (decoupled from the gradient with adamw and its like)",
        Range(at_least=0),
    )
    wd_exclude_norm_bias: bool = flag(
        False, "no weight decay on biases and on the parameters of norms"
    )
    clip_norm: float | None = flag(
        None, "largest gradient norm, per peer (default: off)", Range(above=0)
    )
    peer_opt: tuple[str, ...] = flag(
        (),
        "other settings for one peer, as 'mobilenet-0:lr=0.01,optimizer=adamw': lr, optimizer, "
        "momentum, weight_decay, and arguments of its optimizer; can be repeated (default: none)",
        nargs="+",
        action="extend",
        metavar="PEER:KEY=VALUE",
    )
    ema: float | None = flag(
        None,
        "keep an exponential moving average of each peer's weights with this decay, 0.999 for "
        "instance, evaluated and written beside the weights themselves (default: off)",
        Range(above=0, below=1),
    )
    early_stop: int | None = flag(
        None,
        "stop after this many evaluations without a better mean validation top-1 of the cohort; "
        "needs --val-fraction (default: off)",
        Range(at_least=1),
    )

    def __post_init__(self) -> None:
        if self.lr is None:
            rate = 0.1 if self.optimizer in _SGD else 1e-3
            object.__setattr__(self, "lr", rate)
        super().__post_init__()

    def check(self) -> None:
        """Refuse more micro-batches than images, and a schedule that cannot be followed."""
        if self.grad_accum > self.batch_size:
            raise UsageError(
                f"--grad-accum is {self.grad_accum}; it must be at most --batch-size "
                f"({self.batch_size})"
            )
        drops, listed = self.lr_milestones, " ".join(f"{at:g}" for at in self.lr_milestones)
        by_milestones = self.lr_schedule == "milestones"
        refuse(
            by_milestones and not drops,
            "--lr-schedule milestones needs --lr-milestones, the epochs of the drops",
        )
        refuse(
            bool(drops) and not by_milestones,
            f"--lr-milestones {listed} needs --lr-schedule milestones, not {self.lr_schedule}",
        )
        refuse(
            any(b <= a for a, b in itertools.pairwise(drops)),
            f"--lr-milestones {listed} is out of order: each must be above the one before",
        )
        refuse(
            self.warmup >= self.epochs,
            f"--warmup {self.warmup:g} is not below --epochs {self.epochs}, so the rate would "
            "never reach --lr: lower it",
        )
        refuse(
            self.depends_on_last_epoch and self.lr_min > self.highest_lr,
            f"--lr-min {self.lr_min:g} is above --lr {self.highest_lr:g}, so the rate would grow: "
            "lower it",
        )
        refuse_repeated("--opt-args", [assignment("--opt-args", one)[0] for one in self.opt_args])
        for text in self.peer_opt:
            self.of_peer(peer_settings(text)[0])

    @property
    def highest_lr(self) -> float:
        """``lr``, which is a number once the section is made."""
        assert self.lr is not None
        return self.lr

    @property
    def depends_on_last_epoch(self) -> bool:
        """Whether the learning rate of a step depends on how many epochs there are in all."""
        return self.lr_schedule in ("cosine", "poly")

    def of_peer(self, name: str) -> "OptimConfig":
        """Return the settings of one peer: these, with what ``peer_opt`` says of it."""
        own: dict[str, str] = {}
        for text in self.peer_opt:
            peer, settings = peer_settings(text)
            if peer == name:
                own |= settings
        if not own:
            return self
        changes: dict[str, Any] = {"peer_opt": ()}
        for key in OF_PEER & own.keys():
            value = own.pop(key)
            changes[key] = (
                value if key == "optimizer" else number_of(f"--peer-opt {name}", key, value)
            )
        if not same_family(changes.get("optimizer", self.optimizer), self.optimizer):
            changes = {"lr": None, "opt_args": ()} | changes  # those were meant for another one
        shared = changes.get("opt_args", self.opt_args)
        changes["opt_args"] = (
            *(text for text in shared if assignment("--opt-args", text)[0] not in own),
            *(f"{key}={value}" for key, value in own.items()),
        )
        try:
            return dataclasses.replace(self, **changes)
        except UsageError as error:
            raise UsageError(f"--peer-opt {name}: {error}") from None

    @property
    def smallest_micro_batch(self) -> int:
        """Images in the smallest micro-batch."""
        return self.batch_size // self.grad_accum

    def refused_on_resume(self, saved: "Section") -> Differences:
        """A resumed run may stop at another step, and may have more epochs."""
        found = self.differences(saved)
        found.pop("max_steps", None)
        longer = self.epochs > typing.cast(OptimConfig, saved).epochs
        if longer and not self.depends_on_last_epoch:
            found.pop("epochs", None)
        return found


@dataclass(frozen=True)
class NumericsConfig(Section):
    """Precision and batch statistics."""

    title = "numerics"
    changes_result = True

    mixed_precision: str | None = flag(
        None,
        "bf16, or fp16 (GPU only), computes the networks in half precision "
        "(default: what accelerate launch says, else no)",
        choices=("no", "bf16", "fp16"),
    )
    float64: bool = flag(False, "double precision throughout, files included: to check numerics")
    tf32: bool = flag(False, "TF32 for all matrix products on CUDA: faster, 10 bits of mantissa")
    batch_norm: str = flag(
        "group",
        "with several processes: batch statistics over all of them, as in one process (group), or "
        "over each one's own images (local: faster, but another result)",
        choices=("group", "local"),
    )
    exchange_dtype: str | None = flag(
        None,
        "bf16 rounds the logits that peers learn from, and halves their volume "
        "(default: as computed)",
        choices=("bf16",),
    )

    def check(self) -> None:
        """Refuse TF32 in double precision."""
        refuse(self.tf32 and self.float64, "--tf32 has no effect with --float64: drop one")


@dataclass(frozen=True)
class ComputeConfig(Section):
    """Devices, processes and speed; none of it is meant to change the result."""

    title = "compute"
    changes_result = False

    cpu: bool = flag(False, "use the CPU even if there is an accelerator")
    threads: int | None = flag(
        None,
        "threads of each process on a CPU (default: with several processes, an equal share of "
        "this machine's cores; else OMP_NUM_THREADS, or all)",
        Range(at_least=1),
    )
    processes: str = flag(
        "auto",
        "processes that the command starts by itself on a CPU, each for a part of the cohort: a "
        "number, 1 for none; auto: as many as finish sooner, by a fixed rule (not in Python, not "
        "under accelerate launch or torchrun)",
        metavar="N",
    )
    compile: str = flag(
        "auto",
        "torch.compile for each network that a single process trains: off, on (--compile alone), "
        "or auto: if the run is long enough to repay it, by a fixed rule",
        nargs="?",
        const="on",
        choices=("off", "on", "auto"),
    )
    compile_mode: str = flag(
        "default",
        "mode of torch.compile: reduce-overhead uses CUDA graphs, max-autotune tries more "
        "kernels (on a CPU only)",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    memory_format: str | None = flag(
        None,
        "memory layout of images and weights (default: channels_last on a CPU in single or half "
        "precision, where it is faster, else contiguous; contiguous too for networks of your own)",
        choices=("contiguous", "channels_last"),
    )
    low_memory: bool = flag(
        False,
        "keep the activations of one network at a time: all predict first, then each predicts "
        "again and is updated; the same result for a third more work",
    )
    return_memory: bool = flag(
        False,
        "return the memory of each step to the system, as glibc does by itself; slower for large "
        "batches (default: keep it for the next step)",
    )
    feed: str = flag(
        "auto",
        "where images come from: all are decoded once and kept in memory (memory), or each is read "
        "and decoded when it is needed by processes of its own (loader); auto: memory if they fit "
        "into a quarter of it, and are not cut from larger originals. The pixels are the same",
        choices=("auto", "memory", "loader"),
    )
    images_on: str = flag(
        "auto",
        "where --feed memory keeps images: on the device, or in the memory of the host, from which "
        "each batch is copied; auto: on the device if they take at most a quarter of its memory",
        choices=("auto", "device", "host"),
    )
    workers: int | None = flag(
        None,
        "processes that decode images for each training process with --feed loader; 0: none "
        "(default: its share of the cores, at most 8; half of it without an accelerator)",
        Range(at_least=0, at_most=256),
    )
    placement: str = flag(
        "auto",
        "with several processes: every peer in each process (replicate), or each peer in one or "
        "more processes of its own, which exchange logits (split); auto predicts which is faster",
        choices=("auto", "replicate", "split"),
    )
    measure: bool = flag(
        False, "choose the placement by timing the networks, not by counting their operations"
    )
    exchange: str = flag(
        "logits",
        "what processes exchange under split: the logits of every peer, or the sum of the peers' "
        "posteriors, whose volume does not grow with the cohort",
        choices=("logits", "sum"),
    )
    timeout: float = flag(
        10.0,
        "minutes to wait for another process before giving up",
        Range(above=0, at_most=10**6),
    )

    def check(self) -> None:
        """Refuse a mode of compilation without compilation, and no number of processes."""
        word = self.processes
        refuse(
            word != "auto" and not re.fullmatch("[1-9][0-9]{0,5}", word),
            f"--processes is {word}; it must be auto or a whole number of at least 1",
        )
        refuse(
            self.compile == "off" and self.compile_mode != "default",
            f"--compile-mode {self.compile_mode} has no effect without --compile",
        )

    @property
    def own_processes(self) -> int | None:
        """``processes``, read; None for ``auto``."""
        return None if self.processes == "auto" else int(self.processes)


@dataclass(frozen=True)
class RunConfig(Section):
    """The run folder, evaluations, checkpoints and trackers."""

    title = "run"
    changes_result = False

    output_dir: str | None = flag(None, "the run folder (default: runs/<time>-<cohort>)")
    resume: str | None = flag(
        None,
        "auto: resume from the newest good checkpoint of --output-dir, or start if there is none; "
        "or the path of a checkpoint or run to continue in a new folder",
    )
    eval_every: str = flag(
        "1ep", "how often to evaluate: optimizer steps (500), epochs (2ep) or minutes (10min)"
    )
    save_every: str = flag(
        "1ep",
        "how often to write a checkpoint: optimizer steps, epochs or minutes; one is always "
        "written at the end, and when the run is asked to stop",
    )
    keep: str = flag(
        "last",
        "best: beside the last weights of each peer, keep those of its best evaluation by "
        "validation top-1; needs --val-fraction",
        choices=("last", "best"),
    )
    keep_checkpoints: int = flag(2, "how many of the newest checkpoints to keep", Range(at_least=1))
    max_nonfinite: int = flag(
        10,
        "stop after this many steps in a row in which a peer's loss is not finite; the peer skips "
        "those steps",
        Range(at_least=1),
    )
    log_with: tuple[str, ...] = flag(
        (),
        "trackers of Accelerate that receive the records of metrics.jsonl: tensorboard, wandb and "
        "others, or all that are installed; files go to logs in the run folder (default: none)",
        nargs="+",
        metavar="TRACKER",
    )

    def check(self) -> None:
        """Refuse intervals that cannot be read, and ``--resume auto`` without a folder."""
        refuse(
            self.resume == "auto" and self.output_dir is None,
            "--resume auto needs --output-dir, the run folder to resume",
        )
        _ = self.eval_interval, self.save_interval  # parsing them checks them

    @property
    def eval_interval(self) -> Interval:
        """``eval_every``, parsed."""
        return Interval.parse(self.eval_every, "--eval-every")

    @property
    def save_interval(self) -> Interval:
        """``save_every``, parsed."""
        return Interval.parse(self.save_every, "--save-every")


# ---------------------------------------------------------------- the whole


@dataclass(frozen=True, init=False)
class Config:
    """The configuration of one run. Its result depends on this and on nothing else.

    Every flag is a keyword: ``Config(epochs=5, lr=0.05)``. ``config.optim.lr`` reads one back.

    Raises:
        UsageError: a name is unknown, a value has the wrong type or is out of its range, or values
            exclude each other; the text names the flag and what is allowed.
    """

    cohort: tuple[str, ...] = flag(
        ("2",),
        "the networks that learn together: a number K (K times resnet32), or names with name*N, "
        "freely mixed: 'resnet32*2' wrn_28_10 timm:efficientnet_b0. Quote * and [",
        nargs="+",
        metavar="NET",
    )
    seed: int = flag(
        0,
        "keys initial weights, data order, augmentation and dropout",
        Range(at_least=0, below=2**63),
    )
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    method: MethodConfig = MethodConfig()  # noqa: RUF009 - frozen
    numerics: NumericsConfig = NumericsConfig()
    compute: ComputeConfig = ComputeConfig()
    run: RunConfig = RunConfig()

    def __init__(self, /, **values: Any) -> None:
        known = flag_types()
        unknown = sorted(set(values) - set(known))
        meant = near(unknown[0], known) if unknown else []
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"known are: {', '.join(known)}"
        refuse(bool(unknown), f"unknown configuration {', '.join(unknown)}; {hint}")
        values = {name: typed(name, value) for name, value in values.items()}
        for field in dataclasses.fields(type(self)):
            value = values.get(field.name, field.default)
            if isinstance(value, Section):
                value = type(value)(**{n: values[n] for n in value.names() if n in values})
            else:
                check_value(field, value)
            object.__setattr__(self, field.name, value)
        require(bool(self.cohort), "cohort", self.cohort, "at least one network")
        _refuse_conflicts(self)

    @property
    def sections(self) -> dict[str, Section]:
        """The six sections by name."""
        found = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: value for name, value in found if isinstance(value, Section)}

    def changed(self, **values: Any) -> "Config":
        """Return a copy in which some flags have other values."""
        return Config(**self.as_dict() | values)

    def as_dict(self) -> dict[str, Any]:
        """Return all flags, flat, as plain JSON values."""
        values: dict[str, Any] = {"cohort": self.cohort, "seed": self.seed}
        for section in self.sections.values():
            values |= {name: getattr(section, name) for name in section.names()}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def differences(self, other: "Config") -> Differences:
        """Return the flags by which the results differ: {name: (mine, the other's)}."""
        found = differences_of(self, other, ("cohort", "seed"))
        for name, section in self.sections.items():
            if section.changes_result:
                found |= section.differences(other.sections[name])
        return found | self._other_evaluations(other)

    def refused_on_resume(self, saved: "Config") -> Differences:
        """Return the differences to a saved run that forbid resuming it: {name: (mine, saved)}."""
        found = differences_of(self, saved, ("cohort", "seed"))
        for name, section in self.sections.items():
            found |= section.refused_on_resume(saved.sections[name])
        return found | self._other_evaluations(saved)

    def _other_evaluations(self, other: "Config") -> Differences:
        """Return another ``--eval-every``, where it decides when training ends."""
        counts = self.optim.early_stop is not None
        return differences_of(self.run, other.run, ("eval_every",)) if counts else {}


def _refuse_conflicts(config: Config) -> None:
    """Refuse what sections exclude in each other."""
    method, compute = config.method, config.compute
    schedule = method.schedule
    by_itself = [word for word in config.data.augmentation if word.split("[")[0] in _BY_ITSELF]
    refuse(
        compute.images_on == "device" and bool(by_itself),
        f"--images-on device cannot be had with {' '.join(by_itself)}, which works on the host",
    )
    refuse(
        compute.images_on != "auto" and compute.feed == "loader",
        f"--images-on {compute.images_on} has no effect with --feed loader: drop one",
    )
    refuse(
        schedule.takes_turns and compute.placement == "split",
        f"--update {method.update} updates peers in turn, which leaves processes of --placement "
        "split idle: use --placement replicate",
    )
    refuse(
        not schedule.splits_batches and config.optim.grad_accum > 1,
        f"--update {method.update} predicts each batch again after an update, so it needs "
        "--grad-accum 1",
    )
    refuse(
        schedule.takes_turns and compute.low_memory,
        f"--low-memory works with --update simultaneous only, not with {method.update}",
    )
    refuse(
        compute.exchange == "sum" and config.numerics.exchange_dtype is not None,
        f"--exchange-dtype {config.numerics.exchange_dtype} rounds logits, but --exchange sum "
        "sends none: drop one",
    )
    refuse(
        compute.exchange == "sum" and bool(method.needs_pairs),
        f"{method.needs_pairs} compares peers one by one, but --exchange sum sends only their sum: "
        "use --exchange logits",
    )
    for name in ("mixup", "cutmix"):
        refuse(
            getattr(config.data, name) > 0 and bool(method.needs_labels),
            f"{method.needs_labels} needs one label for each image, and --{name} gives each two: "
            "drop one of them",
        )
    refuse(
        config.data.labelled_fraction < 1
        and method.kl_images == "all"
        and bool(method.needs_labels),
        f"{method.needs_labels} needs labels, but --kl-images all has a KL term on images without: "
        "add --kl-images labelled",
    )
    if schedule.pauses:
        peers = sum(len(word.peers) for word in words_of(config.cohort))
        refuse(peers != 2, f"--update {method.update} is made for two peers, not for {peers}")
    refuse(
        compute.exchange == "sum" and method.links != "full",
        "--links weighs every peer separately, but --exchange sum sends only their sum: use "
        "--exchange logits",
    )
    refuse(
        method.kl_images == "labelled" and config.data.labelled_fraction == 1,
        "--kl-images labelled needs --labelled-fraction below 1",
    )
    refuse(
        method.teach_with == "ema" and config.optim.ema is None,
        "--teach-with ema needs --ema, the decay of the averages",
    )
    refuse(
        method.teach_with == "ema" and config.numerics.batch_norm == "local",
        "--teach-with ema needs --batch-norm group: averages predict by their running statistics, "
        "which must be the same in all processes of a peer",
    )
    stale = f"--exchange-every {method.exchange_every}"
    refuse(
        method.exchange_every > 1 and config.numerics.batch_norm == "local",
        f"{stale} needs --batch-norm group: weights of the last exchange predict by their running "
        "statistics, which must be the same in all processes of a peer",
    )
    for name, on in (
        ("--exchange sum", compute.exchange == "sum"),
        (
            f"--exchange-dtype {config.numerics.exchange_dtype}",
            config.numerics.exchange_dtype is not None,
        ),
    ):
        refuse(
            method.exchange_every > 1 and on,
            f"{name} has no effect with {stale}, which sends weights: drop one",
        )
    for name, on in (
        ("--keep best", config.run.keep == "best"),
        (f"--early-stop {config.optim.early_stop}", config.optim.early_stop is not None),
    ):
        refuse(
            on and config.data.val_fraction == 0 and config.data.val_split == "none",
            f"{name} needs --val-fraction above 0, or a --val-split: the test split is for "
            "reporting only",
        )
    refuse(
        method.kl_warmup > config.optim.epochs,
        f"--kl-warmup {method.kl_warmup} is more than --epochs {config.optim.epochs}, so the KL "
        "weight would never reach --kl-weight: lower it",
    )
    if config.optim.max_steps is not None:
        refuse(
            method.burn_in >= config.optim.max_steps,
            f"--burn-in {method.burn_in} is not below --max-steps {config.optim.max_steps}, so the "
            "KL term would never begin: lower it",
        )


# ---------------------------------------------------------------- flags


@dataclass(frozen=True)
class FlagGroup:
    """Flags that stand together in ``--help``: a section, or the cohort and the seed."""

    title: str
    text: str
    fields: tuple[dataclasses.Field[Any], ...]


@functools.cache
def flag_groups() -> tuple[FlagGroup, ...]:
    """Return all flags in groups, in the order of ``--help``."""
    own = tuple(field for field in dataclasses.fields(Config) if "help" in field.metadata)
    found = [FlagGroup("cohort", "The networks and their random seed.", own)]
    for field in dataclasses.fields(Config):
        if isinstance(field.default, Section):
            section, text = field.default, field.default.__doc__ or ""
            found.append(FlagGroup(section.title, text, dataclasses.fields(section)))
    return tuple(found)


@functools.cache
def flag_types() -> Mapping[str, Any]:
    """Return the type of every flag, by name."""
    owners = [Config, *(type(f.default) for f in dataclasses.fields(Config))]
    hints = {name: hint for owner in owners for name, hint in typing.get_type_hints(owner).items()}
    return {field.name: hints[field.name] for group in flag_groups() for field in group.fields}


# Of two names, from 0 to 1 as ``difflib`` counts it: above this one is a slip of the other.
_ALIKE = 0.82
_MOST_HINTS = 3


def near(name: str, known: Iterable[str]) -> list[str]:
    """Return the flag that a name misspells, or the few that it begins.

    A flag that merely shares letters with it would mislead.

    Args:
        name: as it was written.
        known: names of flags, with dashes before and within them or as keywords.
    """

    # Compared without dashes before them, or any two short flags would look alike.
    def bare(one: str) -> str:
        return one.strip("-").replace("_", "-")

    flags = {bare(flag): flag for flag in known}
    misspelt = difflib.get_close_matches(bare(name), flags, n=1, cutoff=_ALIKE)
    begun = [flag for flag in flags if flag.startswith(bare(name))]
    return [flags[flag] for flag in misspelt or (begun if len(begun) <= _MOST_HINTS else ())]


# Flags whose words may be whole numbers: 4 networks, every 500 steps.
_WORDS_OR_NUMBERS = ("cohort", "eval_every", "processes", "save_every")


def _plain(value: Any, accepted: Iterable[Any]) -> Any:
    """Return the plain value of a path, or of a number of numpy's; 1 is 1.0 if that is accepted."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        whole = int(value)
        if float not in accepted:
            return whole
        return math.inf if abs(whole) > sys.float_info.max else float(whole)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return value


def _several(value: Any) -> Any:
    """Return the values of a flag that takes several, where they are written in another way.

    A single one may stand alone, and words that are key=value may be a mapping.
    """
    if isinstance(value, Mapping):
        return tuple(f"{name}={one}" for name, one in value.items())
    alone = isinstance(value, (str, os.PathLike, numbers.Real)) and not isinstance(value, bool)
    return (value,) if alone else value


def _word(name: str, value: Any) -> Any:
    """Return a whole number as the word that it is on the command line, where a flag takes both."""
    fits = name in _WORDS_OR_NUMBERS and type(value) is int and abs(value) < 2**63
    return str(value) if fits else value


def typed(name: str, value: Any) -> Any:
    """Return the value of a flag: lists are made tuples, and paths text.

    Raises:
        UsageError: it does not have the type of the flag.
    """
    hint = flag_types()[name]
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    several = next((one for one in accepted if typing.get_origin(one) is tuple), None)
    found = _several(value) if several else value
    if several and isinstance(found, (list, tuple)):
        kind = typing.get_args(several)[0]
        found = tuple(_word(name, _plain(one, (kind,))) for one in found)
        if all(type(one) is kind for one in found):
            return found
    else:
        found = _word(name, _plain(found, accepted))
        if type(found) in accepted:
            return found
    words = hint.__name__ if isinstance(hint, type) else str(hint)  # int, or tuple[str, ...]
    raise UsageError(f"configuration {name} is {reprlib.repr(value)}; its type must be {words}")


def saved_config(description: Mapping[str, Any]) -> Config:
    """Return the configuration of a run from a file that the run has written.

    Raises:
        UsageError: it is of another version.
    """
    allow_recorded(description.get("registered"))
    return Config(**description["config"])


def differences_text(differences: Differences) -> str:
    """Return in words how a saved run was started, and what the flags of this command say.

    Args:
        differences: {name: (this command's value, the saved one)}.
    """

    def said(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    names = {
        name: f"--{name.replace('_', '-')}" if name in flag_types() else name
        for name in differences
    }
    started = ", ".join(f"{names[n]} {said(saved)}" for n, (_, saved) in differences.items())
    now = ", ".join(f"{names[n]} {said(mine)}" for n, (mine, _) in differences.items())
    return f"was started with {started}, but this command says {now}"
