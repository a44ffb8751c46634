"""A trial's folder, mirrored in an object store, so that another node can go on with the trial.

Below `URL/<sweep-id>/trials/<key>/` every object is written once and never again. An attempt is
`<number>-<random>`; a later one has a higher number.

<attempt>.claim                that the attempt has begun: whoever has a lower number writes no more
<attempt>.<count>.<file>       one file of the folder, its slashes as dots
<attempt>.index-<count>.json   which objects are the folder, each with its bytes and SHA-256

The index is written last, in one request: a push that is cut leaves the index before it, whose objects are
removed by the push after the next, or at the attempt's end. So there is always a whole folder to take up, and
a worker that was cut off and lives on can neither change nor remove what the next attempt reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sweeps.errors import CannotStart, DiskFull, SweepsError, TrialError
from sweeps.result import TrialResult
from sweeps.spec import TrialSpec
from sweeps.trial.causes import disk_full
from sweeps.trial.paths import CHECKPOINT, remove
from sweepsvc.urls import masked

FORMAT = 1
"""Of an index. A higher one was written by a later version of sweepsvc, and is refused."""

STOP_SECONDS = 5.0
"""How often a worker really asks whether the sweep is to stop."""

_TRIES = 4
_PAUSE_SECONDS = (1.0, 4.0, 16.0)  # before the second, third and fourth try
_ANSWER_SECONDS = 30.0  # for a request without its bytes
_SLOWEST_BYTES_PER_SECOND = 1e6  # a store that is slower counts as one that hangs
_PAUSE_AFTER_FAILURE_SECONDS = 60.0  # at least
_PAUSE_PER_SECOND = 10.0  # that a push took while the trial waited
_SETTLING_TRIES = 5  # to find a folder that does not change while it is pushed
_READERS = 8  # requests at once where many trials are looked at

_INDEX = re.compile(r"\d{6}-[0-9a-f]{8}\.index-\d{6}\.json")
_ATTEMPT = re.compile(r"(\d{6})-[0-9a-f]{8}(?=\.)")
_RESULT, _SPEC, _CHECKPOINTS = "result.json", "spec.json", "checkpoints"
_OF_ONE_NODE = ("lock", "tracking")  # of a process there, and of the driver

T = TypeVar("T")


class StorageFailed(TrialError):
    """The store could not be reached, or did not do what was asked: it may succeed later."""

    kind = "download_failed"


class Superseded(TrialError):
    """A later attempt at the trial has begun: what this one does is of no account any more."""

    kind = "process_lost"


class _Damaged(Exception):
    """Why an index, or what it names, is not to be trusted."""


# --- the store --------------------------------------------------------------------------------------


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` gives, or `TimeoutError`: it then goes on in a thread of its own, and is forgotten."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="storage", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


@dataclass(frozen=True)
class _Store:
    """A file system of fsspec below `root`: each request with a deadline, and tried again.

    Only functions for single files are used: `put`, `get` and `rm` read `[`, `*` and a last `/` as patterns.
    Raises `StorageFailed`, or `DiskFull`. An error's cause is told in its words alone, and is not chained:
    its traceback, which a failed trial's result keeps, may hold what signed a request.
    """

    files: Any
    root: str
    tries: int = _TRIES

    def below(self, place: str) -> _Store:
        return replace(self, root=f"{self.root}/{place}")

    def names(self) -> set[str]:
        """The objects directly below; one request."""

        def ask() -> set[str]:
            self.files.invalidate_cache()  # listings are kept by default, for ever
            try:
                found = self.files.ls(self.root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return set()
            return {path.rstrip("/").rpartition("/")[2] for path in found}

        return self._try("list", _ANSWER_SECONDS, ask)

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._try(
                f"read {name} of", _ANSWER_SECONDS, lambda: self.files.cat_file(self._path(name))
            )
        return None

    def write(self, content: bytes, new_name: Callable[[], str]) -> str:
        """A small object under a new name at each try: one given up may still come through, late."""

        def send() -> str:
            path = self._path(name := new_name())
            self._make_parent(path)
            self.files.pipe_file(path, content)
            return name

        try:
            return self._try("write to", _ANSWER_SECONDS, send)
        except FileNotFoundError as error:
            raise self._failure("write to", error) from None

    def upload(self, file: Path, new_name: Callable[[], str]) -> str:
        """A file, in pieces. Raises `FileNotFoundError` where the file has gone."""

        def send() -> str:
            path = self._path(name := new_name())
            self._make_parent(path)
            self.files.put_file(str(file), path)
            return name

        what = f"take {file.name} into"
        try:
            return self._try(what, _transfer_seconds(file.stat().st_size), send)
        except FileNotFoundError as error:
            if not file.exists():
                raise
            raise self._failure(what, error) from None

    def download(self, name: str, file: Path, size_bytes: int) -> None:
        """An object, in pieces. Raises `FileNotFoundError` where it is not there."""

        def fetch() -> None:
            file.unlink(missing_ok=True)  # a try given up may still be writing its own
            self.files.get_file(self._path(name), str(file))

        self._try(f"give {name} of", _transfer_seconds(size_bytes), fetch, place=file)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(f"remove {name} of", _ANSWER_SECONDS, lambda: self.files.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _make_parent(self, path: str) -> None:
        """Where there are folders. In an object store there are none, and s3fs would make the bucket."""
        if not self.files.async_impl:
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _try(self, what: str, seconds: float, call: Callable[[], T], place: object = None) -> T:
        """`call` until it succeeds. Raises `FileNotFoundError` at once."""
        last: Exception = TimeoutError()
        tried = 0
        while tried < self.tries:
            if tried:
                time.sleep(_PAUSE_SECONDS[min(tried, len(_PAUSE_SECONDS)) - 1])
            tried += 1
            try:
                return _within(seconds, call)
            except FileNotFoundError:
                raise
            except Exception as error:
                last = error
            if (full := disk_full(last, place or masked(self.root))) is not None:
                raise full from None
            if isinstance(last, PermissionError):
                break
        raise self._failure(what, last, tried) from None

    def _failure(self, what: str, error: Exception, tried: int = 1) -> StorageFailed:
        return StorageFailed(
            f"the storage must {what} {masked(self.root)}, got {_said(error)} (tries: {tried}); check the "
            "network, the address and the right to it, then resume"
        )


def _transfer_seconds(size_bytes: int) -> float:
    return _ANSWER_SECONDS + size_bytes / _SLOWEST_BYTES_PER_SECOND


def _said(error: BaseException) -> str:
    """The first line of it, without secrets."""
    return masked(f"{type(error).__name__}: {error}".partition("\n")[0])


class Storage:
    """The store at `url`, of any kind that fsspec opens. Opened when first used; pickled as its address."""

    def __init__(self, url: str) -> None:
        protocol, separator, rest = url.partition("://")
        if not separator or not protocol or not rest.strip("/"):
            raise CannotStart(
                f"a storage must be an address such as s3://bucket/folder, got {masked(url)!r}; for a shared "
                "folder say file:///its/path"
            )
        if protocol in ("file", "local") and not rest.startswith("/"):
            raise CannotStart(
                f"a storage of files must be an absolute path, got {masked(url)}; say file:///its/path, with "
                "three slashes"
            )
        self._url = url
        self._opened: _Store | None = None
        self._stops: dict[str, _Stop] = {}

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self._url,)

    def __str__(self) -> str:
        return masked(self._url)

    def check(self) -> None:
        """Write, read and remove something. Raises `CannotStart`."""
        probe = self.leave_probe()
        self.answer_probe(probe)
        self.take_probe(probe)

    def leave_probe(self) -> str:
        """Write something for a worker to find: the name of it. Raises `CannotStart`."""
        with self._or_cannot_start() as store:
            return store.write(b"probe\n", lambda: f"probe-{uuid.uuid4().hex}")

    def answer_probe(self, probe: str) -> None:
        """On a worker: read what the driver has left, and answer it. Raises `CannotStart`."""
        with self._or_cannot_start() as store:
            if store.read(probe) != b"probe\n":
                raise CannotStart(
                    f"a worker must read what the driver writes in {self}, got nothing there on "
                    f"{socket.gethostname()}; name a storage that every node sees as the same one"
                )
            store.write(b"answer\n", lambda: f"{probe}-answer")

    def take_probe(self, probe: str) -> None:
        """Read the worker's answer, and clear both away. Raises `CannotStart`."""
        with self._or_cannot_start() as store:
            answer = store.read(f"{probe}-answer")
            store.remove(probe)
            store.remove(f"{probe}-answer")
        if answer != b"answer\n":
            raise CannotStart(
                f"the driver must read what a worker writes in {self}, got nothing there; name a storage "
                "that every node sees as the same one"
            )

    def trial(self, sweep_id: str, key: str, folder: Path) -> Mirror:
        """The mirror of one trial's folder, which is `folder` on this node."""
        return Mirror(self._store.below(f"{sweep_id}/trials/{key}"), folder)

    def last_words(self, sweep_id: str, keys: Iterable[str]) -> dict[str, LastWord]:
        """What each trial has come to, by its key, without its files. Raises `StorageFailed`."""
        keys = list(keys)
        with ThreadPoolExecutor(_READERS, "storage") as pool:
            words = pool.map(lambda key: self.trial(sweep_id, key, Path()).last_word(), keys)
            return dict(zip(keys, words, strict=True))

    def ask_to_stop(self, sweep_id: str) -> None:
        """Have the workers of the sweep end their trials as interrupted, wherever they are."""
        self._store.below(sweep_id).write(b"stop\n", lambda: "stop")

    def forget_stop(self, sweep_id: str) -> None:
        self._store.below(sweep_id).remove("stop")
        self._stops.pop(sweep_id, None)

    def asks_to_stop(self, sweep_id: str) -> bool:
        """Whether a stop was asked for, as of `STOP_SECONDS` ago. Cheap: may be asked at each step.

        Only the first call waits for the store. One that does not answer has not asked.
        """
        if sweep_id not in self._stops:
            self._stops[sweep_id] = _Stop(replace(self._store.below(sweep_id), tries=1))
        return self._stops[sweep_id].is_asked()

    @property
    def _store(self) -> _Store:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> _Store:
        import fsspec  # takes a tenth of a second

        protocol = re.split("::|://", self._url)[0]
        try:
            # Listings that are kept would not show what other nodes write. Others do not know the option.
            kept = fsspec.get_filesystem_class(protocol).async_impl
            options = {"use_listings_cache": False} if kept else {}
            files, root = _within(
                _ANSWER_SECONDS,
                lambda: fsspec.core.url_to_fs(self._url, skip_instance_cache=True, **options),
            )
        except ImportError as error:
            raise CannotStart(
                f"a storage of the kind {protocol}:// needs its package on every node, got "
                f"{_said(error)}; {_remedy(protocol)}"
            ) from None
        except Exception as error:
            raise CannotStart(
                f"the storage must open, got {_said(error)} for {self}; check the address and the right to it"
            ) from None
        return _Store(files, root.rstrip("/"))

    @contextlib.contextmanager
    def _or_cannot_start(self) -> Iterator[_Store]:
        try:
            yield replace(self._store, tries=2)
        except (TrialError, FileNotFoundError) as error:
            raise CannotStart(
                f"the storage must take, give back and remove an object, got {_said(error)}; check that "
                f"{self} exists and may be written to"
            ) from None


def _remedy(protocol: str) -> str:
    """How to get the package that opens addresses of this kind."""
    from fsspec.registry import known_implementations

    package = known_implementations[protocol]["class"].partition(".")[0]
    return f"pip install {package}" if package != "fsspec" else "install what that names"


class _Stop:
    """Asks in the background, so that no training step waits for a store."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._answer = False
        self._asked_at = time.monotonic()
        self._asking = self._ask()
        self._asking.join(STOP_SECONDS)

    def is_asked(self) -> bool:
        now = time.monotonic()
        if now - self._asked_at >= STOP_SECONDS and not self._asking.is_alive():
            self._asked_at = now
            self._asking = self._ask()
        return self._answer

    def _ask(self) -> threading.Thread:
        asking = threading.Thread(target=self._look, name="storage-stop", daemon=True)
        asking.start()
        return asking

    def _look(self) -> None:
        with contextlib.suppress(SweepsError):
            self._answer = self._store.read("stop") is not None


# --- one trial --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastWord:
    """What the store knows of a trial: how it ended, of which spec, the step of its last checkpoint."""

    result: TrialResult | None = None
    spec: TrialSpec | None = None
    step: int = 0


@dataclass(frozen=True)
class _Stored:
    """The object that holds a file."""

    name: str
    size_bytes: int
    sha256: str


_Files = Mapping[str, _Stored]
"""By the file's path in the folder."""


@dataclass(frozen=True)
class _Index:
    name: str
    files: _Files

    def objects(self) -> set[str]:
        return {self.name, *(stored.name for stored in self.files.values())}


_NOTHING = _Index("", {})


class Mirror:
    """One trial's folder on this node, and what is stored of it.

    A worker claims, pulls, runs the trial, keeps up while it runs, and finishes. Whoever only looks pulls.
    Not for two threads, nor for two processes in one folder. `notes` is what a person should know of what was
    pulled. Raises `StorageFailed` or `DiskFull`, and `OSError` where the folder cannot be read or written.
    """

    def __init__(self, store: _Store, folder: Path) -> None:
        self.notes: list[str] = []
        self._store = store
        self._folder = folder
        self._attempt = ""
        self._count = 0
        self._stored = _NOTHING
        # Uploaded since the last push that succeeded, by SHA-256: the next one goes on from there.
        self._uploaded: dict[str, _Stored] = {}
        self._seen: dict[str, tuple[_Signature, str]] = {}
        self._pushes_from = 0.0
        self._is_failing = False

    def claim(self) -> None:
        """The stored folder is this attempt's from now on: an earlier one, should it live on, cannot push."""
        number = 1 + max((int(name[:6]) for name in self._store.names() if _ATTEMPT.match(name)), default=0)
        attempt = f"{number:06d}-{uuid.uuid4().hex[:8]}"
        holder = f"{socket.gethostname()}:{os.getpid()}\n".encode()
        self._store.write(holder, lambda: f"{attempt}.claim")
        self._attempt, self._count = attempt, 0
        self._uploaded = {}
        # Listed after the claim: an earlier attempt has at most one push on its way, and that keeps what
        # this index names.
        refused: dict[str, str] = {}
        index = self._newest(self._names_as_owner, refused)
        self._note_refused(refused, index)
        self._stored = self._write_index(index.files if index else {})

    def pull(self, checkpoints: bool = True) -> None:
        """Make the folder what is stored: each file and each checkpoint whole, the result last.

        What is not stored is removed, except for what belongs to this node. Without `checkpoints` those are
        neither brought nor touched.
        """
        index = self._take(lambda index: self._bring(index.files, checkpoints))
        if index is None:
            self._bring({}, checkpoints)

    def push(self) -> bool:
        """Store the folder as it is now; whether there was anything to store. No request if not.

        Raises `Superseded` where a later attempt has begun. `claim` comes first.
        """
        assert self._attempt, "a folder is claimed before it is pushed"
        if not self._differs(self._scan()):
            return False
        names = self._names_as_owner()
        files = self._upload()
        if files == self._stored.files:
            return False
        before, self._stored = self._stored, self._write_index(files)
        kept = before.objects() | {stored.name for stored in self._uploaded.values()}
        self._uploaded = {}
        with contextlib.suppress(TrialError):  # the next push tries again
            self._remove(names - kept)
        return True

    def finish(self) -> None:
        """The attempt's last push, which must succeed; then only the folder as it is stays in the store.

        Raises as `push` does. What cannot be removed is left to the next attempt.
        """
        self.push()
        with contextlib.suppress(StorageFailed, DiskFull):
            # Seen after the index was written: a claim that comes now finds that index, and needs no other.
            self._remove(self._names_as_owner())

    def keep_up(self) -> str | None:
        """Push while the trial runs: a failure does not end it, and is told once until a push succeeds.

        Tried once, and then again at the reports that follow. Pushes, and failures to, take a tenth of the
        trial's time at most. Raises only `Superseded`. What is at stake is the time since the last push that
        succeeded, should the node be lost; at the trial's end `finish` must succeed.
        """
        start = time.monotonic()
        if start < self._pushes_from:
            return None
        patient = self._store
        self._store = replace(patient, tries=1)
        try:
            self.push()
        except Superseded:
            raise
        except (TrialError, OSError) as error:
            return self._put_off(error, time.monotonic() - start)
        finally:
            self._store = patient
        now = time.monotonic()
        self._pushes_from = now + _PAUSE_PER_SECOND * (now - start)
        self._is_failing = False
        return None

    def _put_off(self, error: Exception, lost_seconds: float) -> str | None:
        pause_seconds = max(_PAUSE_AFTER_FAILURE_SECONDS, _PAUSE_PER_SECOND * lost_seconds)
        self._pushes_from = time.monotonic() + pause_seconds
        if self._is_failing:
            return None
        self._is_failing = True
        return f"the trial cannot be stored now, goes on, and is stored once it can be: {_said(error)}"

    def forget(self) -> None:
        """Drop all that is stored: the next attempt begins anew, and one that still runs cannot push."""
        self.claim()
        self._stored = self._write_index({})
        self._remove(self._store.names())

    def drop_result(self) -> None:
        """Drop the last word of an earlier attempt, which would pass for the next one's; the rest stays."""
        self.claim()
        files = {path: stored for path, stored in self._stored.files.items() if path != _RESULT}
        if files.keys() != self._stored.files.keys():
            self._stored = self._write_index(files)

    def last_word(self) -> LastWord:
        """How the trial ended and where it can be taken up, without its files: three or four requests."""
        words = LastWord()

        def read(index: _Index) -> None:
            nonlocal words
            steps = [int(found[1]) for path in index.files if (found := _STEP.match(path))]
            words = LastWord(
                self._word(index, _RESULT, TrialResult),
                self._word(index, _SPEC, TrialSpec),
                max(steps, default=0),
            )

        self._take(read)
        return words

    # What is stored

    def _names_as_owner(self) -> set[str]:
        """Every object's name. Raises `Superseded` where the newest attempt is not this one."""
        names = self._store.names()
        newest = max((found[0] for name in names if (found := _ATTEMPT.match(name))), default="")
        if newest > self._attempt:
            holder = (self._store.read(f"{newest}.claim") or b"").decode(errors="replace").strip()
            raise Superseded(
                f"one attempt at a time writes in {masked(self._store.root)}, got {newest} of "
                f"{holder or 'another process'} after {self._attempt}; this one was given up for lost, and "
                "ends"
            )
        if newest < self._attempt:
            raise StorageFailed(
                f"{masked(self._store.root)} must show what was written there, got no {self._attempt}.claim; "
                "do not remove it while the sweep runs, and use a store that lists what it has taken"
            )
        return names

    def _take(self, use: Callable[[_Index], None]) -> _Index | None:
        """The newest index with which `use` succeeds; None without any."""
        refused: dict[str, str] = {}
        while (index := self._newest(self._store.names, refused)) is not None:
            try:
                use(index)
                break
            except _Damaged as error:
                refused[index.name] = str(error)
        self._note_refused(refused, index)
        return index

    def _newest(self, names: Callable[[], set[str]], refused: dict[str, str]) -> _Index | None:
        """The newest index that can be read and is not `refused`, to which it adds.

        Listed again at each try: after two pushes by others an index and what it names are gone, and there
        is a newer one.
        """
        while found := {name for name in names() if _INDEX.fullmatch(name)} - refused.keys():
            name = max(found)
            try:
                return _Index(name, _parsed(self._store.read(name)))
            except _Damaged as error:
                refused[name] = str(error)
        return None

    def _note_refused(self, refused: Mapping[str, str], used: _Index | None) -> None:
        """What was refused and is newer than what is used."""
        for name, why in refused.items():
            if used is None or name > used.name:
                self.notes.append(f"refused {name} in the storage: {why}")
        if refused and used is None:
            self.notes.append("nothing in the storage could be used: the trial begins anew")

    def _write_index(self, files: _Files) -> _Index:
        listed = {path: [stored.name, stored.size_bytes, stored.sha256] for path, stored in files.items()}
        content = {"format": FORMAT, "files": listed}
        text = json.dumps({"sha256": _digest(content), "content": content}, indent=1)
        name = self._store.write(
            text.encode(), lambda: f"{self._attempt}.index-{self._next_count():06d}.json"
        )
        return _Index(name, dict(files))

    def _remove(self, names: Collection[str]) -> None:
        """Of these objects those that the attempt does not need."""
        for name in sorted({*names} - self._stored.objects() - {f"{self._attempt}.claim"}):
            self._store.remove(name)

    def _next_count(self) -> int:
        self._count += 1
        return self._count

    def _word(self, index: _Index, path: str, kind: type[_Word]) -> _Word | None:
        stored = index.files.get(path)
        if stored is None:
            return None
        content = self._store.read(stored.name)
        if content is None or hashlib.sha256(content).hexdigest() != stored.sha256:
            raise _Damaged(f"{path} is not as it was stored")
        with contextlib.suppress(ValueError):  # of another version: it says nothing
            return kind.model_validate_json(content)
        return None

    # From the folder

    def _scan(self) -> dict[str, _Signature]:
        """What of the folder is stored, each file with what changes when it does."""
        return dict(_scanned(self._folder, ""))

    def _differs(self, found: Mapping[str, _Signature]) -> bool:
        if found.keys() != self._stored.files.keys():
            return True
        return any(
            self._seen.get(path) != (signature, self._stored.files[path].sha256)
            for path, signature in found.items()
        )

    def _sha256(self, path: str, signature: _Signature) -> str:
        seen = self._seen.get(path)
        if seen is None or seen[0] != signature:
            seen = self._seen[path] = signature, _file_sha256(self._folder / path)
        return seen[1]

    def _upload(self) -> _Files:
        """Every file's object, those that are not stored yet uploaded. The folder may change meanwhile."""
        for _ in range(_SETTLING_TRIES):
            found = self._scan()
            with contextlib.suppress(FileNotFoundError):  # it has just been removed: look again
                files = {path: self._object(path, found[path]) for path in sorted(found)}
                if self._scan() == found:
                    self._seen = {path: self._seen[path] for path in found}
                    return files
        raise StorageFailed(
            f"{self._folder} must rest while it is stored, got changes in {_SETTLING_TRIES} tries; push it "
            "again, and check that the storage exists"
        )

    def _object(self, path: str, signature: _Signature) -> _Stored:
        digest = self._sha256(path, signature)
        for stored in (self._stored.files.get(path), self._uploaded.get(digest)):
            if stored is not None and stored.sha256 == digest:
                return stored
        plain = path.replace("/", ".")
        name = self._store.upload(
            self._folder / path, lambda: f"{self._attempt}.{self._next_count():06d}.{plain}"
        )
        stored = _Stored(name, signature[0], digest)
        if _signature((self._folder / path).stat()) == signature:  # else nobody knows which bytes went up
            self._uploaded[digest] = stored
        return stored

    # Into the folder

    def _bring(self, files: _Files, checkpoints: bool) -> None:
        """Download what is missing or other, beside what is there; then put each part in its place."""
        found = {
            path: self._sha256(path, signature)
            for path, signature in self._scan().items()
            if checkpoints or not _is_of_checkpoints(path)
        }
        wanted = {
            path: stored.sha256
            for path, stored in files.items()
            if checkpoints or not _is_of_checkpoints(path)
        }
        parts = {_part(path) for path in (*found, *wanted)}
        changed = {part for part in parts if _within_part(found, part) != _within_part(wanted, part)}
        for draft in self._folder.glob(".pull.*"):
            remove(draft)
        draft = self._folder / f".pull.{uuid.uuid4().hex}"
        try:
            for path in sorted(wanted):
                if _part(path) in changed:
                    (draft / path).parent.mkdir(parents=True, exist_ok=True)
                    self._fetch(path, files[path], draft / path, is_here=found.get(path) == wanted[path])
            if _RESULT in changed:  # while the rest changes there is no last word
                remove(self._folder / _RESULT)
            for part in sorted(changed, key=lambda part: (part == _RESULT, part)):
                _put_in_place(draft / part, self._folder / part)
        finally:
            remove(draft)

    def _fetch(self, path: str, stored: _Stored, file: Path, is_here: bool) -> None:
        if is_here:
            shutil.copyfile(self._folder / path, file)
        else:
            try:
                self._store.download(stored.name, file, stored.size_bytes)
            except FileNotFoundError:
                raise _Damaged(f"{stored.name} is missing") from None
            if file.stat().st_size != stored.size_bytes or _file_sha256(file) != stored.sha256:
                raise _Damaged(f"{stored.name} is not as it was stored")
        with file.open("rb") as written:
            os.fsync(written.fileno())


_Word = TypeVar("_Word", TrialResult, TrialSpec)
_Signature = tuple[int, int, int]
"""Bytes, time of the last change in nanoseconds, inode: files appear by a rename, so one of them changes."""

_STEP = re.compile(rf"{_CHECKPOINTS}/{CHECKPOINT}(\d+)/")


def _scanned(folder: Path, below: str) -> Iterator[tuple[str, _Signature]]:
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = f"{below}{entry.name}"
        if not _is_stored(path):
            continue
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir(follow_symlinks=False):
                yield from _scanned(folder / entry.name, f"{path}/")
            elif entry.is_file(follow_symlinks=False):
                yield path, _signature(entry.stat(follow_symlinks=False))


def _signature(state: os.stat_result) -> _Signature:
    return state.st_size, state.st_mtime_ns, state.st_ino


def _is_stored(path: str) -> bool:
    """Not a draft, whose name begins with a dot, nor what belongs to one node."""
    parts = PurePosixPath(path).parts
    is_inside = not path.startswith("/") and not any(part.startswith(".") for part in parts)
    return bool(parts) and is_inside and parts[0] not in _OF_ONE_NODE


def _is_of_checkpoints(path: str) -> bool:
    return path.startswith(f"{_CHECKPOINTS}/")


def _part(path: str) -> str:
    """What appears as one: a checkpoint, the adapter's folder, a file."""
    parts = PurePosixPath(path).parts
    return "/".join(parts[:2] if parts[0] == _CHECKPOINTS else parts[:1])


def _within_part(digests: Mapping[str, str], part: str) -> dict[str, str]:
    return {path: digest for path, digest in digests.items() if _part(path) == part}


def _put_in_place(draft: Path, path: Path) -> None:
    """`draft` becomes `path`, whatever that is; without a draft it is removed."""
    old = draft.with_name(f".old.{draft.name}")
    if path.is_dir():
        old.parent.mkdir(parents=True, exist_ok=True)
        path.replace(old)
    if draft.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.replace(path)
    else:
        path.unlink(missing_ok=True)


def _parsed(text: bytes | None) -> _Files:
    """An index's files. Raises `_Damaged`; `StorageFailed` for one of a later version."""
    if text is None:
        raise _Damaged("it is missing")
    try:
        index = json.loads(text)
        content = index["content"]
        if index["sha256"] != _digest(content):
            raise _Damaged("it is not as it was written")
        if content["format"] != FORMAT:
            raise StorageFailed(
                f"an index must be of format {FORMAT}, got {content['format']}: another version of sweepsvc "
                "wrote it; use that version, or another storage"
            )
        files = {path: _Stored(*values) for path, values in content["files"].items()}
    except (ValueError, KeyError, TypeError):
        raise _Damaged("it cannot be read") from None
    if any(not _is_stored(path) or "/" in stored.name for path, stored in files.items()):
        raise _Damaged("it names files outside of the trial")
    return files


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
