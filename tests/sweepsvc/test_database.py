"""Connections to the databases of study and tracker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from sweepsvc import database
from tests.servers import ROOT, Postgres, plain_environment

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
            env={**plain_environment(), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("\n")
        maker.stdin.flush()
    return [maker.communicate(timeout=120)[1].strip().rpartition("\n")[2] for maker in makers]


@pytest.mark.slow
@pytest.mark.parametrize("what", MAKE)
def test_the_first_sweeps_of_a_home_may_be_launched_at_once(what: str, tmp_path: Path) -> None:
    assert make_at_once(what, f"sqlite:///{tmp_path}/new.db") == [""] * 3


@pytest.mark.slow
def test_the_first_sweeps_of_a_team_may_be_launched_at_once() -> None:
    with Postgres() as postgres:
        assert make_at_once("study", postgres.study_url) == [""] * 3


def test_nobody_waits_for_ever_for_who_makes_a_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with database.one_makes(tmp_path / "new.db"), database.one_makes(tmp_path / "new.db"):
        pass


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
