"""What was measured, typed: the JSON that everything else reads.

Reports, plots, sweeps and ``coldforge verify`` read only this. The names are a public format (``schema_version``);
accuracies are fractions, times are seconds, sizes are bytes, energy is joules.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldforge.errors import UsageError

SCHEMA_VERSION = 1

StageName = Literal["baseline", "compressed", "tuned", "artifact", "reference", "control"]


class RecordModel(BaseModel):
    """Base of the record's parts: frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ThreatModelRecord(RecordModel):
    """The threat model as evaluated."""

    norm: str
    eps: float
    """In pixel units, a fraction of [0, 1]."""
    eps_255: float
    """The same in 8-bit pixel steps."""
    box: bool
    """Adversarial images were kept inside [0, 1]."""


class PruningRatioRecord(RecordModel):
    """Part of the channels removed."""

    requested: float
    achieved: float


class LatencyRecord(RecordModel):
    """Wall time of one call of a runtime."""

    runtime: str
    batch: int
    threads: int
    median: float
    """Seconds per batch."""
    p10: float
    p90: float


LEAST_AGREEMENT = 0.995
"""Part of the labels, clean and adversarial, that a file must share with its twin, and with itself elsewhere."""


class AgreementRecord(RecordModel):
    """Part of the labels on which the artifact equals its twin."""

    clean: float
    """On all clean test images."""
    adversarial: float
    """On the last PGD-20 iterate of each attacked image, found on the twin."""


class MaskingCheckRecord(RecordModel):
    """One check of the masking panel."""

    name: str
    passed: bool
    value: float
    threshold: float
    meaning: str
    conclusive: bool = True
    """False: it could say nothing about this network, and counts neither way."""


class MaskingRecord(RecordModel):
    """Does the robust accuracy hold?"""

    verdict: Literal["ok", "suspect", "not_run"] = "not_run"
    checks: tuple[MaskingCheckRecord, ...] = ()

    @property
    def tally(self) -> str:
        """How many checks passed, and how many could say nothing; empty without checks."""
        counted = [check for check in self.checks if check.conclusive]
        if not self.checks:
            return ""
        silent = len(self.checks) - len(counted)
        passed = f"{sum(check.passed for check in counted)} of {len(counted)} passed"
        return passed + (f", {silent} not conclusive" if silent else "")

    @property
    def failed(self) -> tuple[MaskingCheckRecord, ...]:
        """The checks that make it suspect."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def of_black_box(self) -> bool:
        """Whether there were no gradients to look at, so that little could be asked."""
        return any(check.name == "differentiable" and check.passed for check in self.checks)

    def and_also(self, check: MaskingCheckRecord | None) -> MaskingRecord:
        """The same with one more check. If the others were not run, it can only raise suspicion: passed, it is left
        out.
        """
        if check is None or (self.verdict == "not_run" and check.passed):
            return self
        return MaskingRecord(verdict=self.verdict if check.passed else "suspect", checks=(*self.checks, check))


class CurvePoint(RecordModel):
    """One epoch of a training curve."""

    epoch: int
    loss: float
    lr: float
    eps: float
    """eps of the inner attack at the end of the epoch, in pixel units."""
    clean_accuracy: float
    """On the validation part."""
    robust_accuracy: float
    """On the validation part, under the monitor attack (a PGD-10); -1 where it was not run."""
    averaged_clean_accuracy: float = -1.0
    """The same of the averaged weights; -1 where there are none."""
    averaged_robust_accuracy: float = -1.0
    beyond_gradients: float = -1.0
    """Of the first validation images, what the monitor attack leaves and a short Square, which needs no gradients,
    breaks; -1 where it was not run. Much of it: gradients mislead."""
    averaged_beyond_gradients: float = -1.0


class StageRecord(RecordModel):
    """One row of the table: one network or file, and all that was measured on it."""

    name: StageName
    label: str
    """Readable and unique within a record, e.g. "adversarially tuned" holds the word adversarial."""
    params: int
    macs: int
    """Multiply-adds of one image."""
    size_bytes: int
    """Bytes of the ONNX file of this network."""
    packed_bytes: int
    """Bytes of the weights alone, packed at their bit width, with their scales."""
    weight_bits: int
    activation_bits: int
    pruning_ratio: PruningRatioRecord
    n: int
    """Test images behind clean_accuracy."""
    clean_accuracy: float
    clean_ci95: tuple[float, float]
    robust_accuracy: dict[str, float]
    """Attack name to fraction; and worst_case: right when clean and under every attack run."""
    robust_n: dict[str, int]
    robust_ci95: dict[str, tuple[float, float]]
    robust_accuracy_8bit: dict[str, float] = {}
    """The same where each image that was found counts only if it still fools with its pixels rounded to 8 bits, inside
    the ball. Nothing was searched among 8-bit images, so that this is a looser upper bound. Empty in older records."""
    per_class: dict[str, dict[str, float]]
    """Class name to {"n", "clean", "worst_case"}."""
    latency_s: tuple[LatencyRecord, ...] = ()
    energy_j_per_image: float | None = None
    energy_method: str = ""
    """How the energy was found; says measured or estimated."""
    train_seconds: float = 0.0
    """Seconds spent training what this row adds to the row before it."""
    train_macs: float = 0.0
    """Multiply-adds of that training, forward and backward, inner attack included."""
    agreement: AgreementRecord | None = None
    """Only for the artifact."""
    masking: MaskingRecord = MaskingRecord()
    disputed: int = 0
    """How often, over images and attacks, a search was fooled at a point where the judge (the file, or the network in
    float32) was not; it then went on."""
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know: retries, collapses, warnings."""


class Record(RecordModel):
    """One run."""

    schema_version: int = SCHEMA_VERSION
    coldforge_version: str
    recipe: dict[str, Any]
    provenance: dict[str, Any]
    """command, created, seed, git_commit, versions{}, hardware{cpu, cores, flags[]}, data{name, fingerprint, train,
    validation, test}, stage_keys{}, classes[]."""
    threat_model: ThreatModelRecord
    stages: tuple[StageRecord, ...] = Field(min_length=1)

    @property
    def images(self) -> str:
        """What was attacked, in words."""
        part = self.recipe.get("evaluate", {}).get("part", "test")
        return "validation images" if part == "validation" else "test images"

    def stage(self, name: StageName, containing: str = "") -> StageRecord | None:
        """The first stage of that name whose label contains a word, or None."""
        return next((stage for stage in self.stages if stage.name == name and containing in stage.label), None)

    @property
    def exported(self) -> StageRecord | None:
        """The row of the network that became the artifact; None where the recipe does not say."""
        deploy = self.recipe.get("deploy")
        arm = deploy.get("arm") if isinstance(deploy, dict) else None
        return self.stage("compressed") if arm == "none" else self.stage("tuned", f"{arm}ly")

    def is_suspect(self, stage: StageRecord) -> bool:
        """True where the masking verdict says that the robust accuracy may not hold.

        The panel judges the artifact; its verdict is also that of the network that was exported.
        """
        if stage.masking.verdict == "suspect":
            return True
        artifact = self.stage("artifact")
        return artifact is not None and artifact.masking.verdict == "suspect" and stage is self.exported

    def to_json(self) -> str:
        """Indented JSON that ends with a newline."""
        return self.model_dump_json(indent=2) + "\n"


class TargetRecord(RecordModel):
    """What ``coldforge evaluate`` was pointed at."""

    path: str
    """As the user named it."""
    sha256: str
    """Of the file that gave the verdicts, or of the weights where that was a network."""
    kind: Literal["folder", "checkpoint", "onnx"]
    """folder: what ``coldforge run`` wrote, judged by its file; checkpoint: a network with gradients; onnx: only a
    file, a black box."""
    architecture: str = ""
    """Where the network comes from, such as zoo:cnn8; empty for a black box."""
    weight_bits: int
    """Of a black box: 8 where the runtime computes with integers, else 32."""
    activation_bits: int
    size_bytes: int
    """Bytes of that file, or of the weights."""
    surrogate: str = ""
    """Path of the network on which gradient attacks searched, where the target has none."""
    surrogate_sha256: str = ""


class AttackedRecord(RecordModel):
    """The images at the front of the test set that were attacked, before that."""

    n: int
    clean_accuracy: float
    clean_ci95: tuple[float, float]


class EvaluationRecord(RecordModel):
    """One ``coldforge evaluate``: clean and robust accuracy of a network or a file, and whether the latter holds."""

    schema_version: int = SCHEMA_VERSION
    coldforge_version: str
    provenance: dict[str, Any]
    """As in :class:`Record`."""
    target: TargetRecord
    data: dict[str, Any]
    """source, name, fingerprint (of the test images), test (how many), classes."""
    threat_model: ThreatModelRecord
    n: int
    """Test images behind clean_accuracy."""
    clean_accuracy: float
    clean_ci95: tuple[float, float]
    attacked: AttackedRecord
    """The part of them behind robust_accuracy: compare with these."""
    robust_accuracy: dict[str, float]
    """Attack name to fraction; and worst_case: right when clean and under every attack run. An upper bound where images
    are ``unfinished``."""
    robust_n: dict[str, int]
    robust_ci95: dict[str, tuple[float, float]]
    robust_accuracy_8bit: dict[str, float] = {}
    """The same where each image that was found counts only if it still fools with its pixels rounded to 8 bits, inside
    the ball. Nothing was searched among 8-bit images, so that this is a looser upper bound. Empty in older records."""
    broken: dict[str, int]
    """Attack name, or worst_case, to how many images that were right when clean it made wrong."""
    broken_by: dict[str, dict[str, int]] = {}
    """The same, split by what did it: part of an ensemble and way, such as "square-500 on the file"."""
    disputed: dict[str, int] = {}
    """Attack name to how many images fooled the network it searched on and not the file, which has the last word."""
    agreement: AgreementRecord | None = None
    """With the network beside a file: on all clean test images, and on the last PGD-20 iterates of at most 1,000
    attacked ones. None for a network or a file alone, and in older records."""
    unfinished: dict[str, int] = {}
    """Attack name to how many images the budget did not let it finish; they count as robust."""
    per_class: dict[str, dict[str, float]]
    """Class name to {"n", "n_attacked", "clean", "worst_case"}."""
    budget_s: float = 0.0
    """Seconds that the attacks were given; 0: as long as they took."""
    seconds: float
    """Wall time, without what an interrupted run spent before."""
    masking: MaskingRecord = MaskingRecord()
    attacks: dict[str, dict[str, Any]]
    """Attack name to its settings and its version."""
    notes: tuple[str, ...] = ()
    """What a reader must know."""

    def to_json(self) -> str:
        """Indented JSON that ends with a newline."""
        return self.model_dump_json(indent=2) + "\n"


def load_record(path: str | Path) -> Record:
    """Read ``record.json``, or the one inside a folder.

    Raises:
        UsageError: where there is none, or it is not a record of this schema.
    """
    return _load(Record, path, "record", "run")


def load_evaluation(path: str | Path) -> EvaluationRecord:
    """Read ``evaluation.json``, or the one inside a folder.

    Raises:
        UsageError: where there is none, or it is not an evaluation of this schema.
    """
    return _load(EvaluationRecord, path, "evaluation", "evaluate")


RecordT = TypeVar("RecordT", Record, EvaluationRecord)


def _load(kind: type[RecordT], path: str | Path, name: str, command: str) -> RecordT:
    file = Path(path)
    if file.is_dir():
        file = file / f"{name}.json"
    article = "an" if name[0] in "aeiou" else "a"
    if not file.is_file():
        raise UsageError(
            f"expected {article} {name} at {file}, found nothing; "
            f"`coldforge {command}` writes one into its --out folder"
        )
    content = file.read_bytes()
    version = SCHEMA_VERSION
    with contextlib.suppress(ValueError, AttributeError):  # what is wrong is said below
        version = json.loads(content).get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:  # asked first: the keys of another schema may be others
        raise UsageError(
            f"{file}: expected schema_version {SCHEMA_VERSION}, got {version}; "
            "read it with the version of coldforge that wrote it"
        )
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{file} is not a coldforge {name}: {where + ': ' if where else ''}{first['msg']}") from None
