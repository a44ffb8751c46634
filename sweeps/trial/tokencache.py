"""Token rows, kept by the content that they were made of: each distinct set is tokenised once on a machine.

A file of the cache is safetensors: nothing is unpickled. It carries a checksum of all that is in it; one that
does not hold is made anew. Whenever one is written, those that were used longest ago make room for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from sweeps.spec import DataSpec
from sweeps.trial.cache import cache_home, limit_bytes, only_one, prune, used
from sweeps.trial.data import Row, TokenData, Tokenizer, TokenRow, arrange, encode, read_rows
from sweeps.trial.paths import remove, write_whole

_FORMAT = "1"
_ID = np.dtype("<i4")
_COUNT = np.dtype("<i8")


def prepare(spec: DataSpec, tokenizer: Tokenizer) -> tuple[TokenData, tuple[str, ...]]:
    """The data of a trial, and what is to be said of it. Raises `BadData`, `DownloadFailed`."""
    rows = read_rows(spec)
    encoded, notes = encoded_once(rows.good, spec.loss_on, tokenizer)
    data = arrange(rows, encoded, spec)
    return data, (data.note, *notes)


def encoded_once(
    rows: Sequence[Row], loss_on: Literal["all", "response"], tokenizer: Tokenizer
) -> tuple[list[TokenRow], tuple[str, ...]]:
    """`encode`, or what it once gave for the same prompts, responses and tokenizer; with notes of trouble.

    Of several processes that need the same, one computes and the others wait. A cache that cannot be used
    costs time and nothing else.
    """
    state = tokenizer_state(tokenizer)
    if state is None:
        return encode(rows, loss_on, tokenizer), ("tokens: not kept, the tokenizer is of an unknown kind",)
    digest = _digest(rows, loss_on, state)
    file = cache_home() / "tokens" / f"{digest}.safetensors"
    kept, trouble = _kept(file, digest, len(rows))
    if kept is not None:
        return kept, ()
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(only_one(file))
        except OSError as error:
            return encode(rows, loss_on, tokenizer), (*trouble, _not_kept(file, error))
        kept, _ = _kept(file, digest, len(rows))  # made by another while we waited
        if kept is not None:
            return kept, ()
        encoded = encode(rows, loss_on, tokenizer)
        try:
            for draft in file.parent.glob(f".{file.name}.*"):  # of a process that was killed
                remove(draft)
            write_whole(file, _written(encoded, digest))
            limit, said = limit_bytes()
            trouble = (*trouble, *(f"tokens: {one}" for one in said))
            prune(file, limit)
        except OSError as error:
            trouble = (*trouble, _not_kept(file, error))
        return encoded, trouble


def tokenizer_state(tokenizer: Any) -> str | None:
    """All that decides of a tokenizer's tokens: what its files made of it, and the libraries' versions.

    None where that cannot be told, for a tokenizer in Python or with code of its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    written = backend.to_str()
    state = written.partition('"added_tokens":')[2] or written  # before it: how the last call cut and padded
    about = (
        type(tokenizer).__qualname__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        getattr(tokenizer, "split_special_tokens", False),
        *(importlib.metadata.version(name) for name in ("transformers", "tokenizers")),
    )
    return f"{about} {state}"


def _digest(rows: Sequence[Row], loss_on: str, state: str) -> str:
    """Of everything that the tokens follow from."""
    digest = hashlib.sha256()
    texts = itertools.chain.from_iterable((row.prompt, row.response) for row in rows)
    for text in itertools.chain((_FORMAT, loss_on, state), texts):
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _written(rows: Sequence[TokenRow], digest: str) -> bytes:
    tensors = {
        "ids": np.frombuffer(b"".join(row.ids.tobytes() for row in rows), dtype=np.intc).astype(_ID),
        "lengths": np.array([len(row) for row in rows], dtype=_COUNT),
        "given": np.array([row.given for row in rows], dtype=_COUNT),
    }
    return safetensors.save({**tensors, "checksum": _checksum(tensors, digest)})


def _kept(file: Path, digest: str, count: int) -> tuple[list[TokenRow] | None, tuple[str, ...]]:
    """The rows in `file`; None where there is none, or with a note where it is damaged."""
    try:
        rows = _read(file.read_bytes(), digest, count)
        used(file)
        return rows, ()
    except OSError:  # there is none; or, if it cannot be read, it is replaced
        return None, ()
    except (SafetensorError, KeyError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        return None, (f"tokens: {file} was damaged, and is made anew ({found})",)


def _read(content: bytes, digest: str, count: int) -> list[TokenRow]:
    tensors = safetensors.load(content)
    if tensors.pop("checksum").tobytes() != _checksum(tensors, digest).tobytes():
        raise ValueError("its checksum does not hold")
    if len(tensors["lengths"]) != count:
        raise ValueError(f"it holds {len(tensors['lengths'])} rows of {count}")
    ids = memoryview(tensors["ids"].astype(np.intc).tobytes())
    ends = (tensors["lengths"].cumsum() * np.dtype(np.intc).itemsize).tolist()
    starts = [0, *ends[:-1]]
    given = tensors["given"].tolist()
    return [
        TokenRow(_ids(ids[start:end]), known) for start, end, known in zip(starts, ends, given, strict=True)
    ]


def _ids(content: memoryview) -> array[int]:
    ids = array("i")
    ids.frombytes(content)
    return ids


def _checksum(tensors: dict[str, Any], digest: str) -> Any:
    """SHA-256 over what a file holds and what it is for."""
    state = hashlib.sha256(digest.encode())
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].tobytes())
    return np.frombuffer(state.digest(), dtype=np.uint8)


def _not_kept(file: Path, error: OSError) -> str:
    return f"tokens: not kept, {file.parent} cannot be written ({error.strerror or error})"
