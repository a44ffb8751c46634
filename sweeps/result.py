"""What a trial says: `Progress` while it runs, one `TrialResult` when it ends. JSON both ways."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from sweeps.errors import FailureClass

Phase = Literal["loading", "training", "evaluating", "saving"]
Outcome = Literal["completed", "pruned", "failed", "interrupted"]


class Record(BaseModel):
    """A frozen value that refuses unknown fields and survives JSON, NaN and infinity included."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Progress(Record):
    """One report of a running trial.

    `step` counts optimiser updates done; `train_loss` is the exact mean loss per sample over the steps
    since the last report; `eval_loss` the mean held-out loss per sample, where it was measured;
    `notes` are choices made for the user, each with its reason (dtype, attention kernel, token budget).
    """

    phase: Phase
    step: int = 0
    steps: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    lr: float | None = None
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None
    seconds_left: float | None = None
    notes: tuple[str, ...] = ()


class Score(Record):
    """One benchmark's score: the task's main metric with its standard error over `documents` documents."""

    value: float
    stderr: float | None = None
    metric: str = "acc"
    documents: int = 0


class Failure(Record):
    """Why a trial failed: its class, one line for people, and the traceback."""

    kind: FailureClass
    message: str
    traceback: str = ""


class Measured(Record):
    """What a trial cost. Memory in decimal gigabytes (1e9 bytes), time in seconds.

    `peak_memory_gb` is the accelerator's peak *allocated* memory, the host's where there is no accelerator.
    Of a trial that was cut and resumed, seconds and tokens are the sums over its attempts, and peaks the
    highest of them, as far as the checkpoints know: what an attempt did after its last one is in none of
    these. `tokens_per_second` is of the sums.
    What was not measured is None: a wrong number is worse than no number.
    """

    peak_memory_gb: float | None = None
    peak_accelerator_allocated_gb: float | None = None
    peak_accelerator_reserved_gb: float | None = None
    peak_host_gb: float | None = None
    wall_seconds: float = 0.0
    load_seconds: float = 0.0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    trained_tokens: int = 0
    tokens_per_second: float | None = None


class TrialResult(Record):
    """How a trial ended. Written whole to `result.json` by the process that ran it: its last word."""

    outcome: Outcome
    scores: dict[str, Score] = Field(default_factory=dict)
    train_loss: float | None = None
    eval_loss: float | None = None
    steps: int = 0
    trainable_params: int = 0
    measured: Measured = Measured()
    failure: Failure | None = None
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    data_digest: str | None = None

    @property
    def mean_score(self) -> float | None:
        """The unweighted mean over the benchmarks; None without any."""
        if not self.scores:
            return None
        return sum(score.value for score in self.scores.values()) / len(self.scores)

    def metrics(self) -> dict[str, float]:
        """Every final number under its stable name (`score.<task>`, `peak_memory_gb`, ...)."""
        measured = self.measured
        named: dict[str, float | None] = {
            **{f"score.{task}": score.value for task, score in self.scores.items()},
            **{f"score_stderr.{task}": score.stderr for task, score in self.scores.items()},
            "score.mean": self.mean_score,
            "train.loss": self.train_loss,
            "eval.loss": self.eval_loss,
            "trainable_params": float(self.trainable_params),
            "peak_memory_gb": measured.peak_memory_gb,
            "peak_accelerator_allocated_gb": measured.peak_accelerator_allocated_gb,
            "peak_accelerator_reserved_gb": measured.peak_accelerator_reserved_gb,
            "peak_host_gb": measured.peak_host_gb,
            "wall_seconds": measured.wall_seconds,
            "load_seconds": measured.load_seconds,
            "train_seconds": measured.train_seconds,
            "eval_seconds": measured.eval_seconds,
            "tokens_per_second": measured.tokens_per_second,
        }
        return {name: value for name, value in named.items() if value is not None}
