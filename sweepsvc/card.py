"""The model card of an exported trial: what it scores, what it is, how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.result import TrialResult
from sweeps.space import field_value
from sweeps.spec import FIELDS, TrialSpec
from sweepsvc.protocols import SweepRecord, TrialRecord
from sweepsvc.view import score_text, title

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NO_SCORE = "-"


@dataclass(frozen=True)
class Card:
    """What a card is written from. `notes` are the choices made for the user while merging."""

    record: SweepRecord
    trial: TrialRecord
    is_merged: bool
    notes: Sequence[str]
    command: str


def card_text(card: Card) -> str:
    """Markdown, with the header that model hubs read."""
    spec = card.trial.proposal.spec
    name = f"{card.record.sweep_id}, {title(card.trial.proposal)}"
    parts = [
        _header(card),
        f"# {name}\n\n{_what_it_is(card)}",
        f"## Scores\n\n{_scores(card)}",
        f"## Use\n\n{_use(card)}",
        f"## How it was made\n\n{_made(card)}",
        f"## Settings\n\n{_table(('field', 'value'), _settings(card.trial, spec))}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(card: Card) -> str:
    model = card.trial.proposal.spec.model
    lines = ["---", f"library_name: {'transformers' if card.is_merged else 'peft'}"]
    if _HUB_ID.fullmatch(model.id):
        lines.append(f"base_model: {model.id}")
        lines.append(f"base_model_relation: {'finetune' if card.is_merged else 'adapter'}")
    lines += ["pipeline_tag: text-generation", "tags: [lora, sweepsvc]", "---"]
    return "\n".join(lines)


def _what_it_is(card: Card) -> str:
    spec = card.trial.proposal.spec
    revision = f" (revision {spec.model.revision})" if spec.model.revision else ""
    base = f"`{spec.model.id}`{revision}"
    if card.is_merged:
        return (
            f"{base}, unquantised, with a LoRA adapter merged into its weights. It was trained {_on(spec)}."
        )
    return f"A LoRA adapter for {base}. It was trained {_on(spec)}."


def _on(spec: TrialSpec) -> str:
    """What the base was while the adapter was trained."""
    kind = spec.model.quantization
    return "on the unquantised base" if kind == "none" else f"on the base in 4 bits ({kind})"


# --- scores -----------------------------------------------------------------------------------------


def _scores(card: Card) -> str:
    result = _result(card.trial)
    if not result.scores:
        return "It was not scored: the trial names no benchmarks."
    baseline = _baseline(card)
    before = baseline.scores if baseline else {}
    rows: list[tuple[str, ...]] = [
        (
            name,
            score.metric,
            score_text(score),
            score_text(before.get(name)) or _NO_SCORE,
            f"{score.documents}",
        )
        for name, score in result.scores.items()
    ]
    if len(rows) > 1:
        means = [_mean(one) for one in (result, baseline)]
        rows.append(("mean", "", *means, ""))
    heading = ("benchmark", "metric", "this model", "base model", "documents")
    return f"{_table(heading, rows)}\n\n{_scored_as(card, baseline is not None)}"


def _mean(result: TrialResult | None) -> str:
    mean = result.mean_score if result else None
    return _NO_SCORE if mean is None else f"{mean:.3f}"


def _scored_as(card: Card, has_baseline: bool) -> str:
    """What the numbers are of, which need not be what is in the folder."""
    spec = card.trial.proposal.spec
    lines = ["By lm-eval; ± is one standard error."]
    if spec.evaluate.weights == "merged":
        lines.append("Scored was the unquantised base with the adapter merged into it.")
    else:
        lines.append(f"Scored was the adapter {_on(spec)}.")
    if card.is_merged and spec.evaluate.weights != "merged":
        lines.append("The merged weights in this folder are rounded otherwise, and were not scored.")
    if not card.is_merged and spec.evaluate.weights == "merged" and spec.model.quantization != "none":
        lines.append("On a base in 4 bits the adapter may score otherwise.")
    if spec.evaluate.limit is not None:
        lines.append(f"Only the first {spec.evaluate.limit} documents of each benchmark were asked.")
    if not has_baseline:
        lines.append("The sweep has no score of the untouched base model.")
    return " ".join(lines)


def _baseline(card: Card) -> TrialResult | None:
    """The result of the untouched base on the same benchmarks."""
    untrained = card.trial.proposal.spec.untrained()
    for trial in card.record.baselines:
        if trial.proposal.spec == untrained and trial.state == "completed":
            return trial.result
    return None


# --- use and making ---------------------------------------------------------------------------------


def _use(card: Card) -> str:
    spec = card.trial.proposal.spec
    ask = 'python -m sweepsvc generate . --prompt "Name three rivers."'
    if card.is_merged:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    else:
        base = (
            json.dumps(spec.model.id) if _HUB_ID.fullmatch(spec.model.id) else "BASE  # see base model below"
        )
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"base = {base}\n"
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")\n'
            "tokenizer = AutoTokenizer.from_pretrained(base)"
        )
    return (
        f"In this folder, with the prompt of the training:\n\n```sh\n{ask}\n```\n\n"
        f"Or in Python:\n\n```python\n{load}\n```"
    )


def _made(card: Card) -> str:
    trial, result = card.trial, _result(card.trial)
    measured = result.measured
    facts = [
        ("sweep", f"{card.record.sweep_id}, trial {trial.proposal.number}"),
        ("base model", trial.proposal.spec.model.id),
        ("objective", _objective(card)),
        ("optimiser steps", f"{result.steps}"),
        ("trainable parameters", f"{result.trainable_params:,}"),
        ("loss, training and held-out", f"{_number(result.train_loss)}, {_number(result.eval_loss)}"),
        ("seconds of training", f"{measured.train_seconds:.1f}"),
        ("peak memory, GB", _number(measured.peak_memory_gb, 2)),
        ("digest of the data", result.data_digest or _NO_SCORE),
        ("commit of the sweep file", card.record.facts.get("git_commit") or _NO_SCORE),
        ("made with", _environment(result)),
    ]
    notes = "".join(f"\n- {note}" for note in (*result.notes, *(f"merged: {one}" for one in card.notes)))
    repeat = f"python -m sweeps.trial spec.json FOLDER  # trains and scores it again\n{card.command}"
    return (
        f"{_table(('fact', 'value'), facts)}\n\nChoices that were made for the user:\n{notes}\n\n"
        f"To repeat it:\n\n```sh\n{repeat}\n```"
    )


def _objective(card: Card) -> str:
    way = "maximize" if card.record.maximize else "minimize"
    return f"{way} {card.record.objective_metric}: {_number(card.trial.value)}"


def _environment(result: TrialResult) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.environment.items() if value)


def _settings(trial: TrialRecord, spec: TrialSpec) -> Iterable[tuple[str, str]]:
    """Every field by its path, with the rule that it came from."""
    for path in FIELDS:
        rule = trial.proposal.rules.get(path)
        value = _value(field_value(spec, path))
        yield f"`{path}`", f"{value} ({rule})" if rule not in (None, value) else value


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def _result(trial: TrialRecord) -> TrialResult:
    assert trial.result is not None, "only a completed trial has a card"
    return trial.result


def _number(value: float | None, digits: int = 4) -> str:
    return _NO_SCORE if value is None else f"{value:.{digits}f}"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
