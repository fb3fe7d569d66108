"""What a run is: one frozen record, checked once and saved with the run. No torch here.

Every field is one flag of the command line; its ``help`` teaches what it does and in which unit.
"""

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

IntervalUnit = Literal["step", "ep", "min"]
_LEAVES_THE_RESULT_ALONE = frozenset(
    {
        "output_dir",
        "timeout",
        "cpu",
        "eval_every",
        "placement",
        "measure",
        "exchange",
        "max_nonfinite",
        "resume",
        "save_every",
        "keep_checkpoints",
        "compile",
        "compile_mode",
        "memory_format",
        "low_memory",
        "threads",
        "log_with",
    }
)


class UsageError(ValueError):
    """Wrong usage or input. Its text is one line: what, where, the values and the fix."""


def flag(default: Any, text: str, **argparse: Any) -> Any:
    """Return a dataclass field that the command line turns into a flag."""
    return dataclasses.field(default=default, metadata={"help": text, "argparse": argparse})


@dataclass(frozen=True)
class Interval:
    """How often something happens: every ``count`` optimizer steps, epochs or minutes."""

    count: float
    unit: IntervalUnit

    @classmethod
    def parse(cls, text: str, name: str) -> "Interval":
        """Read ``500`` (optimizer steps), ``2ep`` (epochs) or ``10min`` (minutes).

        Raises:
            UsageError: the text is none of the three, or the number is not positive.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|min)?", text.strip())
        unit: Any = (match[2] or "step") if match else "step"
        count = float(match[1]) if match else 0.0
        if count <= 0 or (unit != "min" and count != int(count)):
            raise UsageError(
                f"{name} {text!r} is not an interval: write optimizer steps (500), epochs (1ep) "
                "or minutes (10min)"
            )
        return cls(count, unit)

    def steps(self, steps_per_epoch: int) -> int:
        """Return the optimizer steps between two ends of the interval (0: it is in minutes)."""
        return {"step": 1, "ep": steps_per_epoch, "min": 0}[self.unit] * int(self.count)

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether the interval ends with optimizer step ``step`` (never, for minutes)."""
        period = self.steps(steps_per_epoch)
        return period > 0 and step % period == 0


@dataclass(frozen=True)
class Config:
    """The configuration of one run. The result depends on it, seed included, and nothing else.

    Raises:
        UsageError: a value is out of its range; the text names the flag and the values allowed.
    """

    cohort: tuple[str, ...] = flag(
        ("2",),
        "the networks that learn together: a number K (K times resnet32), or names with name*N, "
        "mixed freely: 'resnet32*2' wrn_28_10 timm:efficientnet_b0. Quote * and [",
        nargs="+",
        metavar="NET",
    )
    dataset: str = flag(
        "uoft-cs/cifar100",
        "hub id, local folder (parquet files or class folders of images), or 'digits' (offline)",
    )
    image_column: str | None = flag(None, "column of images (default: the only image column)")
    label_column: str | None = flag(
        None,
        "column of classes (default: the only class column, else one named fine_label, else label)",
    )
    train_split: str = flag("train", "split to train on")
    test_split: str = flag("test", "split to report on")
    image_size: int = flag(32, "pixels; images of another size are resized to a square of it")
    augment: str | None = flag(
        None,
        "random crop from a reflect-padded image, horizontal flip "
        "(default: crop-flip; crop for digits, which have no mirror image)",
        choices=("crop-flip", "crop", "none"),
    )
    epochs: int = flag(200, "passes over the training images")
    batch_size: int = flag(
        64, "images per optimizer step, over all processes; the last partial batch is dropped"
    )
    lr: float = flag(0.1, "learning rate at the start")
    momentum: float = flag(0.9, "Nesterov momentum of SGD; 0 turns it off")
    weight_decay: float = flag(5e-4, "L2 penalty, on all parameters")
    lr_step: int = flag(60, "epochs between two drops of the learning rate")
    lr_gamma: float = flag(0.1, "factor of each drop")
    max_steps: int | None = flag(None, "stop after that many optimizer steps (default: off)")
    train_limit: int | None = flag(
        None,
        "train on that many images only, chosen stratified by class, the same for every seed "
        "(default: all)",
    )
    kl_weight: float = flag(
        1.0, "weight of the KL term; 0 skips it: every network then trains independently"
    )
    temperature: float = flag(1.0, "softmax temperature T of the KL term, which is scaled by T^2")
    kl_reduction: str = flag(
        "mean", "over the K-1 peers: their mean, or their sum", choices=("mean", "sum")
    )
    kl_warmup: int = flag(0, "epochs over which the KL weight grows linearly to --kl-weight")
    update: str = flag(
        "simultaneous",
        "who is updated when. simultaneous: all peers, from the same predictions; sequential (the "
        "paper's Algorithm 1): one after the other in the order given, each predicting the batch "
        "again for those after it; official (the authors' code): one after the other, each on a "
        "batch of its own, KLs summed",
        choices=("simultaneous", "sequential", "official"),
    )
    target: str = flag(
        "peers",
        "what teaches a peer: every other peer's posterior (peers), their mean (mean-prob, the "
        "paper's DML_e: the same gradients), or the posterior of their mean logits (mean-logit)",
        choices=("peers", "mean-prob", "mean-logit"),
    )
    links: str = flag(
        "full",
        "who learns from whom: full (all from all), ring (each from the one given before it), "
        "star:PEER (all from PEER, and PEER from all), frozen (all from --frozen-peers alone), or "
        "a CSV file: teachers' names in its first line, then a line for each learner, its name "
        "and the weight of every teacher",
    )
    frozen_peers: tuple[str, ...] = flag(
        (),
        "trained networks that teach and do not learn: folders peers/<name> of finished runs, or "
        "run folders for all of their peers. In --links they are frozen-0, frozen-1, ...",
        nargs="+",
        metavar="DIR",
    )
    labelled_fraction: float = flag(
        1.0,
        "share of the training images whose labels are used, stratified by class, keyed by the "
        "seed; the cross-entropy is the mean over those of a batch",
    )
    kl_images: str = flag(
        "all",
        "with --labelled-fraction: the KL term on all images, or on the labelled ones alone",
        choices=("all", "labelled"),
    )
    seed: int = flag(0, "keys initial weights, data order, augmentation and dropout")
    output_dir: str | None = flag(None, "the run folder (default: runs/<time>-<cohort>)")
    grad_accum: int = flag(1, "parts that a batch is computed in, one after the other")
    clip_norm: float | None = flag(None, "largest gradient norm, per peer (default: off)")
    mixed_precision: str | None = flag(
        None,
        "bf16 or fp16 (GPU only) computes the networks in half precision "
        "(default: what accelerate launch says, else no)",
        choices=("no", "bf16", "fp16"),
    )
    compile: str = flag(
        "off",
        "torch.compile each network that one process trains by itself; without a word it means on, "
        "auto measures first and compiles where the run is long enough to repay it",
        nargs="?",
        const="on",
        choices=("off", "on", "auto"),
    )
    compile_mode: str = flag(
        "default",
        "with --compile, torch.compile's own: reduce-overhead uses CUDA graphs, max-autotune tries "
        "more kernels",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    memory_format: str | None = flag(
        None,
        "how images and weights lie in memory (default: channels_last on a CPU in bf16, else "
        "contiguous); channels_last is faster on a CPU, with less exact sums in single precision",
        choices=("contiguous", "channels_last"),
    )
    low_memory: bool = flag(
        False,
        "one network's activations at a time: all predict first, then each predicts again and "
        "learns; the same result for a third more work",
    )
    threads: int | None = flag(
        None,
        "threads of each process on a CPU (default: with several processes, an equal share of "
        "this machine's cores; else OMP_NUM_THREADS, or all)",
    )
    tf32: bool = flag(
        False, "TF32 for all products of matrices on CUDA: faster, with 10 bits of mantissa"
    )
    batch_norm: str = flag(
        "group",
        "with several processes, batch statistics of all of them, as in one process, or each "
        "its own (local: faster, another result)",
        choices=("group", "local"),
    )
    placement: str = flag(
        "auto",
        "with several processes: every peer in each of them (replicate), or each peer in one or "
        "more of its own, exchanging logits (split); auto predicts which is faster",
        choices=("auto", "replicate", "split"),
    )
    measure: bool = flag(
        False, "time the networks to choose a placement, instead of counting their arithmetic"
    )
    exchange: str = flag(
        "logits",
        "what crosses between processes under split: every peer's logits, or the sum of the "
        "peers' posteriors, whose volume does not grow with the cohort",
        choices=("logits", "sum"),
    )
    exchange_dtype: str | None = flag(
        None,
        "bf16 rounds the logits that teach, and halves their volume (default: as computed)",
        choices=("bf16",),
    )
    max_nonfinite: int = flag(
        10,
        "a peer whose loss is not finite skips that step; after so many in a row the run stops",
    )
    timeout: float = flag(10.0, "minutes to wait for another process before giving up")
    cpu: bool = flag(False, "stay on the CPU even where there is an accelerator")
    float64: bool = flag(False, "double precision throughout, files included: to check numerics")
    val_fraction: float = flag(
        0.0, "share of the training images held out to choose by; the test split only reports"
    )
    eval_every: str = flag(
        "1ep", "how often to evaluate: optimizer steps (500), epochs (2ep) or minutes (10min)"
    )
    save_every: str = flag(
        "1ep",
        "how often to write a checkpoint: optimizer steps, epochs or minutes; one is written at "
        "the end, and when the run is asked to stop, in any case",
    )
    keep_checkpoints: int = flag(2, "how many checkpoints to keep, the newest ones")
    log_with: tuple[str, ...] = flag(
        (),
        "trackers of Accelerate that are told what metrics.jsonl holds: tensorboard, wandb and "
        "others, or all that are installed; files go to logs in the run folder (default: none)",
        nargs="+",
        metavar="TRACKER",
    )
    resume: str | None = flag(
        None,
        "auto: go on from the newest good checkpoint of --output-dir, or start where there is "
        "none; or the path of a checkpoint or run to go on from, into a new folder",
    )

    def __post_init__(self) -> None:
        finite = {
            f.name: v
            for f in dataclasses.fields(self)
            if isinstance(v := getattr(self, f.name), (int, float)) and not isinstance(v, bool)
        }
        for name, value in finite.items():
            if isinstance(value, float):
                _require(math.isfinite(value), name, value, "a finite number")
        for name in (
            "image_size",
            "epochs",
            "batch_size",
            "lr_step",
            "grad_accum",
            "max_nonfinite",
            "keep_checkpoints",
        ):
            _require(finite[name] >= 1, name, finite[name], "at least 1")
        for name in ("lr", "weight_decay", "lr_gamma", "kl_weight", "kl_warmup", "seed"):
            _require(finite[name] >= 0, name, finite[name], "0 or more")
        for name in ("momentum", "val_fraction"):
            _require(0 <= finite[name] < 1, name, finite[name], "at least 0 and below 1")
        for name in ("temperature", "clip_norm", "timeout"):
            _require(finite.get(name, 1) > 0, name, finite.get(name), "above 0")
        for name in ("max_steps", "train_limit", "threads"):
            _require(finite.get(name, 1) >= 1, name, finite.get(name), "at least 1")
        _require(8 <= self.image_size <= 4096, "image_size", self.image_size, "8 to 4096 pixels")
        _require(self.timeout <= 10**6, "timeout", self.timeout, "at most 1000000 minutes")
        _require(self.lr_gamma <= 1, "lr_gamma", self.lr_gamma, "0 to 1")
        _require(
            self.grad_accum <= self.batch_size,
            "grad_accum",
            self.grad_accum,
            f"at most --batch-size ({self.batch_size})",
        )
        if self.exchange == "sum" and self.exchange_dtype:
            raise UsageError(
                f"--exchange-dtype {self.exchange_dtype} rounds logits; --exchange sum sends none"
            )
        _require(
            0 < self.labelled_fraction <= 1,
            "labelled_fraction",
            self.labelled_fraction,
            "above 0 and at most 1",
        )
        _require(self.seed < 2**63, "seed", self.seed, "below 2**63")
        for f in dataclasses.fields(self):
            choices, value = f.metadata["argparse"].get("choices"), getattr(self, f.name)
            if choices and value is not None:
                _require(value in choices, f.name, value, "one of " + ", ".join(choices))
        _require(bool(self.cohort), "cohort", self.cohort, "at least one network")
        if self.resume == "auto" and self.output_dir is None:
            raise UsageError("--resume auto needs --output-dir, the run folder to go on in")
        _ = self.eval_interval, self.save_interval  # reading them checks them
        self._refuse_what_excludes_each_other()

    def _refuse_what_excludes_each_other(self) -> None:
        in_turn = self.update != "simultaneous"
        for excluded, text in (
            (
                in_turn and self.placement == "split",
                f"--update {self.update} takes turns, which leaves processes of --placement split "
                "idle; use replicate",
            ),
            (
                self.update == "sequential" and self.grad_accum > 1,
                "--update sequential predicts a batch again after each update: it goes with "
                "--grad-accum 1 alone",
            ),
            (
                self.low_memory and in_turn,
                f"--low-memory cuts the step of --update simultaneous; {self.update} predicts for "
                "its own order",
            ),
            (
                self.compile == "off" and self.compile_mode != "default",
                f"--compile-mode {self.compile_mode} has nothing to do without --compile",
            ),
            (
                self.tf32 and self.float64,
                "--tf32 shortens single precision; --float64 has none of it",
            ),
            (
                self.update == "official" and self.target != "peers",
                f"--update official sums the KL to every peer; --target {self.target} has one",
            ),
            (
                self.kl_reduction == "sum" and self.target != "peers",
                f"--kl-reduction sum has nothing to add up with --target {self.target}",
            ),
            (
                self.links != "full" and self.exchange == "sum",
                "--links weighs every peer on its own, and --exchange sum sends their sum; use "
                "--exchange logits",
            ),
            (
                self.links == "frozen" and not self.frozen_peers,
                "--links frozen needs --frozen-peers, who alone teach",
            ),
            (
                self.kl_images == "labelled" and self.labelled_fraction == 1,
                "--kl-images labelled needs --labelled-fraction below 1",
            ),
        ):
            if excluded:
                raise UsageError(text)

    @property
    def eval_interval(self) -> Interval:
        """``eval_every``, parsed."""
        return Interval.parse(self.eval_every, "--eval-every")

    @property
    def save_interval(self) -> Interval:
        """``save_every``, parsed."""
        return Interval.parse(self.save_every, "--save-every")

    @property
    def kl_is_summed(self) -> bool:
        """Whether the KLs of several teachers are summed, as in the authors' code, or averaged."""
        return self.kl_reduction == "sum" or self.update == "official"

    @property
    def augmentation(self) -> str:
        """``augment`` with the data set's default filled in (a mirrored digit is no digit)."""
        return self.augment or ("crop" if self.dataset == "digits" else "crop-flip")

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Return the fields by which the results differ: {name: (mine, the other's)}."""
        mine, theirs = self.as_dict(), other.as_dict()
        return {
            name: (value, theirs[name])
            for name, value in mine.items()
            if name not in _LEAVES_THE_RESULT_ALONE and theirs[name] != value
        }

    def differences_from_start(self, saved: "Config") -> dict[str, tuple[Any, Any]]:
        """Return what forbids going on with a run that was begun as ``saved``, as ``differences``.

        A run may be made longer, and may stop at another step.
        """
        found = self.differences(saved)
        found.pop("max_steps", None)
        if self.epochs > saved.epochs:
            found.pop("epochs", None)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = dataclasses.asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Build a config from ``as_dict``'s output.

        Raises:
            UsageError: a key is unknown (the known ones are listed) or a value is out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UsageError(
                f"unknown configuration {', '.join(unknown)}; known are: {', '.join(known)}"
            )
        for name, hint in typing.get_type_hints(cls).items():
            if typing.get_origin(hint) is tuple and isinstance(values.get(name), list):
                values = values | {name: tuple(values[name])}
            accepted = typing.get_origin(hint) or hint
            accepted = accepted if accepted is not types.UnionType else hint
            value = values.get(name, getattr(cls, name))
            if not isinstance(value, accepted) and not (hint is float and type(value) is int):
                raise UsageError(f"configuration {name} is {value!r}; it must be {hint}")
        return cls(**values)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {allowed}")
