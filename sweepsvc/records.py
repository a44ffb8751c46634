"""How a trial stands in the ledger, and how it is read back as a record."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweepsvc.protocols import Proposal, TrialRecord, TrialState

Entry = Mapping[str, Any]
"""What the ledger holds of one trial, as JSON: `proposal`, and `started` and `result` once there are."""


def proposal_entry(proposal: Proposal) -> dict[str, Any]:
    """Written when a trial is proposed, never changed."""
    return {
        "number": proposal.number,
        "key": proposal.key,
        "params": dict(proposal.params),
        "rules": dict(proposal.rules),
        "repeat": proposal.repeat,
        "digest": proposal.spec.digest,
        "spec": proposal.spec.model_dump(mode="json"),
    }


def started_entry(
    attempts: int = 0, mlflow_run_id: str | None = None, setbacks: Sequence[str] = ()
) -> dict[str, Any]:
    """Written when an attempt begins, when the tracker's run is known, and when another is to follow."""
    return {"attempts": attempts, "mlflow_run_id": mlflow_run_id, "setbacks": list(setbacks)}


def another_attempt(entry: Entry) -> dict[str, Any]:
    """The trial's `started`, with one attempt more."""
    before = _started(entry)
    return {**before, "attempts": before["attempts"] + 1}


def with_run(entry: Entry, mlflow_run_id: str) -> dict[str, Any]:
    """The trial's `started`, with its run in the tracker."""
    return {**_started(entry), "mlflow_run_id": mlflow_run_id}


def with_setback(entry: Entry, why: str) -> dict[str, Any]:
    """The trial's `started`, with one attempt that came to nothing."""
    before = _started(entry)
    return {**before, "setbacks": [*before["setbacks"], why]}


def _started(entry: Entry) -> dict[str, Any]:
    return dict(entry.get("started", started_entry()))


def reopened(entry: Entry) -> dict[str, Any]:
    """The entry of a trial that runs again; ValueError where it has not failed or been interrupted."""
    outcome = entry.get("result", {}).get("outcome")
    if outcome not in ("failed", "interrupted"):
        key = entry["proposal"]["key"]
        raise ValueError(f"only what failed or was interrupted runs again, got {key} ({outcome}); leave it")
    return {name: value for name, value in entry.items() if name != "result"}


def result_entry(result: TrialResult) -> dict[str, Any]:
    """Written when a trial ends, once."""
    entry: dict[str, Any] = json.loads(result.model_dump_json())
    return entry


def result_of(entry: Entry) -> TrialResult:
    """The result in `entry`, which has one."""
    return TrialResult.model_validate_json(json.dumps(entry["result"]))


def trial_record(entry: Entry, metric: str) -> TrialRecord:
    """What `entry` says, with the trial's value of the objective's `metric`."""
    started = _started(entry)
    result = result_of(entry) if "result" in entry else None
    return TrialRecord(
        proposal=proposal_of(entry["proposal"]),
        state=trial_state(entry),
        attempts=started["attempts"],
        result=result,
        value=objective_value(result, metric),
        mlflow_run_id=started["mlflow_run_id"],
        setbacks=tuple(started["setbacks"]),
    )


def proposal_of(entry: Entry) -> Proposal:
    """What `proposal_entry` made `entry` of."""
    return Proposal(
        key=entry["key"],
        spec=TrialSpec.model_validate_json(json.dumps(entry["spec"])),
        number=entry["number"],
        params=entry["params"],
        rules=entry["rules"],
        repeat=entry["repeat"],
    )


def trial_state(entry: Entry) -> TrialState:
    """How the trial ended, else whether it was started."""
    if "result" in entry:
        outcome: TrialState = entry["result"]["outcome"]
        return outcome
    return "running" if "started" in entry else "waiting"


def objective_value(result: TrialResult | None, metric: str) -> float | None:
    """What a completed trial is compared by; None if `metric` is missing or not finite, or not completed."""
    if result is None or result.outcome != "completed":
        return None
    value = result.metrics().get(metric)
    return value if value is not None and math.isfinite(value) else None
