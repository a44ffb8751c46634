"""Connections to the databases of study and tracker."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from sweepsvc import database
from tests.servers import ROOT, Postgres, plain_environment
from tests.waiting import let_go_at_once

ENVIRONMENT = {**plain_environment(), "PYTHONPATH": str(ROOT)}

AT_ONCE = """
import sys
from sweepsvc.recorder import _connect
from sweepsvc.study import _create_database
print("ready", flush=True)
sys.stdin.readline()
{make}
"""
MAKE = {
    "study": "_create_database(sys.argv[1]).get_all_studies()",
    "tracker": "_connect(sys.argv[1]).search_experiments()",
}


def make_at_once(what: str, url: str, count: int = 3) -> list[str]:
    """How so many processes fail that make the same new database at once; "" for one that does not."""
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE.format(make=MAKE[what]), url],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    try:
        let_go_at_once(makers)
        return [maker.communicate(timeout=120)[1].strip()[-600:] for maker in makers]
    finally:
        for maker in makers:
            maker.kill()


@pytest.mark.slow
@pytest.mark.parametrize("what", MAKE)
def test_the_first_sweeps_of_a_home_may_be_launched_at_once(what: str, tmp_path: Path) -> None:
    assert make_at_once(what, f"sqlite:///{tmp_path}/new.db") == [""] * 3


@pytest.mark.slow
@pytest.mark.parametrize("what", MAKE)
def test_the_first_sweeps_of_a_team_may_be_launched_at_once(what: str) -> None:
    with Postgres() as postgres:
        url = {"study": postgres.study_url, "tracker": postgres.mlflow_url}[what]
        assert make_at_once(what, url) == [""] * 3


def test_nobody_waits_for_ever_for_who_makes_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds() -> float:
        began = time.monotonic()
        with database.one_makes(tmp_path / "new.db"):
            return time.monotonic() - began

    monkeypatch.setattr(database, "BUSY_SECONDS", 0.5)
    with database.one_makes(tmp_path / "another.db"):
        assert seconds() >= 0.5
    assert seconds() < 0.5


def test_at_the_end_of_a_process_each_database_is_one_file(tmp_path: Path) -> None:
    """Python collects nothing then, and it is MLflow's and the study's own affair that they close nothing."""
    code = f"""
import gc
from sweeps.collecting import importing
with importing():
    import sweepsvc.session
from pathlib import Path
from sweepsvc.recorder import MlflowRecorder
from sweepsvc.study import load_record, open_study
from tests.sweepsvc.samples import sweep_of
sweep = sweep_of("sampler: grid, space: {{lora.r: [4, 8]}}")
study = open_study(sweep, "one", "sqlite:///{tmp_path}/study.db", {{"owner": "me"}})
recorder = MlflowRecorder(sweep, "one", "sqlite:///{tmp_path}/mlflow.db", Path("{tmp_path}/artifacts"), {{}})
recorder.open()
recorder.start(study.ask())
assert len(list(Path("{tmp_path}").glob("*.db-wal"))) == 2
gc.freeze()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.glob("*.db*")) == ["mlflow.db", "study.db"]


def test_tables_that_somebody_else_makes_are_looked_for_again() -> None:
    failures = [
        IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed: alembic_version.version_num")),
        OperationalError("CREATE", {}, Exception("table studies already exists")),
    ]

    def make() -> str:
        if failures:
            raise failures.pop()
        return "a storage"

    assert database.make_on_a_server(make) == "a storage"


def test_a_database_that_cannot_be_made_is_not_tried_again() -> None:
    tried = []

    def make() -> None:
        tried.append(1)
        raise OperationalError("CREATE", {}, Exception("disk I/O error"))

    with pytest.raises(OperationalError):
        database.make_on_a_server(make)
    assert tried == [1]
