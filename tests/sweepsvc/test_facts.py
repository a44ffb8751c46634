"""The commit, the versions, and whether a sweep's driver still lives."""

import subprocess
from pathlib import Path

from sweepsvc import facts


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_sweep_files_repository(tmp_path: Path) -> None:
    assert facts.git_commit(tmp_path) == ""
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert facts.git_commit(tmp_path) == commit
    (tmp_path / "a").write_text("2")
    assert facts.git_commit(tmp_path) == f"{commit}-dirty"


def test_every_library_of_a_trial_is_named_with_its_version(tmp_path: Path) -> None:
    gathered = facts.gather(tmp_path / "sweep.yaml")
    assert gathered["version.torch"].startswith("2.")
    assert all(f"version.{name}" in gathered for name in facts.LIBRARIES)
