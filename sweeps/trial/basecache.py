"""Bases as they are once quantised, kept on local disk: a new process reads them and quantises nothing.

A kept base is a folder, `$SWEEPSVC_CACHE/bases/<digest>/`, with the model as transformers saves it
(safetensors: nothing is unpickled) and `kept.json`, which tells what it was made from, and a checksum of each
file. One that does not hold is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.spec import ModelSpec
from sweeps.trial.cache import Kept, cache_home, limit_bytes, make_room, only_one
from sweeps.trial.paths import remove, whole_folder
from sweeps.trial.source import FolderModel, HubModel, Source

LEAST_BYTES = 50_000_000
"""A smaller base is quantised in less time than it takes to keep it in order."""

DEFAULT_LIMIT_GB = 50.0
"""Decimal gigabytes of all kept bases together, unless `SWEEPSVC_BASES_GB` says otherwise; 0 keeps none."""

_LIMIT = "SWEEPSVC_BASES_GB"

SPARE_BYTES = 2_000_000_000
"""What must stay free on the disk: trials write there too."""

_FORMAT = 1
_MANIFEST = "kept.json"
_CHUNK_BYTES = 1 << 24


def kept_base(spec: ModelSpec, source: Source, config: Any, device: str, dtype: str) -> KeptBase | None:
    """Where the quantised base of `spec` is kept, or would be.

    None for what is not quantised, and where its origin cannot be told: a model with code of its own may make
    of its weights whatever it likes.
    """
    origin = _origin(source, config)
    if spec.quantization == "none" or spec.trust_remote_code or origin is None:
        return None
    libraries = ("bitsandbytes", "torch", "transformers")
    about = {
        "format": _FORMAT,
        "model": spec.id,
        "origin": origin,
        "quantization": spec.quantization,
        "double_quantization": spec.double_quantization,
        "quantize_lm_head": spec.quantize_lm_head,
        "dtype": dtype,
        "device": device,  # the kinds round differently
        **{name: importlib.metadata.version(name) for name in libraries},
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return KeptBase(cache_home() / "bases" / digest, about)


def _origin(source: Source, config: Any) -> Any:
    """What tells one model's files from another's without reading them, which takes as long as quantising.

    A hub's commit; of a folder each file's path, size and time of change, which any ordinary way to replace a
    file alters.
    """
    if isinstance(source, HubModel):
        commit = getattr(config, "_commit_hash", None)
        return commit and [source.name, commit]
    assert isinstance(source, FolderModel), "a GGUF file is converted into a folder first"
    folder = source.path.resolve()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return [str(folder), *([path.name, (at := path.stat()).st_size, at.st_mtime_ns] for path in files)]


@dataclass(frozen=True)
class KeptBase:
    """The folder of one kept base, there or not; `about` is what it is made from."""

    folder: Path
    about: Mapping[str, Any]

    def is_there(self) -> bool:
        return self.folder.is_dir()

    def check(self) -> None:
        """Raise `ValueError` or `OSError` if it is not whole; else it counts as used now."""
        manifest = self.folder / _MANIFEST
        files = json.loads(manifest.read_text("utf-8"))["files"]
        for name, (size, checksum) in files.items():
            if (found := (self.folder / name).stat().st_size) != size:
                raise ValueError(f"{name} must have {size} bytes, got {found}")
            if _checksum(self.folder / name) != checksum:
                raise ValueError(f"the checksum of {name} does not hold")
        with contextlib.suppress(OSError):  # a cache that others fill may be read-only to us
            os.utime(manifest)

    def quantization_config(self) -> dict[str, Any]:
        """How its weights are packed, as transformers wrote it down."""
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        packed: dict[str, Any] = config["quantization_config"]
        return packed

    def making(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which it is made. Raises `OSError` where there can be none."""
        return only_one(self.folder)

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            remove(self.folder)

    def keep(self, save: Callable[[Path], None], size_bytes: int) -> tuple[str, ...]:
        """Have `save` write the model of about `size_bytes` into the folder, which appears whole; notes.

        The bases that were used longest ago make room. Whatever goes wrong costs the next process time, and
        nothing else.
        """
        limit, said = limit_bytes(_LIMIT, DEFAULT_LIMIT_GB)
        return (*said, *self._keep(save, size_bytes, limit))

    def _keep(self, save: Callable[[Path], None], size_bytes: int, limit: float) -> tuple[str, ...]:
        if size_bytes < LEAST_BYTES or limit == 0:
            return ()
        if size_bytes > limit:
            return (f"base: not kept, {size_bytes / 1e9:.1f} GB is more than {_LIMIT}={limit / 1e9:g}",)
        try:
            for draft in self.folder.parent.glob(f".{self.folder.name}.*"):  # of a process that was killed
                remove(draft)
            left = make_room(_kept(self.folder.parent), limit - size_bytes, remove)
            if left > limit - size_bytes:
                return (f"base: not kept, {left / 1e9:.1f} GB of others cannot be removed",)
            free = shutil.disk_usage(self.folder.parent).free
            if free < size_bytes + SPARE_BYTES:
                return (
                    f"base: not kept, {self.folder.parent} has {free / 1e9:.1f} GB free for its "
                    f"{size_bytes / 1e9:.1f} GB, and {SPARE_BYTES / 1e9:g} GB must stay free",
                )
            with whole_folder(self.folder) as draft:
                save(draft)
                _write_manifest(draft, self.about)
        except OSError as error:
            return (f"base: not kept, {self.folder.parent} cannot be written ({error.strerror or error})",)
        return (f"base: kept in 4 bits in {self.folder.parent}, for the next process that needs it",)


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"about": about, "files": files}, indent=2) + "\n", "utf-8")


def _checksum(file: Path) -> int:
    """CRC-32: against a disk's mistakes, not against malice, at 2 GB/s where SHA-256 has half of that."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _kept(bases: Path) -> Iterator[Kept]:
    for folder in bases.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.name.startswith("."):
                sizes: Sequence[int] = [file.stat().st_size for file in folder.iterdir()]
                yield Kept((folder / _MANIFEST).stat().st_mtime_ns, sum(sizes), folder)
