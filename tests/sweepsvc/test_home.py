"""The stable places of a home."""

from pathlib import Path

import pytest

from sweeps.errors import CannotStart
from sweepsvc.home import Home


@pytest.fixture(autouse=True)
def _no_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEPSVC_HOME", "SWEEPSVC_STUDY_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_the_default_home_is_runs_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home().path == tmp_path / "runs"
    assert Home().study_url == f"sqlite:///{tmp_path}/runs/study.db"
    assert Home().tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert Home().artifacts == tmp_path / "runs/mlartifacts"


def test_an_option_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPSVC_HOME", str(tmp_path / "a"))
    assert Home().path == tmp_path / "a"
    assert Home(tmp_path / "b").path == tmp_path / "b"


def test_servers_take_the_place_of_the_embedded_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEPSVC_STUDY_URL", "postgresql://host/study")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert Home().study_url == "postgresql://host/study"
    assert Home().tracking_uri == "http://host:5000"


def test_a_sweep_keeps_the_storage_that_it_was_launched_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one knows nothing of it, and fetching from there would remove what is here."""
    monkeypatch.setenv("SWEEPSVC_STORAGE", "s3://other")
    assert Home(tmp_path).storage == "s3://other"
    assert Home(tmp_path).storing("").storage == ""
    assert Home(tmp_path).storing("s3://bucket").sweep("one").storage == "s3://bucket"
    assert Home(tmp_path, "s3://bucket").storing("s3://bucket").storage == "s3://bucket"
    with pytest.raises(
        CannotStart, match=r"keeps its storage, got s3://bucket for one that was .* with none"
    ):
        Home(tmp_path, "s3://bucket").storing("")
