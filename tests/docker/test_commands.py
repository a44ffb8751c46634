"""The commands of docker/compose.yaml and of docker/README.md, run bare: real servers, no engine."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.docker.bare import DOCKER, Bare, read_env
from tests.faults.harness import SWEEP
from tests.servers import INIT_SQL, MlflowWithAuth, Postgres, plain_environment
from tests.waiting import until

pytestmark = pytest.mark.slow

README = (DOCKER / "README.md").read_text(encoding="utf-8")

NEEDS_AN_ENGINE = {"docker compose build"}
NEEDS_A_REMOTE = {"git pull"}


def sections() -> dict[str, list[tuple[str, str]]]:
    """The README's code blocks, as language and text, by the heading above them."""
    parts = re.split(r"^## (.*)\n", README, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {title: re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) for title, text in found.items()}


class Person:
    """Somebody who follows the README in a copy of docker/, on a machine with no engine but `Bare`."""

    def __init__(self, folder: Path, sweep_files: Path) -> None:
        self.place = folder / "docker"
        shutil.copytree(DOCKER, self.place, ignore=shutil.ignore_patterns(".env", "backup"))
        self._sweep_files = sweep_files
        self._bare: Bare | None = None
        self.second: Bare | None = None
        self.said: dict[str, str] = {}

    @property
    def variables(self) -> dict[str, str]:
        return {**read_env(self.place / ".env"), "SWEEP_FILES": str(self._sweep_files)}

    @property
    def bare(self) -> Bare:
        if self._bare is None:
            self._bare = Bare(self.variables)
        return self._bare

    def follow(self, title: str, bare: Bare | None = None) -> list[str]:
        """Run the section's commands; those that were run."""
        commands = [text for language, text in sections()[title] if language == "sh"]
        done = []
        for block in commands:
            for command in _commands(block):
                if command not in NEEDS_AN_ENGINE | NEEDS_A_REMOTE:
                    self._run(command, bare)
                    done.append(command)
        assert done, f"no command under {title}"
        return done

    def _run(self, command: str, bare: Bare | None) -> None:
        if not command.startswith("docker compose "):
            text = self.bare.here(command) if (self.place / ".env").exists() else command
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=self.place,
                env=plain_environment(),
                capture_output=True,
                timeout=900,
                check=False,
            )
        else:
            maybe = self._compose(command, bare or self.bare)
            if maybe is None:
                return
            done = maybe
        self.said[command] = (done.stdout or b"").decode()
        said = f"{self.said[command]}\n{done.stderr.decode()}\n{self.bare.logs()}"
        assert done.returncode == 0, f"{command}\nended with {done.returncode}: {said}"

    def _compose(self, command: str, bare: Bare) -> subprocess.CompletedProcess[bytes] | None:
        words = shlex.split(command)[2:]
        verb, words = words[0], words[1:]
        if verb == "up":
            assert words[:2] == ["--detach", "--wait"]
            bare.up(words[2:])
        elif verb == "stop":
            bare.stop(words)
        elif verb == "down":
            assert words == ["--volumes"]
            bare.remove_volumes()
        elif verb == "ps":
            for service in ("postgres", "mlflow", "head", "worker"):
                assert bare.is_well(service), service
        else:
            return self._in_a_container(command, verb, words, bare)
        return None

    def _in_a_container(
        self, command: str, verb: str, words: list[str], bare: Bare
    ) -> subprocess.CompletedProcess[bytes]:
        source = target = None
        if words[-2] in ("<", ">"):
            *words, sign, name = words
            source = (self.place / name).open("rb") if sign == "<" else None
            target = (self.place / name).open("wb") if sign == ">" else None
        entrypoint: list[str] = []
        options = {"run": ("--rm", "--no-deps", "-T"), "exec": ("-T",)}[verb]
        while words[0].startswith("-"):
            option = words.pop(0)
            if option == "--entrypoint":
                entrypoint = [words.pop(0)]
            else:
                assert option in options, command
        service, *words = words
        if verb == "run" and not entrypoint:
            entrypoint = bare.services[service].get("entrypoint", ["entrypoint.sh"])
        try:
            return bare.call(
                service, words, stdin=source, stdout=target or subprocess.PIPE, entrypoint=entrypoint
            )
        finally:
            for file in (source, target):
                if file is not None:
                    file.close()

    def leave(self) -> None:
        for bare in (self.second, self._bare):
            if bare is not None:
                bare.__exit__()


def _commands(block: str) -> Iterator[str]:
    """One command a line; what is no command of Docker is one script with the lines around it."""
    script: list[str] = []
    for line in block.splitlines():
        if line.startswith("docker compose ") or line in NEEDS_A_REMOTE:
            if script:
                yield "\n".join(script)
                script = []
            yield line
        else:
            script.append(line)
    if script:
        yield "\n".join(script)


@pytest.fixture
def person(tmp_path: Path, tiny_model_dir: Path, alpaca_rows_file: Path) -> Iterator[Person]:
    from tests.tiny import save_task

    files, tasks = tmp_path / "sweeps", tmp_path / "tasks"
    files.mkdir()
    tasks.mkdir()
    text = SWEEP.format(
        model=tiny_model_dir,
        rows=alpaca_rows_file,
        tasks=save_task(tasks),
        samples=240,
        trials=3,
    )
    (files / "quickstart.yaml").write_text(text, encoding="utf-8")
    made = Person(tmp_path, files)
    yield made
    made.leave()


def test_the_readme_is_followed_from_start_to_upgrade(person: Person) -> None:
    person.follow("Start")
    bare = person.bare
    _no_secret_is_on_a_command_line(person)
    _only_who_has_the_password_is_answered(person)

    person.follow("First sweep")
    first = _status(person, "first")
    assert [trial["state"] for trial in first["trials"]] == ["completed"] * 3
    _artifacts_come_through_the_server(person, first)

    person.follow("When something stops")
    assert _status(person, "second")["state"] == "completed"

    _a_second_machine_joins(person)

    person.follow("Backup")
    files = _files(bare)
    assert files
    person.follow("Restore")
    assert bare.running.keys() == {"mlflow", "head", "worker"}
    assert _files(bare) == files
    assert _status(person, "first") == first
    _artifacts_come_through_the_server(person, first)

    person.follow("Upgrade")
    assert _status(person, "first") == first
    _no_secret_is_in_a_log(person)


def test_every_section_with_commands_is_followed() -> None:
    followed = {
        "Start",
        "First sweep",
        "When something stops",
        "Second machine",
        "Backup",
        "Restore",
        "Upgrade",
    }
    assert {
        title for title, blocks in sections().items() if any(one == "sh" for one, _ in blocks)
    } == followed


def _secrets(person: Person) -> dict[str, str]:
    names = read_env(DOCKER / ".env.example")
    found = {name: person.variables[name] for name, value in names.items() if value == "random"}
    assert len(set(found.values())) == len(found) == 6
    assert all(len(value) >= 32 for value in found.values())
    return found


def _no_secret_is_on_a_command_line(person: Person) -> None:
    lines = []
    for process in person.bare.running.values():
        top = psutil.Process(process.pid)
        lines += [" ".join(one.cmdline()) for one in (top, *top.children(recursive=True))]
    assert len(lines) > 6
    for name, secret in _secrets(person).items():
        assert not any(secret in line for line in lines), name


def _no_secret_is_in_a_log(person: Person) -> None:
    bare = person.bare
    logs = [bare.folder / f"{service}.log" for service in ("mlflow", "head", "worker")]
    logs += [file for file in (bare.folder / "ray").rglob("*") if file.suffix in (".log", ".out", ".err")]
    texts = {file: file.read_text(encoding="utf-8", errors="replace") for file in logs if file.is_file()}
    assert len(texts) > 10
    for name, secret in _secrets(person).items():
        assert not [file for file, text in texts.items() if secret in text], name


def _get(url: str, authorization: str = "", host: str = "") -> int:
    headers = {"Authorization": authorization} if authorization else {}
    request = urllib.request.Request(url, headers=headers | ({"Host": host} if host else {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def _basic(password: str) -> str:
    return "Basic " + b64encode(f"admin:{password}".encode()).decode()


def _only_who_has_the_password_is_answered(person: Person) -> None:
    mlflow = person.bare.here("http://mlflow:5000/api/2.0/mlflow/experiments/get?experiment_id=0")
    right = _basic(person.variables["MLFLOW_AUTH_ADMIN_PASSWORD"])
    assert _get(mlflow) == 401
    assert _get(mlflow, _basic("wrong")) == 401
    assert _get(mlflow, right) == 200
    assert (
        _get(mlflow, right, host="elsewhere.example") == 403
    )  # a page of another site that calls it by a trick

    jobs = person.bare.here("http://head:8265/api/jobs/")
    assert _get(jobs) == 401
    assert _get(jobs, f"Bearer {person.variables['RAY_AUTH_TOKEN']}") == 200


def _status(person: Person, sweep: str) -> dict[str, Any]:
    bare = person.bare
    done = bare.call("driver", ["status", sweep, "--json"], entrypoint=["entrypoint.sh", "driver"])
    assert done.returncode == 0, done.stderr.decode()
    status: dict[str, Any] = json.loads(done.stdout)
    return status


_FETCH = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient()
run = client.get_run(sys.argv[1])
folder = client.download_artifacts(run.info.run_id, "", sys.argv[2])
print(json.dumps(run.info.artifact_uri))
"""


def _artifacts_come_through_the_server(person: Person, status: dict[str, Any]) -> None:
    bare = person.bare
    run_id = status["trials"][0]["mlflow_run_id"]
    into = bare.root / "fetched"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    done = bare.call("driver", ["-c", _FETCH, run_id, "/fetched"], entrypoint=["python"])
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout).startswith("mlflow-artifacts:/")
    fetched = {file.name for file in into.rglob("*") if file.is_file()}
    kept = {
        file.name for file in (bare.root / "artifacts").rglob("*") if run_id in file.parts and file.is_file()
    }
    assert fetched
    assert fetched == kept


def _a_second_machine_joins(person: Person) -> None:
    texts = [text for language, text in sections()["Second machine"] if not language]
    first, second = ({line.split("=")[0] for line in text.splitlines()} for text in texts)
    assert first == {"COMPOSE_FILE", "HEAD_ADDRESS", "RUNS"}
    known = {
        "COMPOSE_FILE": "compose.worker.yaml",
        "HEAD_ADDRESS": "head",
        "RUNS": str(person.bare.root / "runs"),
        "RAY_AUTH_TOKEN": person.variables["RAY_AUTH_TOKEN"],
    }
    variables = {name: known[name] for name in second}
    assert _nodes(person) == 2
    head = {address: port for address, port in person.bare.ports.items() if address[0] == "head"}
    person.second = Bare(variables, DOCKER / variables["COMPOSE_FILE"], head)
    person.follow("Second machine", person.second)
    until(lambda: _nodes(person) == 3)  # `ray status` tells what the head last looked up
    person.second.stop()


def _nodes(person: Person) -> int:
    done = person.bare.call("head", ["status", "--address", "head:6379"], entrypoint=["ray"])
    assert done.returncode == 0, done.stderr.decode()
    active = done.stdout.decode().partition("Active:")[2].partition("Pending:")[0]
    return len(re.findall(r"\d+ node_", active))


def _files(bare: Bare) -> dict[str, str]:
    """What is in the two volumes of files, by a digest of each."""
    return {
        str(file.relative_to(bare.root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for name in ("runs", "artifacts")
        for file in sorted((bare.root / name).rglob("*"))
        if file.is_file() and "report" not in file.parts
    }


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"])
def test_no_mlflow_server_starts_without_its_secrets(missing: str) -> None:
    with Postgres() as postgres:
        server = MlflowWithAuth(postgres, environment={missing: ""})
        try:
            process = server.begin()
            assert process.wait(60) == 2
            assert f"{missing} must be set" in process.text
            assert postgres.query("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'", "mlflow") == [
                "0"
            ]
        finally:
            server.__exit__()


def test_each_database_is_its_own_users_alone() -> None:
    with Postgres() as postgres:
        assert postgres.query("SELECT current_user, current_database()", "study") == ["study|study"]
        with pytest.raises(AssertionError, match="permission denied for database"):
            postgres.query("SELECT 1", "study", "mlflow")
        with pytest.raises(AssertionError, match="permission denied for database"):
            postgres.query("SELECT 1", "mlflow", "study")
        postgres.passwords["study"] = "wrong"
        with pytest.raises(AssertionError, match="password authentication failed"):
            postgres.query("SELECT 1", "study")


def test_postgres_is_not_set_up_with_a_password_missing() -> None:
    with Postgres() as postgres:
        done = postgres.run_sql_file(INIT_SQL, postgres.environment())
        assert done.returncode != 0
        assert "syntax error" in done.stderr
