"""When Python looks for garbage."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sweeps.collecting import importing, without_collecting
from tests.servers import ROOT, plain_environment


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_inside_and_all_is_as_before_after_it() -> None:
    with without_collecting():
        assert not gc.isenabled()
        with without_collecting():
            pass
        assert not gc.isenabled(), "whoever has it off keeps it off"
    assert gc.isenabled()


def test_an_error_inside_leaves_it_on() -> None:
    with pytest.raises(ImportError), importing():
        importlib.import_module("sweeps.nothing")
    assert gc.isenabled()


def test_what_was_imported_is_never_looked_at_again() -> None:
    before = gc.get_freeze_count()
    with importing():
        made: list[list[int]] = [[]]
    assert gc.get_freeze_count() > before
    assert gc.isenabled()
    assert not any(one is made for one in gc.get_objects())


@pytest.mark.parametrize("command", [["--help"], ["status", "--home", "/nowhere"]])
def test_a_command_ends_without_looking_through_all_that_it_imported(command: list[str]) -> None:
    code = (
        "import atexit, gc, sys\n"
        "from sweepsvc.cli import main\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > len(gc.get_objects())))\n"
        f"sys.argv = ['sweepsvc', *{command!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain_environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert "frozen True" in done.stdout, done.stderr
