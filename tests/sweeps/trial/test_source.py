from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sweeps.errors import BadModel
from sweeps.spec import ModelSpec
from sweeps.trial.source import FolderModel, GgufModel, HubModel, locate, read_config


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported, with a weights file."""
    folder = tmp_path / "site" / "weights_of_mine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "site" / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def folder_with(path: Path, **config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_name_with_one_slash_is_a_hub_id_at_its_main_branch() -> None:
    assert locate(ModelSpec(id="meta-llama/Llama-2-7b-hf")) == HubModel("meta-llama/Llama-2-7b-hf", "main")
    assert locate(ModelSpec(id="gpt2", revision="abc")) == HubModel("gpt2", "abc")


def test_a_folder_with_a_config_and_a_gguf_file_are_local_models(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", model_type="llama")
    file = tmp_path / "model.GGUF"
    file.write_bytes(b"GGUF")
    assert locate(ModelSpec(id=str(folder))) == FolderModel(folder)
    assert locate(ModelSpec(id=str(file))) == GgufModel(file)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "nowhere.gguf", "a/b/c", "a b"])
def test_a_path_that_does_not_exist_is_never_asked_of_the_hub(name: str) -> None:
    with pytest.raises(BadModel, match=re.escape(f"model.id must exist, got {name}")):
        locate(ModelSpec(id=name))


def test_a_folder_without_a_config_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"must hold a config\.json"):
        locate(ModelSpec(id=str(tmp_path)))
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadModel, match=r"a hub id, a folder or a \.gguf file, got the file .*model\.bin"):
        locate(ModelSpec(id=str(tmp_path / "model.bin")))


def test_a_revision_of_a_local_model_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model", model_type="llama")
    with pytest.raises(BadModel, match=r"model\.revision belongs to a hub model, got revision='v1'"):
        locate(ModelSpec(id=str(folder), revision="v1"))


def test_a_packaged_file_is_found_without_importing_the_package(package: Path) -> None:
    assert locate(ModelSpec(id="package:weights_of_mine/model.gguf")) == GgufModel(package / "model.gguf")


def test_a_packaged_file_never_lies_outside_its_package(package: Path) -> None:
    (package / "link.gguf").symlink_to(package.parent / "secret.gguf")
    for file in ("../secret.gguf", str(package.parent / "secret.gguf"), "link.gguf"):
        with pytest.raises(BadModel, match="must lie in the package's folder"):
            locate(ModelSpec(id=f"package:weights_of_mine/{file}"))


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("package:weights_of_mine/other.gguf", r"weights_of_mine must hold other\.gguf"),
        ("package:no_such_package/x.gguf", "must name an installed package, got no_such_package"),
        ("package:json.decoder/x.gguf", "is written package:NAME/FILE"),
        ("package:weights_of_mine", "is written package:NAME/FILE"),
        ("package:sys/x.gguf", "must name an installed package, got sys"),
    ],
)
def test_a_packaged_model_that_cannot_be_found_says_what_is_missing(
    package: Path, model_id: str, message: str
) -> None:
    with pytest.raises(BadModel, match=message):
        locate(ModelSpec(id=model_id))


def test_a_config_tells_the_architecture(tiny_model_dir: Path) -> None:
    spec = ModelSpec(id=str(tiny_model_dir))
    assert read_config(locate(spec), spec).hidden_size == 64


def config_fault(folder: Path) -> str:
    spec = ModelSpec(id=str(folder))
    with pytest.raises(BadModel) as caught:
        read_config(locate(spec), spec)
    return str(caught.value)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, model_type="bert", architectures=["BertForMaskedLM"])
    assert "must be a causal language model, got BertForMaskedLM" in config_fault(folder)


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, model_type="llama", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    assert "must be unquantised" in config_fault(folder)


def test_code_that_comes_with_a_model_is_not_run_unless_the_spec_says_so(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    folder = folder_with(
        tmp_path / "model", model_type="mine", auto_map={"AutoConfig": "configuration_mine.MyConfig"}
    )
    (folder / "configuration_mine.py").write_text(f"open({str(marker)!r}, 'w')")
    assert "set model.trust_remote_code: true" in config_fault(folder)
    assert not marker.exists()


def test_a_broken_config_names_the_model_and_the_cause(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{nope")
    fault = config_fault(tmp_path)
    assert str(tmp_path) in fault
    assert "its files must be readable" in fault


def test_a_hub_model_that_cannot_be_reached_says_how_to_have_it() -> None:
    spec = ModelSpec(id="nobody/nothing")
    with pytest.raises(BadModel, match=r"nobody/nothing must load: the hub was not reached .* name a local"):
        read_config(locate(spec), spec)
