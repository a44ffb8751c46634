"""`docker compose` without an engine: what the containers of docker/compose.yaml run, as plain processes.

A container's command, environment and health check are those of the file. What is different is what a
container would bring: its files lie in a temporary folder, its ports are free ones on loopback, and names of
services in addresses are replaced by those. Postgres is the one of this machine, run as its image runs it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import yaml

from tests.servers import ENTRYPOINT, ROOT, Postgres, Process, free_port, plain_environment

DOCKER = ROOT / "docker"

SERVER_PORTS = {
    "postgres": (5432,),
    "mlflow": (5000,),
    "head": (6379, 10001, 8265, 52365),
    "worker": (52365,),
}
_RAY_PORTS = {6379: "RAY_PORT", 10001: "RAY_CLIENT_PORT", 8265: "RAY_DASHBOARD_PORT", 52365: "RAY_AGENT_PORT"}
_ADDRESS = re.compile(r"\b([a-z]+|127\.0\.0\.1):(\d{4,5})\b")
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")


class NotSet(Exception):
    """A variable that the compose file requires is not in the environment file."""


def read_env(file: Path) -> dict[str, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def load_compose(file: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """The file with its anchors merged and its variables replaced, as compose does it."""
    loaded: dict[str, Any] = _replaced(yaml.safe_load(file.read_text(encoding="utf-8")), variables)
    return loaded


def _replaced(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(part, variables) for name, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part, variables) for part in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        name, how, words = match.groups()
        if found := variables.get(name):
            return found
        if how == ":?":
            raise NotSet(f"{name}: {words}")
        return words or ""

    return _VARIABLE.sub(put, value)


class Bare:
    """The services of a compose file on this machine; what they leave is removed at the end.

    `ports` are those of another `Bare` that this one's services talk to.
    """

    def __init__(
        self,
        variables: Mapping[str, str],
        file: Path = DOCKER / "compose.yaml",
        ports: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        self.services: dict[str, Any] = load_compose(file, variables)["services"]
        self._temporary = tempfile.TemporaryDirectory(prefix="sd-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self.root = self.folder / "root"  # what `/` is to a container
        self.ports = dict(ports or {})
        for service, numbers in SERVER_PORTS.items():
            if service in self.services:
                self.ports |= {(service, number): free_port() for number in numbers}
        self._mounts = {name: self._mount(service) for name, service in self.services.items()}
        self.postgres: Postgres | None = None
        self.running: dict[str, Process] = {}

    def _mount(self, service: Mapping[str, Any]) -> dict[str, Path]:
        """Where the folders of a container are here."""
        found = {"/": self.root, "/app": self.root / "app"}
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            if not source.startswith(("/", ".")):
                found[target] = self.root / target[1:]
                found[target].mkdir(parents=True, exist_ok=True)
            else:
                found[target] = (DOCKER / source).resolve()
        (self.root / "app").mkdir(parents=True, exist_ok=True)
        link = self.root / "app" / "search_spaces"
        if "/app/search_spaces" in found and not link.exists():
            link.symlink_to(found["/app/search_spaces"])
        return found

    # What a container has

    def here(self, text: str, service: str | None = None) -> str:
        """`text` of a container, with the addresses and folders that are meant here."""

        def address(match: re.Match[str]) -> str:
            host, port = match[1], int(match[2])
            for (name, number), free in self.ports.items():
                if number == port and host in (name, "localhost", "127.0.0.1"):
                    return f"127.0.0.1:{free}"
            return match[0]

        if service is not None:
            if text.isdecimal() and (service, int(text)) in self.ports:
                return str(self.ports[service, int(text)])
            for target, source in sorted(self._mounts[service].items(), reverse=True):
                if text == target or text.startswith(target.rstrip("/") + "/"):
                    return f"{source}{text[len(target.rstrip('/')) :]}".rstrip("/")
        return _ADDRESS.sub(address, text).replace("0.0.0.0", "127.0.0.1")

    def environment(self, service: str) -> dict[str, str]:
        given = self.services[service].get("environment", {})
        values = {name: self.here(str(value), service) for name, value in given.items() if value is not None}
        if service == "postgres":
            assert self.postgres is not None
            return plain_environment(**values, **self.postgres.environment())
        if service in ("head", "worker"):
            values |= {
                name: str(self.ports[service, number])
                for number, name in _RAY_PORTS.items()
                if (service, number) in self.ports
            }
        paths = {
            "SWEEPSVC_HOME": "/runs",
            "SWEEPSVC_CACHE": "/cache/sweepsvc",
            "HF_HOME": "/cache/huggingface",
        }
        values |= {name: self.here(path, service) for name, path in paths.items()}  # as in the image
        return plain_environment(**values, TMPDIR=str(self.folder), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

    def command(
        self, service: str, words: Sequence[str], entrypoint: Sequence[str] | None = None
    ) -> list[str]:
        if entrypoint is None:
            entrypoint = self.services[service].get("entrypoint", ["entrypoint.sh"])
        command = [str(ENTRYPOINT) if word == "entrypoint.sh" else word for word in entrypoint]
        command += [self.here(word, service) if "=" not in word else self._option(word) for word in words]
        if words[:1] == ["head"]:
            command += ["--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}/ray"]
        if words[:1] == ["worker"]:
            command += ["--node-ip-address=127.0.0.1", "--num-cpus=1"]
        if words[:1] in (["head"], ["worker"]):
            command += ["--object-store-memory=100000000"]
        return command

    def _option(self, word: str) -> str:
        name, _, value = word.partition("=")
        return f"{name}={self.here(value)}"

    # What compose does

    def up(self, services: Iterable[str] = ()) -> None:
        """`up --detach --wait`: start what does not run yet, each once what it depends on is well."""
        servers = [name for name, one in self.services.items() if "profiles" not in one]
        for service in list(services) or servers:
            self._start(service)

    def _start(self, service: str) -> None:
        if service in self.running or (service == "postgres" and self.postgres is not None):
            return
        for needed in self.services[service].get("depends_on", ()):
            self._start(needed)
        if service == "postgres":
            self._start_postgres()
            assert self.is_well(service)
            return
        self.running[service] = Process(
            self.command(service, self.services[service]["command"]),
            self.environment(service),
            self.folder / f"{service}.log",
            cwd=self.root / "app",
        )
        self.running[service].until(lambda: self.is_well(service), 400)

    def _start_postgres(self) -> None:
        given = self.services["postgres"]["environment"]
        self.postgres = Postgres(
            port=self.ports["postgres", 5432],
            passwords={
                "postgres": given["POSTGRES_PASSWORD"],
                "study": given["STUDY_DB_PASSWORD"],
                "mlflow": given["MLFLOW_DB_PASSWORD"],
            },
        )
        self.postgres.__enter__()

    def is_well(self, service: str) -> bool:
        """Whether the service's own health check succeeds."""
        kind, *words = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.call(service, words, stdout=subprocess.DEVNULL).returncode == 0

    def call(
        self,
        service: str,
        words: Sequence[str],
        *,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | int | None = subprocess.PIPE,
        entrypoint: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[bytes]:
        """`exec`, or `run` with the service's entrypoint: a command in the service's container."""
        command = self.command(service, words[1:], [*entrypoint, words[0]] if words else entrypoint)
        if service == "postgres" and self.postgres is not None:
            command[0] = self.postgres.program(command[0])
        return subprocess.run(
            command,
            env=self.environment(service),
            cwd=self.root / "app",
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=900,
            check=False,
        )

    def stop(self, services: Iterable[str] = ()) -> None:
        for service in services or [*reversed(self.running), "postgres"]:
            if service == "postgres":
                if self.postgres is not None:
                    self.postgres.stop()
            elif process := self.running.pop(service, None):
                process.stop()

    def remove_volumes(self) -> None:
        """`down --volumes`: everything that was kept is gone."""
        self.stop()
        if self.postgres is not None:
            self.postgres.__exit__()
            self.postgres = None
        for mounts in self._mounts.values():
            for folder in mounts.values():
                if folder.parent == self.root and folder.name != "app":
                    subprocess.run(["find", str(folder), "-mindepth", "1", "-delete"], check=True)

    def logs(self) -> str:
        return "\n".join(f"--- {name}\n{process.text[-3000:]}" for name, process in self.running.items())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.postgres is not None:
            self.postgres.__exit__()
        self._temporary.cleanup()
