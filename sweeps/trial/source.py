"""Where the weights of a model are, and the architecture that they belong to."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.errors import BadModel, DownloadFailed
from sweeps.spec import ModelSpec
from sweeps.trial.causes import causes, hub_not_reached

_PACKAGE = "package:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, or in the hub's local cache."""

    name: str
    revision: str

    @property
    def place(self) -> dict[str, Any]:
        """What `from_pretrained` calls it."""
        return {"pretrained_model_name_or_path": self.name, "revision": self.revision}


@dataclass(frozen=True)
class FolderModel:
    """A folder with `config.json`, safetensors and a tokenizer."""

    path: Path

    @property
    def place(self) -> dict[str, Any]:
        """What `from_pretrained` calls it."""
        return {"pretrained_model_name_or_path": self.path}


@dataclass(frozen=True)
class GgufModel:
    """One GGUF file, which holds weights, configuration and tokenizer."""

    path: Path

    @property
    def place(self) -> dict[str, Any]:
        """What `from_pretrained` calls it."""
        return {"pretrained_model_name_or_path": self.path.parent, "gguf_file": self.path.name}


Source = HubModel | FolderModel | GgufModel


def locate(spec: ModelSpec) -> Source:
    """Where `spec.id` points to. Raises `BadModel` for a path that does not exist or is of no known kind."""
    if spec.id.startswith(_PACKAGE):
        source = _local(_packaged(spec.id), spec)
    elif (path := Path(spec.id).expanduser()).exists() or _looks_like_a_path(spec.id):
        source = _local(path, spec)
    else:
        return HubModel(spec.id, spec.revision or "main")
    if spec.revision is not None:
        raise BadModel(
            f"model.revision belongs to a hub model, got revision={spec.revision!r} for the local {spec.id}; "
            "remove it"
        )
    return source


def read_config(source: Source, spec: ModelSpec) -> Any:
    """The transformers config of a model, without its weights.

    Raises `BadModel` also for what would load, and be something else than a plain causal language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(**source.place, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # the library raises a dozen kinds, all of which mean: no model
        raise unloadable(spec, error) from error
    _check_config(config, spec)
    return config


def read_tokenizer(source: Source, spec: ModelSpec) -> Any:
    """The transformers tokenizer of a model, without its weights. Raises `BadModel`, `DownloadFailed`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**source.place, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # as for the config
        raise unloadable(spec, error) from error


def unloadable(spec: ModelSpec, error: Exception) -> BadModel | DownloadFailed:
    """`error`, which came out of loading `spec`, as ours: with the remedy that fits its cause."""
    text = " ".join(str(error).split())
    found = f"{type(error).__name__}: {text[:300]}"
    if hub_not_reached(error):
        return DownloadFailed(
            f"the hub must be reached for the model {spec.id}, and was not; try again later, or name a local "
            f"folder ({found})"
        )
    return BadModel(f"the model {spec.id} must load: {_remedy(error, text)} ({found})")


def _check_config(config: Any, spec: ModelSpec) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "quantization_config", None) is not None:
        raise BadModel(
            f"the weights of {spec.id} must be unquantised, got a config with quantization_config; name the "
            "unquantised model, and set model.quantization"
        )
    architectures = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures and not known.intersection(architectures) and not spec.trust_remote_code:
        raise BadModel(f"{spec.id} must be a causal language model, got {', '.join(architectures)}")


def _remedy(error: Exception, text: str) -> str:
    from huggingface_hub import errors as hub

    chain = list(causes(error))
    unreached = (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError)
    by_kind = (
        (hub.GatedRepoError, "accept its licence on the hub, and set HF_TOKEN"),
        (hub.RevisionNotFoundError, "model.revision names no branch, tag or commit of it"),
        (hub.RepositoryNotFoundError, "the hub has no such id; check model.id, or set HF_TOKEN"),
        (unreached, "the hub was not reached and its cache lacks it; fetch it, or name a local folder"),
        (ImportError, "a package is missing; install it"),
    )
    for kind, remedy in by_kind:
        if any(isinstance(cause, kind) for cause in chain):
            return remedy
    by_text = (
        ("trust_remote_code", "it brings Python code; read that, then set model.trust_remote_code: true"),
        ("safetensors", "its weights must be safetensors, so that nothing is unpickled; convert them"),
        ("this kind of AutoModel", "it must be a causal language model"),
        ("ignore_mismatched_sizes", "the shapes of its weights must be those that its config.json tells"),
    )
    return next((remedy for words, remedy in by_text if words in text), "its files must be readable")


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or not _HUB_ID.fullmatch(name)


def _local(path: Path, spec: ModelSpec) -> Source:
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GgufModel(path)
    if path.exists():
        raise BadModel(f"model.id must be a hub id, a folder or a .gguf file, got the file {path}")
    raise BadModel(f"model.id must exist, got {spec.id} ({path.absolute()}); check the path")


def _folder(path: Path) -> FolderModel:
    if not (path / "config.json").is_file():
        raise BadModel(f"a model's folder must hold a config.json, got {path} without one; check model.id")
    return FolderModel(path)


def _packaged(model_id: str) -> Path:
    """The file of `package:NAME/FILE`, found without importing the package, and only inside its folder."""
    name, _, file = model_id.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier() or not file:
        raise BadModel(f"a packaged model is written package:NAME/FILE, got {model_id!r}")
    for folder in _package_folders(name):
        path = (folder / file).resolve()
        if not path.is_relative_to(folder):
            raise BadModel(f"FILE of package:NAME/FILE must lie in the package's folder, got {model_id!r}")
        if path.exists():
            return path
    raise BadModel(f"the package {name} must hold {file}, and does not; check model.id={model_id}")


def _package_folders(name: str) -> list[Path]:
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # a module that somebody made by hand, without a place on disk
        found = None
    if found is None or not found.submodule_search_locations:
        raise BadModel(f"package:NAME must name an installed package, got {name}; install or correct it")
    return [Path(folder).resolve() for folder in found.submodule_search_locations]
