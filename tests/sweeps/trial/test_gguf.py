from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from sweeps.errors import BadModel
from sweeps.spec import ModelSpec
from sweeps.trial import gguf
from sweeps.trial.base import load_base
from tests.tiny import save_tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWEEPSVC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_a_gguf_file_gives_the_model_and_tokenizer_that_it_was_made_from(
    tiny_gguf: Path, tiny_model_dir: Path
) -> None:
    origin = load_base(ModelSpec(id=str(tiny_model_dir), quantization="none"))
    base = load_base(ModelSpec(id=str(tiny_gguf), quantization="none"))
    ids = torch.arange(3, 23).view(2, 10)
    assert torch.equal(base.model(ids).logits, origin.model(ids).logits)
    text = "Which river flows through Nolum?"
    assert base.tokenizer(text, add_special_tokens=False) == origin.tokenizer(text, add_special_tokens=False)
    assert (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id) == (0, 1)


def test_no_token_is_left_without_an_embedding(tiny_gguf: Path) -> None:
    base = load_base(ModelSpec(id=str(tiny_gguf), quantization="none"))
    foreign = base.tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert max(foreign) < base.model.config.vocab_size


def test_a_file_is_converted_once(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf.converted(tiny_gguf)
    assert folder.parent == cache
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted again"))
    assert gguf.converted(tiny_gguf) == folder


def test_another_content_of_the_same_name_is_another_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF one")
    first = gguf.cached_folder(file)
    file.write_bytes(b"GGUF two")
    assert gguf.cached_folder(file) != first


def test_of_two_that_convert_at_once_the_second_waits_and_takes_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    converted: list[Path] = []

    def slowly(path: Path, folder: Path) -> None:
        converted.append(path)
        time.sleep(0.1)
        folder.mkdir()

    monkeypatch.setattr(gguf, "_convert", slowly)
    threads = [threading.Thread(target=gguf.converted, args=(file,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert converted == [file]


def test_a_conversion_that_fails_leaves_nothing_to_be_taken_for_a_model(
    tiny_model_dir: Path, tmp_path: Path, cache: Path
) -> None:
    file = save_tiny_gguf(
        tiny_model_dir, tmp_path / "short.gguf", without="model.layers.1.mlp.up_proj.weight"
    )
    with pytest.raises(BadModel, match=r"must hold every weight of its model, and lacks .*up_proj"):
        gguf.converted(file)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_file_that_is_no_gguf_is_a_bad_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"nonsense")
    with pytest.raises(BadModel, match=r"model\.gguf must load: its files must be readable"):
        load_base(ModelSpec(id=str(file)))
