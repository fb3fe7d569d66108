"""The section *method* of the configuration: who learns what from whom. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass

from dml_accel.core.flags import Range, Section, flag, refuse
from dml_accel.core.lessons import DIVERGENCES, TARGETS, DivergenceFacts, TargetFacts
from dml_accel.core.source_code import source_sha256
from dml_accel.core.updates import UPDATE_SCHEDULES, UpdateSchedule


def _in_words(known: Mapping[str, DivergenceFacts] | Mapping[str, TargetFacts]) -> str:
    return "; ".join(f"{one.name}: {one.text}" for one in known.values() if not one.missing)


@dataclass(frozen=True)
class MethodConfig(Section):
    """Who learns what from whom."""

    title = "method"
    changes_result = True

    kl_weight: float = flag(
        1.0,
        "weight of the KL term; 0 skips it, so every network trains independently",
        Range(at_least=0),
    )
    ce_weight: float = flag(1.0, "weight of the cross-entropy with the labels", Range(at_least=0))
    temperature: float = flag(
        1.0, "softmax temperature T of the KL term, which is scaled by T^2", Range(above=0)
    )
    divergence: str = flag(
        "kl",
        lambda: (
            "what a peer minimises towards its teachers, whose posterior is p, its own q. "
            f"{_in_words(DIVERGENCES)}. The KL term is this divergence, whatever it is"
        ),
        choices=DIVERGENCES,
    )
    divergence_args: tuple[str, ...] = flag(
        (),
        lambda: (
            "numbers that the divergence takes, as alpha=1 beta=8 (default: "
            + "; ".join(f"{one.name}: {one.usual}" for one in DIVERGENCES.values() if one.arguments)
            + ")"
        ),
        nargs="+",
        metavar="KEY=VALUE",
    )
    standardize: bool = flag(
        False,
        "before the temperature, give the logits of each image a mean of 0 and a deviation of 1 "
        "over the classes, in teachers and learners: peers learn proportions, not sizes",
    )
    gate: str = flag(
        "none",
        "which predictions teach: all (none), or only those whose top class is the label (correct)",
        choices=("none", "correct"),
    )
    kl_reduction: str = flag(
        "mean", "mean or sum over the K-1 other peers", choices=("mean", "sum")
    )
    kl_warmup: int = flag(
        0, "epochs over which the KL weight grows to --kl-weight", Range(at_least=0)
    )
    kl_ramp: str = flag(
        "linear",
        "how it grows: along a line, or along exp(-5 (1 - t)^2) (sigmoid)",
        choices=("linear", "sigmoid"),
    )
    burn_in: int = flag(
        0,
        "optimizer steps before the KL term begins; --kl-warmup counts from there",
        Range(at_least=0),
    )
    exchange_every: int = flag(
        1,
        "optimizer steps between two exchanges. 1: peers learn from each other's predictions in "
        "this step. Above: from those of each other's weights as they were at the last exchange, "
        "which each process predicts with itself (codistillation, arXiv 1804.03235)",
        Range(at_least=1),
    )
    update: str = flag(
        "simultaneous",
        "which peers are updated when. "
        + "; ".join(f"{one.name}: {one.text}" for one in UPDATE_SCHEDULES.values()),
        choices=tuple(UPDATE_SCHEDULES),
    )
    target: str = flag(
        "peers",
        lambda: f"what a peer learns from. {_in_words(TARGETS)}",
        choices=TARGETS,
    )
    links: str = flag(
        "full",
        "who learns from whom: full (all from all), ring (each from the one given before it), "
        "star:PEER (all from PEER, and PEER from all), leader (the peer given last teaches nobody; "
        "all others teach it and each other), frozen (all from --frozen-peers only), or "
        "a CSV file: teachers' names in its first line, then a line for each learner with its name "
        "and the weight of every teacher",
    )
    frozen_peers: tuple[str, ...] = flag(
        (),
        "trained networks that teach and are not updated: folders peers/<name> of finished runs, "
        "run folders for all of their peers, or hf-hub:owner/name. In --links they are frozen-0, "
        "frozen-1, ...",
        nargs="+",
        metavar="DIR",
    )
    teach_with: str = flag(
        "weights",
        "what a peer teaches with: its weights as they are trained, or with --ema their average "
        "(ema)",
        choices=("weights", "ema"),
    )
    kl_images: str = flag(
        "all",
        "with --labelled-fraction: the KL term on all images, or on the labelled ones only",
        choices=("all", "labelled"),
    )

    def check(self) -> None:
        """Refuse what the target, the divergence, the gate or the teachers do not have."""
        target, divergence = self.one_target, self.facts
        refuse(
            target.is_single and self.schedule.sums_kl,
            f"--update {self.update} sums the KL terms of all peers, but --target {self.target} "
            "has a single one: use --target peers",
        )
        refuse(
            target.is_single and self.kl_reduction == "sum",
            f"--kl-reduction sum needs --target peers: --target {self.target} has a single KL term",
        )
        refuse(
            self.target == "mean-prob" and self.divergence != "kl",
            f"--divergence {self.divergence} needs logarithms of the target, and a mean of "
            "posteriors is known only up to the rounding of a sum: use --target mean-logit",
        )
        refuse(
            target.is_single and divergence.own_temperature,
            f"--divergence {self.divergence} compares peers at two temperatures, and --target "
            f"{self.target} has one: use --target peers",
        )
        refuse(
            target.is_single and self.gate != "none",
            f"--gate {self.gate} needs --target peers: --target {self.target} is made of all peers "
            "together",
        )
        refuse(
            target.is_shared and self.links != "full",
            f"--target {self.target} is one target for all peers, so --links must be full",
        )
        refuse(
            divergence.own_temperature and self.temperature != 1,
            f"--divergence {self.divergence} has temperatures of its own: leave --temperature "
            f"at 1, not {self.temperature:g}",
        )
        refuse(
            self.kl_ramp != "linear" and self.kl_warmup == 0,
            f"--kl-ramp {self.kl_ramp} has no effect without --kl-warmup: drop it",
        )
        refuse(
            self.ce_weight == 0 and self.kl_weight == 0,
            "--ce-weight and --kl-weight are both 0, so there is nothing to learn",
        )
        refuse(
            self.ce_weight == 0 and self.burn_in > 0,
            f"--ce-weight 0 leaves nothing to learn in the {self.burn_in} steps of --burn-in: drop "
            "one",
        )
        refuse(
            self.links == "frozen" and not self.frozen_peers,
            "--links frozen needs --frozen-peers, the only teachers",
        )
        refuse(
            self.teach_with == "ema" and self.schedule.takes_turns,
            f"--teach-with ema needs --update simultaneous: with {self.update}, peers learn from "
            "weights that were updated within the step",
        )
        refuse(
            self.schedule.pauses and (self.teach_with == "ema" or bool(self.frozen_peers)),
            f"--update {self.update} compares the predictions of two peers, not of averages or "
            "frozen peers: drop --teach-with and --frozen-peers",
        )
        self._refuse_stale()
        divergence.values(self.divergence_args)

    def _refuse_stale(self) -> None:
        """Refuse what weights of the last exchange cannot teach."""
        if self.exchange_every == 1:
            return
        flag_text = f"--exchange-every {self.exchange_every}"
        refuse(
            self.schedule.takes_turns or self.schedule.pauses,
            f"{flag_text} needs --update simultaneous: with {self.update}, peers are updated by "
            "their predictions in the step itself",
        )
        refuse(
            self.teach_with == "ema",
            f"{flag_text} teaches with the weights of the last exchange, and --teach-with ema with "
            "averages: drop one",
        )
        refuse(
            self.links == "frozen",
            f"{flag_text} is about what peers teach each other, and with --links frozen only "
            "frozen peers teach: drop one",
        )

    @property
    def facts(self) -> DivergenceFacts:
        """What is known of the divergence."""
        return DIVERGENCES[self.divergence]

    @property
    def one_target(self) -> TargetFacts:
        """What is known of the target."""
        return TARGETS[self.target]

    def numbers_taught(self, classes: int) -> int:
        """Return how many numbers a teacher contributes per image: W, and 1 to count it."""
        target = self.one_target
        return 1 + (target.contributed if target.is_single else self.facts.taught)(classes)

    @property
    def registered(self) -> dict[str, dict[str, str]]:
        """Name and hash of the source of what the user has registered, by flag; empty for none.

        Raises:
            UsageError: a source cannot be read.
        """
        return {
            flag: {"name": one.name, "sha256": source_sha256(one.own)}
            for flag, one in (("divergence", self.facts), ("target", self.one_target))
            if one.own is not None
        }

    def refuse_missing(self) -> None:
        """Refuse to train with what only the record of a run names.

        Raises:
            UsageError: the text says what to start.
        """
        for name, one in (("divergence", self.facts), ("target", self.one_target)):
            refuse(
                one.missing,
                f"--{name} {one.name} is not registered: start from the file that registers it, "
                "python FILE.py ...",
            )

    @property
    def needs_labels(self) -> str:
        """The flag, with its value, by which a peer's lesson depends on the label; or nothing."""
        return self._first_of(
            target=self.one_target.needs_labels,
            divergence=self.facts.needs_labels,
            gate=self.gate == "correct",
            update=self.schedule.pauses,
        )

    @property
    def needs_pairs(self) -> str:
        """The flag, with its value, by which a peer needs each teacher's logits; or nothing."""
        return self._first_of(
            target=self.one_target.needs_pairs,
            divergence=not (self.one_target.is_single or self.facts.linear),
            update=self.schedule.pauses,
        )

    def _first_of(self, **needs: bool) -> str:
        """Return the first flag that is true, with its value; or nothing."""
        return next((f"--{name} {getattr(self, name)}" for name in needs if needs[name]), "")

    @property
    def schedule(self) -> UpdateSchedule:
        """The update schedule."""
        return UPDATE_SCHEDULES[self.update]

    @property
    def sums_kl(self) -> bool:
        """Whether the KL terms of several teachers are summed, not averaged."""
        return self.kl_reduction == "sum" or self.schedule.sums_kl
