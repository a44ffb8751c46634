"""`--set PATH=VALUE`, and the local files that a sweep names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sweeps.document import Document, Where, field_path, read_value_text
from sweeps.errors import InvalidValue
from sweeps.forms import FileForm, override_paths
from sweeps.spec import FIELDS, TrialSpec
from sweeps.wording import shown, unknown

_LOCAL_MODEL = ("./", "../", "~/", "/")
_LOCAL_FILES = ("data.path",)
_LOCAL_FOLDERS = ("evaluate.data_dir", "evaluate.task_dir")


def lay_over(document: Document, override: str) -> str:
    """Lay one `PATH=VALUE` over the document; gives it back in the form that means the same in any folder."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not path:
        message = f"PATH=VALUE is needed, got {shown(override)}; write it like train.samples=512"
        document.refuse_set("", message)
        return override
    try:
        where = _where_of_override(path)
        value = read_value_text(text)
        rooted = _rooted(where, value, Path.cwd())
        if where[:-1] == ("objective",):  # the one it replaces may have the other direction
            where, rooted = where[:1], {where[1]: rooted}
        document.put(where, rooted)
    except InvalidValue as error:
        document.refuse_set(path, str(error))
        return override
    return override if rooted == value or where == ("objective",) else _written(path, rooted)


def _written(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value, ensure_ascii=False)}"


def _where_of_override(path: str) -> tuple[str, ...]:
    """`lora.r` and `trial.lora.r` are the same; a field of the space is one key."""
    parts = tuple(path.split("."))
    if parts[0] in TrialSpec.model_fields:
        parts = ("trial", *parts)
    if parts[0] not in FileForm.model_fields:
        raise InvalidValue(unknown("path", path, [*FileForm.model_fields, *override_paths(), *FIELDS]))
    if parts[:2] == ("search", "space") and len(parts) > 3:
        return *parts[:2], ".".join(parts[2:])
    return parts


def _rooted(where: Where, value: Any, folder: Path) -> Any:
    """`value` with each relative file path in it made absolute."""
    if isinstance(value, dict):
        return {key: _rooted((*where, key), inner, folder) for key, inner in value.items()}
    path = field_path(where)
    if isinstance(value, list):
        return [located(path, inner, folder) for inner in value]
    return located(path, value, folder)


def is_local(path: str, value: Any) -> bool:
    """Whether `value` names a file or folder of this machine; a hub id does not."""
    if path == "model.id":
        return isinstance(value, str) and value.startswith(_LOCAL_MODEL)
    return path in (*_LOCAL_FILES, *_LOCAL_FOLDERS) and isinstance(value, str)


LOCAL_FIELDS = ("model.id", *_LOCAL_FILES, *_LOCAL_FOLDERS)
"""The fields that may name a file or folder of a machine."""


def located(path: str, value: Any, folder: Path) -> Any:
    """The value of the field at `path`, absolute where it names a local file or folder."""
    if not is_local(path, value):
        return value
    if value.startswith("~/"):
        value = Path(value).expanduser()
    return os.path.normpath(folder / value)  # not resolved: a link's own name carries the file's type


def missing(path: str, local: Path) -> str | None:
    """Why the file or folder that the field at `path` names cannot be used."""
    if path in _LOCAL_FILES and local.is_dir():
        return f"a file is needed, got the folder {local}; name a file in it"
    if path in _LOCAL_FOLDERS and local.is_file():
        return f"a folder is needed, got the file {local}; name the folder that holds it"
    if local.exists():
        return None
    kind = "folder" if path in _LOCAL_FOLDERS else "file" if path in _LOCAL_FILES else "file or folder"
    return f"no such {kind}, looked for {local}; check the path"
