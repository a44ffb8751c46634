"""A GGUF file as a folder of safetensors: dequantised once, kept in a cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sweeps.errors import BadModel
from sweeps.trial.cache import cache_home, only_one
from sweeps.trial.paths import whole_folder
from sweeps.trial.source import GgufModel


def cached_folder(path: Path) -> Path:
    """Where the converted `path` lies, or would lie: named by the file's content."""
    with path.open("rb") as file:
        return cache_home() / "models" / hashlib.file_digest(file, "sha256").hexdigest()


def converted(path: Path) -> Path:
    """The folder of the converted file, made if there is none. Of two processes, the second waits.

    The weights are float32, in which a dequantised value is exact: 4 bytes a parameter on disk.
    Raises `BadModel` for a file whose tensors do not make up the whole model.
    """
    folder = cached_folder(path)
    if folder.exists():
        return folder
    with only_one(folder):
        if not folder.exists():
            _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    place = GgufModel(path).place
    # Without `dequantize` the weights stay packed in GGUF's blocks, which nothing can quantise again.
    model, loading = AutoModelForCausalLM.from_pretrained(
        **place,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if lacking := sorted(loading["missing_keys"]):
        raise BadModel(f"{path} must hold every weight of its model, and lacks {', '.join(lacking[:3])}")
    tokenizer = AutoTokenizer.from_pretrained(**place)
    with whole_folder(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        _drop_foreign_tokens(draft / "tokenizer.json", model.config.vocab_size)


def _drop_foreign_tokens(file: Path, rows: int) -> None:
    """Forget tokens that transformers adds to a GGUF's tokenizer, and the model has no embedding for."""
    tokenizer = json.loads(file.read_text("utf-8"))
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < rows]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
