"""Real servers for tests: Postgres, and MLflow with passwords on it, as `docker/` starts them.

    with Postgres() as postgres, MlflowWithAuth(postgres) as mlflow:
        environment = {**os.environ, "SWEEPSVC_STUDY_URL": postgres.study_url, **mlflow.client_environment}

Everything listens on loopback, on a free port, and lies in a folder that is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

ROOT = Path(__file__).parents[1]
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"
INIT_SQL = ROOT / "docker" / "postgres" / "init.sql"


def free_port() -> int:
    """A port that is free, and likely still is when a slow server comes to listen on it.

    Above those that Ray gives its workers and its clients, below those that the system gives to anyone who
    asks for any.
    """
    while True:
        port = 24_000 + secrets.randbelow(8_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def plain_environment(**more: str) -> dict[str, str]:
    """The environment of a container, more or less: none of what this machine says of stores and servers."""
    ours = ("SWEEPSVC_", "MLFLOW_", "RAY_", "PG", "POSTGRES_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    if "SWEEPSVC_CACHE" in os.environ:  # the tests' own
        kept["SWEEPSVC_CACHE"] = os.environ["SWEEPSVC_CACHE"]
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}"
    kept["PYTHONPATH"] = str(ROOT)  # a container has the project installed
    kept["PYTHONUNBUFFERED"] = "1"
    return {**kept, **more}


class Process:
    """A server in a process group of its own, with what it says in a file."""

    def __init__(
        self,
        command: Iterable[object],
        environment: Mapping[str, str],
        log: Path,
        *,
        user: str | None = None,
        cwd: Path = ROOT,
    ) -> None:
        self.command = [str(word) for word in command]
        self.log = log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                self.command,
                env=dict(environment),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **_as_user(user),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float = 60) -> int:
        return self._process.wait(seconds)

    def until(self, is_so: Callable[[], object], seconds: float = 120) -> None:
        """Wait until `is_so`, which must come before the process ends."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert self.is_running, f"{self.command} ended with {self._process.poll()}: {self.text[-4000:]}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {self.command}: {self.text[-4000:]}"
            time.sleep(0.1)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 30) -> None:
        """Signal the process itself; what is left of its tree after that is killed."""
        tree = self._tree()
        if self.is_running:
            self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._kill(tree)

    def kill(self) -> None:
        """`kill -9` of the process and of everything that it started."""
        self._kill(self._tree())

    def _tree(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _kill(self, tree: Iterable[psutil.Process]) -> None:
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil tells a reused id from the old one
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(30)


# --- Postgres ---------------------------------------------------------------------------------------


class Postgres:
    """A Postgres server with the two databases that `docker/postgres/init.sql` makes: `study` and `mlflow`.

    Skips the test where there is no server program. It may be stopped and started again, its data kept.
    """

    def __init__(self, *, port: int | None = None, passwords: Mapping[str, str] | None = None) -> None:
        self._programs = postgres_programs()
        self.folder = Path(tempfile.mkdtemp(prefix="sweepsvc-postgres-"))
        self._data = self.folder / "data"
        self.port = port or free_port()
        names = ("postgres", "study", "mlflow")
        self.passwords = dict(passwords or {name: secrets.token_hex(8) for name in names})
        self._process: Process | None = None

    @property
    def study_url(self) -> str:
        return self.url("study")

    @property
    def mlflow_url(self) -> str:
        return self.url("mlflow")

    def url(self, database: str, password: bool = True) -> str:
        """An SQLAlchemy address of that database, as the role that owns it."""
        secret = f":{self.passwords[database]}" if password else ""
        return f"postgresql+psycopg2://{database}{secret}@127.0.0.1:{self.port}/{database}"

    def environment(self, role: str = "postgres") -> dict[str, str]:
        """What psql, pg_dump and the like need to reach it as that role. A role's database has its name."""
        return {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": role,
            "PGPASSWORD": self.passwords[role],
            "PGDATABASE": role,
        }

    def program(self, name: str) -> str:
        return str(self._programs / name)

    def query(self, sql: str, role: str = "postgres", database: str | None = None) -> list[str]:
        """The lines of the answer, as psql prints them without headers."""
        environment = self.environment(role)
        environment["PGDATABASE"] = database or role
        done = subprocess.run(
            [self.program("psql"), "--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"],
            input=sql,
            env=plain_environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def start(self) -> None:
        """Start it again, after `stop` or `kill`."""
        command = [
            *(self.program("postgres"), "-D", self._data, "-p", str(self.port), "-k", self.folder),
            *("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "shared_buffers=32MB"),
        ]
        self._process = Process(
            command, plain_environment(), self.folder / "log", user=_postgres_user(), cwd=self.folder
        )
        self._process.until(lambda: self.is_ready)

    @property
    def is_ready(self) -> bool:
        ask = [self.program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]
        return subprocess.run(ask, check=False).returncode == 0

    def stop(self) -> None:
        """A fast shutdown: sessions are cut off, nothing is lost."""
        if self._process is not None:
            self._process.stop(signal.SIGINT)
        self._process = None

    def kill(self) -> None:
        """`kill -9` of the server and of every process of it; `start` recovers from its log."""
        if self._process is not None:
            self._process.kill()
        self._process = None

    def __enter__(self) -> Self:
        try:
            self._make()
            self.start()
            self._run_init()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> None:
        user = _postgres_user()
        secret = self.folder / "password"
        secret.write_text(self.passwords["postgres"], encoding="utf-8")
        if user is not None:  # Postgres refuses to be root, and root's temporary folders are root's alone
            for path in (self.folder, secret):
                shutil.chown(path, user)
        subprocess.run(
            [
                *(self.program("initdb"), "-D", str(self._data), "-U", "postgres", "--no-sync"),
                *("--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", f"--pwfile={secret}"),
            ],
            env=plain_environment(),
            cwd=self.folder,
            check=True,
            capture_output=True,
            **_as_user(user),
        )
        secret.unlink()

    def _run_init(self) -> None:
        """As the postgres image runs a `.sql` file of /docker-entrypoint-initdb.d."""
        environment = self.environment() | {
            "STUDY_DB_PASSWORD": self.passwords["study"],
            "MLFLOW_DB_PASSWORD": self.passwords["mlflow"],
        }
        done = self.run_sql_file(INIT_SQL, environment)
        assert done.returncode == 0, done.stderr

    def run_sql_file(self, file: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.program("psql"), "--set=ON_ERROR_STOP=1", "--no-password", "--no-psqlrc", "-f", str(file)],
            env=plain_environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )


def postgres_programs() -> Path:
    """The folder of Postgres' programs, server and clients; skips the test where there is none."""
    found = shutil.which("postgres")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in (*folders, *([Path(found).parent] if found else [])):
        if all((folder / name).exists() for name in ("postgres", "initdb", "psql", "pg_dump", "pg_restore")):
            return folder
    return pytest.skip("needs a Postgres server (Debian, Ubuntu: apt install postgresql)")


def _postgres_user() -> str | None:
    """Who runs the server if we are root: it refuses to."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _as_user(user: str | None) -> dict[str, Any]:
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


# --- MLflow -----------------------------------------------------------------------------------------


class MlflowWithAuth:
    """The MLflow server of `docker/entrypoint.sh mlflow` on a Postgres, its artifacts proxied.

    `options` replace those of the command line; a None in `environment` takes a variable away.
    """

    ADMIN = "admin"

    def __init__(
        self,
        postgres: Postgres,
        *,
        options: Iterable[str] | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sweepsvc-mlflow-"))
        self.artifacts = self.folder / "artifacts"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.password = secrets.token_hex(8)
        self._options = [
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
            *("--artifacts-destination", str(self.artifacts)),
            *("--allowed-hosts", f"127.0.0.1:{self.port}"),
        ]
        if options is not None:
            self._options = list(options)
        given: dict[str, str | None] = {
            "MLFLOW_BACKEND_STORE_URI": postgres.url("mlflow", password=False),
            "PGPASSWORD": postgres.passwords["mlflow"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_PORT": str(self.port),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "TMPDIR": str(self.folder),
            **(environment or {}),
        }
        self.environment = {name: value for name, value in given.items() if value is not None}
        self.process: Process | None = None

    @property
    def client_environment(self) -> dict[str, str]:
        """What an MLflow client needs to reach it as the administrator."""
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_USERNAME": self.ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }

    def start(self) -> None:
        """Start it; after `stop` it starts again, on the same port."""
        self.begin().until(self.is_well, 180)

    def begin(self) -> Process:
        """Start it without waiting."""
        self.process = Process(
            [ENTRYPOINT, "mlflow", *self._options], plain_environment(**self.environment), self.folder / "log"
        )
        return self.process

    def is_well(self) -> bool:
        try:
            return self.get("/health") == 200
        except OSError:
            return False

    def get(self, path: str, user: str = "", password: str = "", host: str = "") -> int:
        """The status of the answer to a GET."""
        request = urllib.request.Request(self.url + path)
        if user:
            request.add_header("Authorization", "Basic " + b64encode(f"{user}:{password}".encode()).decode())
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
        self.process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
