"""Tokenise a trial's rows into the machine's cache, beside whatever else is starting.

    python -m sweeps.trial.warming < SPEC.json

The trial then finds its rows there; if it comes to them before this is done, it waits for them. Whatever goes
wrong here goes wrong in the trial too, and is said there: this says nothing.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sweeps.spec import DataSpec, TrialSpec

LEAST_BYTES = 2_000_000
"""A smaller file of rows is tokenised in less time than another process needs to start."""


@contextlib.contextmanager
def warming(spec: TrialSpec) -> Iterator[subprocess.Popen[bytes] | None]:
    """Inside the block, a process of low priority fills the cache; None where that is not worth one.

    It is ended with the block, and holds its lock no longer.
    """
    if spec.train is None or not is_large(spec.data):
        yield None
        return
    command = ["nice", "-n", "10", sys.executable, "-m", __name__]
    silent = subprocess.DEVNULL
    # a group of its own: a Ctrl-C is the driver's, which ends it
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as given:
            given.write(spec.model_dump_json().encode())
        yield process
    finally:
        process.kill()
        process.wait()


def is_large(data: DataSpec) -> bool:
    """Whether its rows take seconds to tokenise; those of the hub are taken to."""
    if data.path is None:
        return True
    with contextlib.suppress(OSError):
        return Path(data.path).stat().st_size >= LEAST_BYTES
    return False


def warm(spec: TrialSpec) -> None:
    """Put the rows of `spec` into the cache, with the tokenizer that its base will have."""
    from sweeps.trial import gguf
    from sweeps.trial.source import FolderModel, GgufModel, locate, read_tokenizer
    from sweeps.trial.tokencache import prepare

    source = locate(spec.model)
    if isinstance(source, GgufModel):  # converted by whoever comes first, this or the trial
        source = FolderModel(gguf.converted(source.path))
    prepare(spec.data, read_tokenizer(source, spec.model))


if __name__ == "__main__":
    warm(TrialSpec.model_validate_json(sys.stdin.read()))
