"""A trial's folder in an object store: cut at any request, taken up whole on another node."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from sweeps.errors import CannotStart, DiskFull
from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.checkpoint import Checkpoints
from sweeps.trial.paths import TrialFolder, remove, whole_folder, write_whole
from sweepsvc import mirror as mirrors
from sweepsvc.mirror import Mirror, Storage, StorageFailed, Superseded

SPEC = TrialSpec.model_validate(
    {"model": {"id": "m"}, "data": {"id": "d"}, "evaluate": {"tasks": ["truthfulqa_mc1"]}}
)
REQUESTS = ("ls", "cat_file", "pipe_file", "put_file", "get_file", "rm_file")


class Killed(BaseException):
    """The process ends here: nothing of ours handles it."""


class Watched:
    """A file system that calls `at` with the number and the name of each request, before it is made."""

    def __init__(self, files: Any, at: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self._files, self._at = files, at
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        if name not in REQUESTS:
            return found

        def request(*args: Any, **kwargs: Any) -> Any:
            self.requests += 1
            self._at(self.requests, name, args)
            return found(*args, **kwargs)

        return request


class ObjectStore(AsyncFileSystem):
    """As s3fs is: asynchronous, without folders, keeps listings unless told not to."""

    protocol = "objects"
    objects: dict[str, bytes] = {}  # noqa: RUF012  # shared: a store is one for all

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if path not in self.dircache:
            below = {name: {"name": name, "type": "file"} for name in self.objects if name.startswith(path)}
            self.dircache[path] = list(below.values())
            found = list(below.values())
        else:
            found = self.dircache[path]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    async def _cat_file(self, path: str, *_: Any, **kwargs: Any) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    async def _pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self.objects[path] = value

    async def _put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.objects[rpath] = Path(lpath).read_bytes()

    async def _get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(await self._cat_file(rpath))

    async def _rm_file(self, path: str, **kwargs: Any) -> None:
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError("s3fs would make a bucket")


fsspec.register_implementation("objects", ObjectStore)


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mirrors, "_PAUSE_SECONDS", (0.0,))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    ObjectStore.objects.clear()
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture(params=["memory", "file", "objects"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "memory": "memory://bucket/prefix",
        "file": f"file://{tmp_path / 'store'}",
        "objects": "objects://bucket/prefix",
    }[request.param]


def watched(url: str, at: Callable[[int, str, tuple[Any, ...]], None]) -> tuple[Storage, Watched]:
    storage = Storage(url)
    files = Watched(storage._store.files, at)
    storage._opened = replace(storage._store, files=files)
    return storage, files


def mirror(url: str, folder: Path) -> Mirror:
    return Storage(url).trial("demo-1", "0", folder)


def on_new_node(url: str, folder: Path) -> Mirror:
    """What a worker does before a trial."""
    mine = mirror(url, folder)
    mine.claim()
    mine.pull()
    return mine


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(TrialFolder(folder).checkpoints, SPEC.digest, "cpu")


def train_to(folder: Path, step: int) -> None:
    """Write the checkpoint of `step` as a trial does; its numbers are the step's."""
    kept = checkpoints(folder)
    kept.newest()
    kept.write(step, {"w": torch.full((8,), float(step))}, {"step": step})


def begin(folder: Path, *steps: int) -> None:
    TrialFolder(folder).write_spec(SPEC)
    for step in steps:
        train_to(folder, step)


def end(folder: Path, outcome: Any = "completed") -> None:
    with whole_folder(TrialFolder(folder).adapter) as draft:
        (draft / "adapter_model.safetensors").write_bytes(b"weights" * 100)
        (draft / "adapter_config.json").write_text("{}")
    write_whole(TrialFolder(folder).evaluation, "{}")
    TrialFolder(folder).write_result(TrialResult(outcome=outcome))


def newest_step(folder: Path) -> int:
    """The step of the checkpoint that a trial goes on from; every one that is there must be good."""
    found, refused = checkpoints(folder).newest()
    assert refused == []
    assert found is not None
    assert torch.equal(found.tensors["w"], torch.full((8,), float(found.step)))
    return found.step


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and mirrors._is_stored(str(path.relative_to(folder)))
    }


# --- there and back ---------------------------------------------------------------------------------


def test_a_folder_appears_on_another_node_as_it_was(url: str, tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    mine = on_new_node(url, here)
    begin(here, 1, 2)
    end(here)
    mine.push()
    on_new_node(url, there)
    assert content(there) == content(here)
    assert len(content(there)) == 11
    assert newest_step(there) == 2


def test_what_was_removed_here_is_removed_there_and_nothing_piles_up(url: str, tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    mine = on_new_node(url, here)
    begin(here)
    for step in range(1, 8):
        train_to(here, step)
        mine.push()
    looking = mirror(url, there)
    looking.pull()
    assert sorted(path.name for path in (there / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000007",
    ]
    # spec, two checkpoints of three files, the one that the push before had, two indexes, the claim
    assert len(mine._store.names()) == 1 + 6 + 3 + 2 + 1
    remove(here / "checkpoints")
    mine.finish()
    assert [re.sub(r"[^a-z]", "", name.partition(".")[2]) for name in sorted(mine._store.names())] == [
        "specjson",
        "claim",
        "indexjson",
    ]
    looking.pull()
    assert content(there) == content(here)


def test_what_a_node_has_left_over_of_an_earlier_attempt_goes(url: str, tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    mine = on_new_node(url, here)
    begin(here, 1, 2)
    mine.push()
    begin(there, 1, 2, 9)
    end(there, "interrupted")
    (there / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    on_new_node(url, there)
    assert content(there) == content(here)


def test_of_a_node_itself_nothing_is_stored_and_nothing_is_removed(url: str, tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    mine = on_new_node(url, here)
    begin(here, 1)
    for folder in (here, there):
        (folder / "tracking").mkdir(parents=True, exist_ok=True)
        (folder / "tracking" / "log.jsonl").write_text(folder.name)
        (folder / "lock").write_text(folder.name)
        (folder / ".result.json.draft").write_text("a draft")
    (here / "checkpoints" / ".step-00000002.draft").mkdir()
    (here / "checkpoints" / ".step-00000002.draft" / "state.json").write_text("a draft")
    mine.push()
    on_new_node(url, there)
    assert (there / "tracking" / "log.jsonl").read_text() == "b"
    assert (there / "lock").read_text() == "b"
    assert (there / ".result.json.draft").exists()
    assert not any("log" in name or "lock" in name or "draft" in name for name in mine._store.names())
    assert not list((there / "checkpoints").glob(".*"))


def test_nothing_new_is_no_request_and_nothing_is_sent_twice(url: str, tmp_path: Path) -> None:
    made: list[str] = []
    storage, _ = watched(url, lambda number, name, args: made.append(name))
    mine = storage.trial("demo-1", "0", tmp_path / "a")
    mine.claim()
    begin(tmp_path / "a", 1, 2)
    assert mine.push()
    made.clear()
    assert not mine.push()
    assert made == []
    TrialFolder(tmp_path / "a").write_result(TrialResult(outcome="interrupted"))
    assert mine.push()
    assert [name for name in made if name != "rm_file"] == ["ls", "put_file", "pipe_file"]


def test_what_is_here_already_is_not_fetched_again(url: str, tmp_path: Path) -> None:
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1, 2)
    mine.push()
    fetched: list[str] = []
    storage, _ = watched(url, lambda number, name, args: name == "get_file" and fetched.append(args[0]))
    theirs = storage.trial("demo-1", "0", tmp_path / "b")
    theirs.pull()
    assert len(fetched) == 7
    train_to(tmp_path / "a", 3)
    mine.push()
    fetched.clear()
    theirs.pull()
    assert len(fetched) == 3
    assert newest_step(tmp_path / "b") == 3


def test_without_checkpoints_they_are_neither_fetched_nor_touched(url: str, tmp_path: Path) -> None:
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1)
    end(tmp_path / "a")
    mine.push()
    begin(tmp_path / "b", 7)
    mirror(url, tmp_path / "b").pull(checkpoints=False)
    assert newest_step(tmp_path / "b") == 7
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").exists()
    assert TrialFolder(tmp_path / "b").is_final(SPEC)


def test_a_name_that_reads_as_a_pattern_is_a_name(url: str, tmp_path: Path) -> None:
    """fsspec's `put`, `get` and `rm` take `*` and `[` for patterns."""
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a")
    for name in ("note*.txt", "note-1.txt", "x[1].txt", "x1.txt"):
        (tmp_path / "a" / name).write_text(name)
    mine.push()
    (tmp_path / "a" / "note*.txt").unlink()
    (tmp_path / "a" / "x[1].txt").unlink()
    for step in (1, 2, 3):
        train_to(tmp_path / "a", step)
        mine.push()
    mirror(url, tmp_path / "b").pull()
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_the_last_word_needs_no_files(url: str, tmp_path: Path) -> None:
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 11, 12)
    end(tmp_path / "a", "interrupted")
    mine.push()
    words = Storage(url).last_words("demo-1", ["0", "1"])
    assert words["1"] == mirrors.LastWord()
    assert (words["0"].result, words["0"].step) == (TrialResult(outcome="interrupted"), 12)
    assert words["0"].spec is not None
    assert words["0"].spec.digest == SPEC.digest


def test_forgotten_the_next_attempt_begins_anew_and_the_last_cannot_push(url: str, tmp_path: Path) -> None:
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1, 2)
    mine.push()
    mirror(url, tmp_path / "driver").forget()
    train_to(tmp_path / "a", 3)
    with pytest.raises(Superseded):
        mine.push()
    begin(tmp_path / "b", 1)
    on_new_node(url, tmp_path / "b")
    assert content(tmp_path / "b") == {}


# --- cut at every request ---------------------------------------------------------------------------


def cut(number: int, half: bool) -> Callable[[int, str, tuple[Any, ...]], None]:
    """Killed before request `number`, or in the middle of it where it writes."""

    def at(made: int, name: str, args: tuple[Any, ...]) -> None:
        if made != number:
            return
        if half and name in ("pipe_file", "put_file"):
            source, target = (
                (args[1], args[0]) if name == "pipe_file" else (Path(args[0]).read_bytes(), args[1])
            )
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            Path(target).write_bytes(source[: len(source) // 2])
        raise Killed

    return at


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_a_push_cut_at_any_request_leaves_the_newest_checkpoint_or_the_one_before(
    tmp_path: Path, half: bool
) -> None:
    """Storage of files, which, unlike an object store, also shows a file of which half is written."""
    before = tmp_path / "before"
    first = on_new_node(f"file://{before}", tmp_path / "node")
    begin(tmp_path / "node", 1, 2)
    first.push()
    steps = []
    for number in range(1, 100):
        store, here, there = (tmp_path / f"{name}{number}" for name in ("store", "here", "there"))
        shutil.copytree(before, store)
        url = f"file://{store}"
        on_new_node(url, here)
        storage, files = watched(url, cut(number, half))
        mine = storage.trial("demo-1", "0", here)
        try:
            mine.claim()
            mine.pull()
            train_to(here, 3)
            end(here)
            mine.finish()
        except Killed:
            pass
        theirs = on_new_node(url, there)
        steps.append(newest_step(there))
        has_ended = TrialFolder(there).is_final(SPEC)
        assert has_ended == (steps[-1] == 3)  # the result never without the rest
        assert has_ended == (len(content(there)) == 11)
        train_to(there, 4)
        theirs.push()
        mirror(url, here).pull()
        assert content(here) == content(there)
        if files.requests < number:
            break
    else:
        pytest.fail("the push never came to its end")
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}
    assert len(steps) > 15


def test_a_worker_that_goes_on_after_a_failed_push_stores_all_of_it(tmp_path: Path) -> None:
    """Whichever request fails, once."""
    url = "memory://bucket"
    for number in range(1, 100):
        here, there = tmp_path / f"here{number}", tmp_path / f"there{number}"

        def at(made: int, name: str, args: tuple[Any, ...], number: int = number) -> None:
            if made == number:
                raise ConnectionResetError("gone")

        mine = Storage(url).trial("demo-1", str(number), here)
        mine.claim()
        begin(here, 1, 2)
        mine.push()
        good = mine._store
        files = Watched(good.files, at)
        mine._store = replace(good, files=files)
        for step in (3, 4):
            train_to(here, step)
            mine.keep_up()
            mine._pushes_from = 0.0
        mine._store = good
        mine.push()
        Storage(url).trial("demo-1", str(number), there).pull()
        assert newest_step(there) == 4
        assert content(there) == content(here)
        if files.requests < number:
            return
    pytest.fail("the pushes never came to their end")


def test_a_pull_cut_at_any_request_is_mended_by_the_next(tmp_path: Path) -> None:
    url = "memory://bucket"
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1, 2)
    end(tmp_path / "a")
    mine.push()
    for number in range(1, 100):
        here = tmp_path / f"b{number}"
        begin(here, 2, 9)
        end(here, "pruned")
        storage, files = watched(url, cut(number, half=False))
        try:
            storage.trial("demo-1", "0", here).pull()
        except Killed:
            assert not [path for path in content(here) if "step-00000001" in path]
        if files.requests < number:
            assert content(here) == content(tmp_path / "a")
            break
        on_new_node(url, here)
        assert content(here) == content(tmp_path / "a")
        assert not list(here.glob(".pull.*"))
    assert number > 6


def test_a_pull_cut_while_it_puts_things_in_place_shows_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = on_new_node("memory://bucket", tmp_path / "a")
    begin(tmp_path / "a", 1, 2)
    end(tmp_path / "a")
    mine.push()
    put, puts = mirrors._put_in_place, 0

    def cut_at(limit: int) -> Callable[..., None]:
        def counted(draft: Path, path: Path) -> None:
            nonlocal puts
            if (puts := puts + 1) > limit:
                raise Killed
            put(draft, path)

        return counted

    for limit in range(100):
        here, puts = tmp_path / f"b{limit}", 0
        begin(here, 2, 9)
        end(here, "pruned")
        monkeypatch.setattr(mirrors, "_put_in_place", cut_at(limit))
        try:
            mirror("memory://bucket", here).pull()
        except Killed:
            assert not TrialFolder(here).result.exists()
            newest_step(here)
            continue
        assert content(here) == content(tmp_path / "a")
        assert limit >= 3
        return
    pytest.fail("the pull never came to its end")


# --- one attempt at a time --------------------------------------------------------------------------


def test_a_worker_that_lives_on_can_neither_write_nor_remove(url: str, tmp_path: Path) -> None:
    lost = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1, 2)
    lost.push()
    on_new_node(url, tmp_path / "b")
    train_to(tmp_path / "a", 3)
    for push in (lost.push, lost.keep_up):
        with pytest.raises(Superseded, match=r"got 000002-\w+ of .+ after 000001-\w+; this one was given up"):
            push()
    mirror(url, tmp_path / "c").pull()
    assert newest_step(tmp_path / "c") == 2


@pytest.mark.slow
@pytest.mark.parametrize("answer_is_lost", [False, True])
def test_whenever_the_next_attempt_claims_what_the_lost_worker_still_does_is_harmless(
    tmp_path: Path, answer_is_lost: bool
) -> None:
    """The claim falls before each request of the lost worker's pushes, the pull after the last of them.

    The answer that is lost is that of the first index: it is stored, and its worker does not know.
    """
    steps = []
    for number in range(1, 100):
        here, there = tmp_path / f"here{number}", tmp_path / f"there{number}"
        lost, theirs = (
            Storage("memory://b").trial("demo-1", str(number), folder) for folder in (here, there)
        )
        lost.claim()
        begin(here, 1, 2)
        lost.push()
        good, to_lose = lost._store.files, ["its answer"] if answer_is_lost else []

        def at(
            made: int, name: str, args: tuple[Any, ...], bound: Any = (number, theirs, good, to_lose)
        ) -> None:
            number, theirs, good, to_lose = bound
            if made == number:
                theirs.claim()
            if name == "pipe_file" and to_lose:
                to_lose.clear()
                good.pipe_file(*args)
                raise ConnectionResetError("gone")

        files = Watched(good, at)
        lost._store = replace(lost._store, files=files)
        with contextlib.suppress(Superseded):
            for trained in ((3,), (4, 5), (6,)):
                for step in trained:
                    train_to(here, step)
                lost.keep_up()
                lost._pushes_from = 0.0
            lost.finish()
        if files.requests < number:
            break
        theirs.pull()
        assert theirs.notes == []
        steps.append(newest_step(there))
        train_to(there, 7)
        theirs.push()
        Storage("memory://b").trial("demo-1", str(number), here).pull()
        assert content(here) == content(there)
    assert steps == sorted(steps)
    assert set(steps) == {2, 3, 5, 6}


def test_whatever_the_lost_worker_does_during_a_claim_is_harmless(tmp_path: Path) -> None:
    """Two of its pushes fall before each request of the claim."""
    steps = []
    for number in range(1, 30):
        here, there = tmp_path / f"here{number}", tmp_path / f"there{number}"
        lost = Storage("memory://b").trial("demo-1", str(number), here)
        lost.claim()
        begin(here, 1, 2)
        lost.push()

        def at(made: int, name: str, args: tuple[Any, ...], bound: Any = (number, here, lost)) -> None:
            number, here, lost = bound
            if made == number:
                with contextlib.suppress(Superseded):
                    for step in (3, 4):
                        train_to(here, step)
                        lost.push()

        storage, files = watched("memory://b", at)
        theirs = storage.trial("demo-1", str(number), there)
        theirs.claim()
        if files.requests < number:
            break
        theirs.pull()
        assert theirs.notes == []
        steps.append(newest_step(there))
    assert steps == sorted(steps, reverse=True)
    assert set(steps) == {2, 4}


def test_a_try_that_was_given_up_may_come_through_late(tmp_path: Path) -> None:
    """It may bring other bytes by then, or half of them: a storage of files shows what is written so far."""
    late: list[str] = []

    def at(number: int, name: str, args: tuple[Any, ...]) -> None:
        if name in ("put_file", "pipe_file"):
            path = args[1] if name == "put_file" else args[0]
            if not late or late[-1].rpartition(".")[2] != path.rpartition(".")[2]:
                late.append(path)
                raise TimeoutError

    store = f"file://{tmp_path / 'store'}"
    storage, _ = watched(store, at)
    mine = storage.trial("demo-1", "0", tmp_path / "a")
    mine.claim()
    begin(tmp_path / "a", 1, 2)
    mine.push()
    assert len(late) > 3
    for path in late:
        if not path.endswith(".claim"):
            Path(path).write_bytes(b"late")
    looking = mirror(store, tmp_path / "b")
    looking.pull()
    assert looking.notes == []
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_who_looks_while_a_worker_pushes_sees_one_state_or_the_next(tmp_path: Path) -> None:
    """Two pushes fall before each request of the pull: the objects of its first index are gone."""
    url = "memory://bucket"
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1, 2)
    mine.push()
    for number in range(1, 30):
        there = tmp_path / f"there{number}"

        def at(made: int, name: str, args: tuple[Any, ...], number: int = number) -> None:
            if made == number:
                for step in (10 * number, 10 * number + 1):
                    train_to(tmp_path / "a", step)
                    mine.push()

        storage, files = watched(url, at)
        looking = storage.trial("demo-1", "0", there)
        looking.pull()
        assert looking.notes == []
        assert len(content(there)) == 7
        assert newest_step(there) in (2, 10 * number - 9, 10 * number, 10 * number + 1)
        if files.requests < number:
            return
    pytest.fail("the pull never came to its end")


def test_what_is_damaged_in_the_store_is_refused_and_the_folder_before_it_taken(tmp_path: Path) -> None:
    store = tmp_path / "store"
    url = f"file://{store}"
    mine = on_new_node(url, tmp_path / "a")
    begin(tmp_path / "a", 1)
    mine.push()
    train_to(tmp_path / "a", 2)
    mine.push()
    damaged = next(path for path in store.rglob("*step-00000002.tensors*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    theirs = on_new_node(url, tmp_path / "b")
    assert newest_step(tmp_path / "b") == 1
    assert any("is not as it was stored" in note for note in theirs.notes)
    for index in store.rglob("*.index-*"):
        index.write_text("{")
    theirs = on_new_node(url, tmp_path / "b")
    assert content(tmp_path / "b") == {}
    assert theirs.notes[-1] == "nothing in the storage could be used: the trial begins anew"


def test_an_index_cannot_name_a_file_outside_of_the_trial() -> None:
    for path in ("../x", "/x", "lock", "tracking/log.jsonl", "a/.b"):
        held = {"format": 1, "files": {path: ["o", 1, "0"]}}
        text = mirrors.json.dumps({"sha256": mirrors._digest(held), "content": held})
        with pytest.raises(mirrors._Damaged, match="outside of the trial"):
            mirrors._parsed(text.encode())


# --- a store that fails -----------------------------------------------------------------------------


def failing(url: str, *errors: Exception) -> tuple[Storage, list[str]]:
    """The first requests fail, the next ones do not."""
    left, made = list(errors), []

    def at(number: int, name: str, args: tuple[Any, ...]) -> None:
        made.append(name)
        if left:
            raise left.pop(0)

    return watched(url, at)[0], made


def test_a_passing_error_is_tried_again(tmp_path: Path) -> None:
    storage, made = failing("memory://bucket", *[ConnectionResetError("gone")] * 3)
    storage.trial("demo-1", "0", tmp_path).claim()
    assert made[:4] == ["ls"] * 4


@pytest.mark.parametrize(
    ("error", "requests"),
    [(ConnectionResetError("gone"), 4), (PermissionError("no right"), 1), (FileNotFoundError("bucket"), 1)],
)
def test_one_that_stays_is_ours_and_is_tried_again_by_the_sweep(
    tmp_path: Path, error: Exception, requests: int
) -> None:
    mine = on_new_node("memory://bucket", tmp_path)
    begin(tmp_path)
    storage, made = failing("memory://bucket", *[error] * 50)
    mine._store = replace(mine._store, files=storage._store.files)
    mine._names_as_owner = lambda: set()  # type: ignore[method-assign]  # a store that lists late
    with pytest.raises(
        StorageFailed, match=rf"got {type(error).__name__}: .* \(tries: {requests}\)"
    ) as raised:
        mine.push()
    assert raised.value.kind == "download_failed"
    assert made == ["put_file"] * requests


def test_no_room_in_a_storage_of_files_is_the_disks_failure(tmp_path: Path) -> None:
    storage, made = failing("memory://bucket", OSError(28, "No space left on device"))
    with pytest.raises(DiskFull, match="No space left"):
        storage.trial("demo-1", "0", tmp_path).claim()
    assert made == ["ls"]


def test_an_error_tells_no_secret_nor_does_its_traceback(tmp_path: Path) -> None:
    told = "refused https://me:hunter2@host/b?X-Amz-Security-Token=hunter2&x=1"
    storage, _ = failing("memory://bucket", *[ConnectionResetError(told)] * 4)
    try:
        storage.trial("demo-1", "0", tmp_path).claim()
    except StorageFailed:
        text = traceback.format_exc()
    assert "refused https://me:***@host" in text
    assert "hunter2" not in text


def test_a_store_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_ANSWER_SECONDS", 0.05)
    end_of_test = threading.Event()
    storage, files = watched("memory://bucket", lambda *_: end_of_test.wait(10))  # type: ignore[arg-type]
    with pytest.raises(StorageFailed, match="no answer within 0 s"):
        storage.trial("demo-1", "0", tmp_path).claim()
    assert files.requests == 4
    end_of_test.set()


def test_a_push_that_fails_while_training_is_said_once_and_put_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    mine = on_new_node("memory://bucket", tmp_path / "a")
    monkeypatch.setattr(mirrors.time, "monotonic", lambda: now[0])
    good = mine._store
    begin(tmp_path / "a", 1)

    def fails(*_: Any) -> None:
        now[0] += 20  # seconds until it fails

    def down(number: int, name: str, args: tuple[Any, ...]) -> None:
        fails()
        raise ConnectionResetError("gone")

    files = Watched(good.files, down)
    mine._store = replace(good, files=files)
    said = mine.keep_up()
    assert said is not None
    assert "cannot be stored now, goes on" in said
    assert (now[0], files.requests) == (20, 1)
    now[0] = 219
    assert mine.keep_up() is None
    assert files.requests == 1
    now[0] = 220
    assert mine.keep_up() is None
    assert files.requests == 2
    mine._store = good
    now[0] = 439
    assert mine.keep_up() is None
    assert mirrors.Storage("memory://bucket").last_words("demo-1", ["0"])["0"].step == 0
    now[0] = 440
    assert mine.keep_up() is None
    assert mirrors.Storage("memory://bucket").last_words("demo-1", ["0"])["0"].step == 1
    assert mine._pushes_from == 440
    train_to(tmp_path / "a", 2)
    mine._store = replace(good, files=files)
    assert mine.keep_up() is not None  # it had succeeded: said again
    with pytest.raises(StorageFailed):  # at the end it must succeed
        mine.finish()


def test_a_slow_store_takes_a_tenth_of_the_trials_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(mirrors.time, "monotonic", lambda: now[0])
    pushed_at = []

    def slow(number: int, name: str, args: tuple[Any, ...]) -> None:
        if name == "put_file" and "tensors" in args[0]:
            pushed_at.append(now[0])
            now[0] += 60

    storage, _ = watched("memory://bucket", slow)
    mine = storage.trial("demo-1", "0", tmp_path)
    mine.claim()
    begin(tmp_path)
    for step in range(1, 61):
        now[0] += 30
        train_to(tmp_path, step)
        mine.keep_up()
    assert pushed_at == [30, 690, 750]  # the second push brings two checkpoints, and takes 120 seconds


# --- before the start, and stopping -----------------------------------------------------------------


def test_a_store_is_checked_by_writing_reading_and_removing(url: str) -> None:
    storage = Storage(url)
    storage.check()
    assert storage._store.names() == set()
    with pytest.raises(
        CannotStart, match=r"must take, give back and remove an object, got .*PermissionError"
    ):
        failing(url, *[PermissionError("no right")] * 9)[0].check()


def test_a_folder_that_is_another_one_on_the_worker_is_found_out(tmp_path: Path) -> None:
    """Each node can write and read its own disk, at the same path."""
    driver, worker = Storage(f"file://{tmp_path / 'a'}"), Storage(f"file://{tmp_path / 'b'}")
    probe = driver.leave_probe()
    with pytest.raises(CannotStart, match="a worker must read what the driver writes"):
        worker.answer_probe(probe)
    with pytest.raises(CannotStart, match="the driver must read what a worker writes"):
        driver.take_probe(probe)
    assert not list((tmp_path / "a").iterdir())
    same = pickle.loads(pickle.dumps(driver))
    probe = driver.leave_probe()
    same.answer_probe(probe)
    driver.take_probe(probe)


@pytest.mark.parametrize(
    ("url", "law"),
    [
        ("/shared/runs", "must be an address such as s3://"),
        ("file://shared/runs", "must be an absolute path"),
        ("s3://", "must be an address"),
        ("nonsense://bucket", "must open, got ValueError: Protocol not known: nonsense"),
        ("s3://me:hunter2@bucket/p", r"needs its package on every node, got .*s3fs.*; pip install s3fs"),
        ("gs://bucket/p", "needs its package on every node, got .*gcsfs.*; pip install gcsfs"),
    ],
)
def test_an_address_that_cannot_be_opened_says_what_to_do(
    url: str, law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(CannotStart, match=law) as raised:
        Storage(url).check()
    assert "hunter2" not in str(raised.value)


def test_a_stop_is_heard_and_forgotten_everywhere(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(mirrors.time, "monotonic", lambda: now[0])
    driver, (worker, files) = Storage(url), watched(url, lambda *_: None)

    def hears() -> bool:
        worker.asks_to_stop("demo-1")
        worker._stops["demo-1"]._asking.join()
        return worker.asks_to_stop("demo-1")

    assert not hears()
    driver.ask_to_stop("demo-1")
    assert driver.asks_to_stop("demo-1")
    now[0] += 4.9
    assert not hears()
    assert files.requests == 1
    now[0] += 0.2
    assert hears()
    assert not driver.asks_to_stop("demo-2")
    driver.forget_stop("demo-1")
    now[0] += 5
    assert not hears()
    assert files.requests == 3


def test_a_store_that_hangs_holds_no_step_up_and_has_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "STOP_SECONDS", 0.01)
    end_of_test = threading.Event()
    storage, files = watched("memory://bucket", lambda *_: end_of_test.wait(10))  # type: ignore[arg-type]
    assert not any(storage.asks_to_stop("demo-1") for _ in range(1000))
    assert files.requests == 1
    end_of_test.set()


# --- traps in fsspec --------------------------------------------------------------------------------


class Unreachable(LocalFileSystem):
    protocol = "unreachable"

    def ls(self, path: str, *args: Any, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error")

    def info(self, path: str, **kwargs: Any) -> Any:
        raise OSError(5, "Input/output error")


def test_a_store_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    """fsspec's `find` leaves out what raises, and `exists` says no: every trial would begin anew."""
    (tmp_path / "x").write_text("x")
    files = Unreachable(skip_instance_cache=True)
    assert files.find(str(tmp_path)) == []
    assert files.exists(str(tmp_path / "x")) is False
    store = mirrors._Store(files, str(tmp_path))
    with pytest.raises(StorageFailed, match=r"must list .*Input/output error"):
        Mirror(store, tmp_path / "a").pull()


def test_a_listing_that_was_kept_is_not_believed(tmp_path: Path) -> None:
    """fsspec keeps listings for ever in stores that are asked over a network."""
    keeping = ObjectStore(skip_instance_cache=True)
    ObjectStore.objects["bucket/prefix/a"] = b""
    assert keeping.ls("bucket/prefix", detail=False) == ["bucket/prefix/a"]
    ObjectStore.objects["bucket/prefix/b"] = b""
    assert keeping.ls("bucket/prefix", detail=False) == ["bucket/prefix/a"]
    assert mirrors._Store(keeping, "bucket/prefix").names() == {"a", "b"}
    ours = Storage("objects://bucket/prefix")._store
    assert ours.names() == {"a", "b"}
    ObjectStore.objects.pop("bucket/prefix/a")
    assert ours.files.ls("bucket/prefix", detail=False) == ["bucket/prefix/b"]


def test_names_that_are_patterns_in_fsspec() -> None:
    files = MemoryFileSystem()
    for name in ("note*.txt", "note-1.txt"):
        files.pipe_file(f"/b/{name}", b"")
    files.rm("/b/note*.txt")
    assert files.find("/b") == []  # both are gone
    files.pipe_file("/b/note*.txt", b"")
    files.pipe_file("/b/note-1.txt", b"")
    mirrors._Store(files, "/b").remove("note*.txt")
    assert files.find("/b") == ["/b/note-1.txt"]


def test_an_upload_that_fails_midway_is_stored_by_half_and_counts_for_nothing(tmp_path: Path) -> None:
    """fsspec closes the object on the way out."""

    class Fails(fsspec.Callback):
        def relative_update(self, inc: int = 1) -> None:
            raise ConnectionResetError("gone")

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "spec.json").write_bytes(b"x" * 6_000_000)
    files = MemoryFileSystem()
    with pytest.raises(ConnectionResetError):
        files.put_file(str(tmp_path / "a" / "spec.json"), "/b/half", callback=Fails())
    assert files.info("/b/half")["size"] == files.blocksize < 6_000_000

    def half(number: int, name: str, args: tuple[Any, ...]) -> None:
        if name == "put_file":
            files.put_file(*args, callback=Fails())

    storage, _ = watched("memory://bucket", half)
    mine = storage.trial("demo-1", "0", tmp_path / "a")
    mine.claim()
    with pytest.raises(StorageFailed):
        mine.push()
    mirror("memory://bucket", tmp_path / "b").pull()
    assert content(tmp_path / "b") == {}
