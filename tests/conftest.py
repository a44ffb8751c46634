"""No test may reach a hub, and all of them share two cores. Set before any library is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.mlflow_server import Server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tensors this small a second thread only waits
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave the core to whoever needs it

import pytest


@pytest.fixture(scope="session", autouse=True)
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the cache of whoever runs the tests, but where one is named for them."""
    with pytest.MonkeyPatch.context() as patch:
        if "SWEEPSVC_CACHE" not in os.environ:
            patch.setenv("SWEEPSVC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer; see `tests/tiny.py`. Read only."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_tied_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its output head tied to its embeddings. Read only."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny_tied"), tied=True)


@pytest.fixture(scope="session")
def alpaca_rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON file of 24 small Alpaca rows. Read only."""
    from tests.tiny import save_rows

    return save_rows(tmp_path_factory.mktemp("rows") / "alpaca.json")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny Llama as a GGUF file. Read only."""
    from tests.tiny import save_tiny_gguf

    return save_tiny_gguf(tiny_model_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A real MLflow server that runs already; a test may stop it and start it again."""
    from tests.mlflow_server import Server

    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()
