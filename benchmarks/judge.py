"""The loss of finished adapters on rows that no side trained on: one judge for both sides.

    python -m benchmarks.judge JOB.json ADAPTERS.json LOSSES.json

ADAPTERS.json is a list of folders that peft reads; LOSSES.json gets one loss for each, and before them the
untouched base's. A row's loss is the mean over its predicted tokens, and rows weigh the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import handwritten
from benchmarks.work import Job


def losses(job: Job, adapters: Sequence[str]) -> list[float]:
    """Of the base alone, then of each adapter on it."""
    from peft import PeftModel

    base, tokenizer = handwritten.load(job)
    rows = handwritten.dataset(job, tokenizer, job.held_out)
    found = [mean_loss(base, rows)]
    for adapter in adapters:
        adapted = PeftModel.from_pretrained(base, adapter)
        found.append(mean_loss(adapted, rows))
        base = adapted.unload()
    return found


def mean_loss(model: Any, rows: Sequence[dict[str, list[int]]]) -> float:
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            total += float(model(input_ids=ids, labels=labels, use_cache=False).loss)
    return total / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("job", "adapters", "losses"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    job = Job.model_validate_json(given.job.read_text("utf-8"))
    found = losses(job, json.loads(given.adapters.read_text("utf-8")))
    given.losses.write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
