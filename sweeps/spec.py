"""`TrialSpec`: everything one trial needs, fully resolved. A bad value cannot exist below this line.

Every default is the article's value ("Finetuning LLMs with LoRA and QLoRA: Insights from Hundreds of
Experiments", Lightning AI, 2023), so that a sweep file names only what differs from it.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sweeps.errors import InvalidValue
from sweeps.prompts import DEFAULT as DEFAULT_PROMPT
from sweeps.prompts import read_prompt, unknown_columns

PositiveInt = Annotated[int, Field(strict=True, gt=0)]
CountInt = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
CountFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Flag = Annotated[bool, Field(strict=True)]

ARTICLE_TASKS = (
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "arithmetic_2ds",
    "arithmetic_4ds",
    "blimp_causative",
    "mmlu_global_facts",
)


class Part(BaseModel):
    """One section of a trial: frozen, and nothing in it that we do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Part):
    """The frozen base model."""

    id: Text = Field(
        "meta-llama/Llama-2-7b-hf",
        description="A hub id, a local folder, a GGUF file, or `package:NAME/FILE` for weights that an "
        "installed Python package ships.",
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub model.")
    quantization: Literal["nf4", "fp4", "none"] = Field(
        "nf4", description="4-bit format of the frozen weights."
    )
    double_quantization: Flag = Field(False, description="Quantise the quantisation constants too.")
    quantize_lm_head: Flag = Field(
        True,
        description="Quantise the output head too (the article); one that is tied to the embedding never is.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Compute dtype; `auto` is bfloat16 on an accelerator that has it, else float32."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; `auto` takes the fastest one installed for the device."
    )
    trust_remote_code: Flag = Field(False, description="Run Python code that comes with the weights.")

    def unquantised(self) -> ModelSpec:
        """The same model with its weights as they were published."""
        kept = self.model_dump(include={"id", "revision", "dtype", "attention", "trust_remote_code"})
        return ModelSpec(quantization="none", **kept)


def _is_a_prompt(text: str) -> str:
    try:
        read_prompt(text)
    except InvalidValue as error:
        raise ValueError(str(error)) from error
    return text


def _without_same_names(columns: dict[str, str]) -> dict[str, str]:
    """A field is in the column of its own name anyhow: said or not, it is the same trial."""
    return {field: column for field, column in columns.items() if field != column}


class DataSpec(Part):
    """The instruction data: rows, the prompts made of them, and the responses that follow."""

    id: Text | None = Field("yahma/alpaca-cleaned", description="A dataset on the hub.")
    path: Text | None = Field(
        None, description="A local JSON, JSONL, CSV or Parquet file; takes the place of `id`."
    )
    split: Text = Field("train", description="The split of a hub dataset.")
    prompt: Annotated[Text, AfterValidator(_is_a_prompt)] = Field(
        DEFAULT_PROMPT,
        description="The name of a shipped prompt, or a text with fields in braces; the response follows it.",
    )
    columns: Annotated[dict[Text, Text], AfterValidator(_without_same_names)] = Field(
        {}, description="`field: column` where a column is not named as the prompt's field, or as `output`."
    )
    on_bad_row: Literal["refuse", "skip"] = Field(
        "refuse", description="Whether a row that cannot be used ends the trial, or is skipped and counted."
    )
    held_out: Fraction = Field(
        0.03865,
        description="Share of the rows kept from training, for `eval.loss` (the article's 2,000 rows).",
    )
    loss_on: Literal["all", "response"] = Field(
        "all", description="Train on every token of a row (the article), or on the response alone."
    )
    max_length: Annotated[int, Field(strict=True, ge=2)] | None = Field(
        None, description="Rows longer than this many tokens are cut."
    )

    @model_validator(mode="before")
    @classmethod
    def _a_path_replaces_the_default_id(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("path") is not None and "id" not in values:
            return {**values, "id": None}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.id is None) == (self.path is None):
            raise ValueError(
                f"exactly one of id and path must be set, got id={self.id!r}, path={self.path!r}; remove one"
            )
        return self

    @model_validator(mode="after")
    def _columns_of_the_prompt(self) -> Self:
        if reason := unknown_columns(self.prompt, self.columns):
            raise ValueError(reason)
        return self


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class LoraSpec(Part):
    """The adapter: W + (alpha / r) * B @ A on every target module."""

    r: PositiveInt = Field(
        8, description="Rank of the update; at most the smaller side of every layer that it is put on."
    )
    alpha: PositiveFloat = Field(
        16.0, description="Scale; the update is multiplied by alpha / r, with `rslora` by alpha / sqrt(r)."
    )
    dropout: Fraction = Field(0.05, description="Dropout on the adapter's input.")
    targets: Annotated[Literal["qv", "all"] | tuple[Text, ...], BeforeValidator(_as_tuple)] = Field(
        "all",
        description="`qv`: the query and value projections; `all`: every linear layer and the output head; "
        "or a list of module names.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Adapter weights; `auto` is the model's compute dtype, float32 for a float16 model.",
    )
    rslora: Flag = Field(False, description="Rank-stabilised LoRA: the scale is alpha / sqrt(r).")
    dora: Flag = Field(
        False,
        description="DoRA: the length of each row of the adapted weights is trained too. Every pass then "
        "computes all of those weights.",
    )

    @property
    def alpha_over_r(self) -> float:
        """The factor by which the update is scaled, unless `rslora` says otherwise."""
        return self.alpha / self.r

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if not self.targets:
            raise ValueError(
                "targets must name at least one module, got an empty list; name some, or say all"
            )
        return self


class OptimizerSpec(Part):
    """One optimiser over the adapter's weights."""

    name: Literal["adamw", "paged_adamw", "adamw_8bit", "sgd"] = Field(
        "adamw",
        description="`paged_adamw` keeps its state in pageable memory and needs CUDA; `adamw_8bit` keeps it "
        "in 8 bits, but for tensors of fewer than 4,096 numbers.",
    )
    lr: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    weight_decay: CountFloat = Field(0.01, description="Decoupled for AdamW; added to the gradient for SGD.")
    beta1: Fraction = Field(0.9, description="AdamW's first moment.")
    beta2: Fraction = Field(0.999, description="AdamW's second moment.")
    momentum: Fraction = Field(0.9, description="SGD's momentum.")


class ScheduleSpec(Part):
    """The learning rate over optimiser steps."""

    name: Literal["constant", "linear", "cosine"] = Field("cosine", description="The shape after the warmup.")
    warmup_steps: CountInt = Field(100, description="Steps of linear warmup from 0 to the peak.")
    t_max: Literal["all_steps", "after_warmup"] = Field(
        "all_steps",
        description="Where `linear` and `cosine` would reach 0: as many steps behind the warmup as there are "
        "in all (the article, which ends above 0), or at the end of the training.",
    )


class TrainSpec(Part):
    """How much is trained, in what order."""

    batch_size: PositiveInt = Field(128, description="Rows per optimiser step.")
    samples: PositiveInt = Field(
        50_000, description="Rows in all; the number of steps is samples // batch_size."
    )
    sampling: Literal["replacement", "epochs"] = Field(
        "replacement", description="Draw rows independently (the article), or shuffle and pass over them."
    )
    seed: CountInt = Field(1337, description="Seeds the adapter, the row order, the dropout.")
    token_budget: PositiveInt | Literal["auto"] = Field(
        "auto", description="Most tokens, padding included, in one micro-batch; never changes the gradients."
    )
    loss_weighting: Literal["sample", "token"] = Field(
        "sample",
        description="Every row of a step weighs the same in its loss (the article), or every token that is "
        "predicted. The held-out loss weighs rows.",
    )
    gradient_checkpointing: Flag | Literal["auto"] = Field(
        False,
        description="Recompute activations in the backward pass; `auto` does where the longest row would not "
        "fit in memory otherwise.",
    )
    compile: Flag = Field(
        False,
        description="Compile the blocks of the model for training (`torch.compile`); they run as they are "
        "where that fails.",
    )
    clip_norm: PositiveFloat | None = Field(
        None, description="Clip the gradient's norm; the article does not."
    )
    log_every: PositiveInt = Field(10, description="Steps between two reports.")
    eval_every: CountInt = Field(100, description="Steps between two held-out losses; 0 is at the end only.")
    eval_rows: PositiveInt = Field(100, description="Held-out rows that the held-out loss is taken over.")
    diverged_above: PositiveFloat = Field(2.0, description="A loss above this many times its start, ...")
    diverged_steps: PositiveInt = Field(
        20, description="... for this many steps in a row, ends the trial: diverged."
    )


def _as_text(value: Any) -> Any:
    """The year, which YAML reads as a number."""
    return str(value) if type(value) is int else value


class EvaluateSpec(Part):
    """Which benchmarks score the trial, by lm-eval."""

    tasks: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)] = Field(
        ARTICLE_TASKS, description="lm-eval task names, its own or those of `task_dir`."
    )
    weights: Literal["trained", "merged"] = Field(
        "trained",
        description="What is scored: the model as it was trained, or the unquantised base with the adapter "
        "merged into it (the article).",
    )
    task_dir: Text | None = Field(None, description="A folder of lm-eval task files of one's own.")
    data_dir: Text | None = Field(
        None,
        description="A folder of `<task>.jsonl` (and `<task>_dev.jsonl`): rows from there, not from the hub.",
    )
    num_fewshot: CountInt | None = Field(
        None, description="Examples before each question; the task's own if unset."
    )
    limit: PositiveInt | None = Field(None, description="Only the first documents of each task.")
    batch_size: PositiveInt = Field(
        16,
        description="How much is scored together: batches of 512 tokens for each, on a CPU of 2,048 at the "
        "most; or so many rows, where a model must be scored row by row.",
    )
    harness: Annotated[Literal["current", "2023"], BeforeValidator(_as_text)] = Field(
        "current",
        description="Requests as lm-eval makes them now, or as it made them in 2023 (the article): no "
        "beginning-of-text token, no space before a BLiMP sentence.",
    )


def _none_is_no_training(value: Any) -> Any:
    return None if value == "none" else value


class TrialSpec(Part):
    """Everything one trial needs. `train` is None for a base model that is only scored."""

    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    lora: LoraSpec = LoraSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    train: Annotated[TrainSpec | None, BeforeValidator(_none_is_no_training)] = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()

    @property
    def steps(self) -> int:
        """Optimiser updates in all: the article's 50,000 rows in batches of 128 are 390."""
        return self.train.samples // self.train.batch_size if self.train else 0

    @property
    def digest(self) -> str:
        """Equal for equal trials, whatever they were written like; 16 hexadecimal digits."""
        values = self.model_dump(mode="json")
        if self.train is not None and not self.train.compile:
            del values["train"]["compile"]  # younger than digests that people's folders and studies hold
        canonical = json.dumps(values, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def untrained(self) -> TrialSpec:
        """The same base and benchmarks without any training: the baseline.

        Where the adapter is scored in the unquantised base, that is the base.
        """
        if self.evaluate.weights == "trained":
            return TrialSpec(model=self.model, train=None, evaluate=self.evaluate)
        evaluate = self.evaluate.model_copy(update={"weights": "trained"})
        return TrialSpec(model=self.model.unquantised(), train=None, evaluate=evaluate)

    @model_validator(mode="after")
    def _laws(self) -> Self:
        if self.train is None:
            return self
        if self.steps < 1:
            raise ValueError(
                "train.samples >= train.batch_size must hold, "
                f"got samples={self.train.samples}, batch_size={self.train.batch_size}; raise samples"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps < steps must hold, got warmup_steps={self.schedule.warmup_steps}, "
                f"steps={self.steps} (samples // batch_size); lower warmup_steps or raise train.samples"
            )
        return self


Kind = Literal["int", "float", "bool", "text", "list", "mapping"]


class FieldInfo(typing.NamedTuple):
    """What may stand at one field path of a trial, such as `lora.alpha`."""

    path: str
    part: type[Part]
    name: str
    kind: Kind
    default: Any
    description: str

    @property
    def is_number(self) -> bool:
        return self.kind in ("int", "float")


def _kind(annotation: Any) -> Kind:
    """The most specific kind that an annotation allows; a number wins over the words beside it."""
    if typing.get_origin(annotation) is Annotated:
        return _kind(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = {_kind(member) for member in typing.get_args(annotation) if member is not type(None)}
        return next(kind for kind in ("int", "float", "list", "bool", "text") if kind in kinds)
    if typing.get_origin(annotation) is tuple:
        return "list"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    return typing.cast("dict[Any, Kind]", {int: "int", float: "float", bool: "bool"}).get(annotation, "text")


def _fields() -> Iterator[FieldInfo]:
    for section, outer in TrialSpec.model_fields.items():
        part = TrainSpec if section == "train" else typing.cast("type[Part]", outer.annotation)
        for name, inner in part.model_fields.items():
            path = f"{section}.{name}"
            kind = _kind(inner.annotation)
            yield FieldInfo(path, part, name, kind, inner.default, inner.description or "")


FIELDS: Mapping[str, FieldInfo] = {info.path: info for info in _fields()}
"""Every field of a trial by its path, in the order of the sections."""
