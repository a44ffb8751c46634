"""Ray nodes as separate processes on this machine: a cluster to submit to, and to take nodes from."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil

from tests.servers import ROOT, Process, free_port, plain_environment

HEAD = "127.0.0.2"
DOCUMENT = ROOT / "docs" / "cluster.md"

_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class RayNode:
    """One `ray start --block`, with a GCS of its own or joined to a head."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *options: str,
        ip: str,
        cpus: int = 1,
        kind: str = "",
    ) -> None:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        command = [
            *(*_RAY, "start", "--block", "--disable-usage-stats", f"--node-ip-address={ip}"),
            *(f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=100000000"),
            *(f"--{port}={free_port()}" for port in ports),
            *([f'--resources={{"accelerator_type:{kind}": 1}}'] if kind else []),
            *options,
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self.process = Process(command, environment, folder / "log", cwd=folder)

    def kill(self) -> None:
        """`kill -9` of the node and of everything that runs on it, as where a machine is taken away."""
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family.append(psutil.Process(self.process.pid))
            family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)
        self.process.kill()


class RayCluster:
    """A head and two workers with one CPU each, whose processes have `environment`.

    Each has a loopback address of its own, as machines have: what one of them says of itself is not true of
    another. A token of the cluster is needed to reach it.
    """

    def __init__(self, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rays-"))  # short: Ray's sockets lie below it
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment = plain_environment(
            **environment, **self.access, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
        )
        self.port, self.dashboard_port, self.client_port = free_port(), free_port(), free_port()
        self.nodes: dict[str, RayNode] = {}
        self.documented = set(
            re.findall(r"^ray start .*", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
        )

    def _start(self, kind: str) -> list[str]:
        """The options of the one `ray start` of the page that has `kind`, with the names of here."""
        [command] = [command for command in self.documented if f" --{kind}" in command]
        real = command.replace("HEAD:6379", self.gcs).replace("6379", str(self.port)).replace("HEAD", HEAD)
        return shlex.split(real)[2:]

    @property
    def gcs(self) -> str:
        return f"{HEAD}:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://{HEAD}:{self.dashboard_port}"

    @property
    def client(self) -> str:
        return f"ray://{HEAD}:{self.client_port}"

    def start_head(self, **more: Any) -> None:
        self.nodes["head"] = RayNode(
            self.folder / "head",
            self._environment,
            *(*self._start("head"), f"--temp-dir={self.folder}"),
            *(f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={self.client_port}"),
            ip=HEAD,
            **more,
        )
        self.nodes["head"].process.until(self._answers, 120)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self._get("/api/version"))
        return False

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.dashboard + path)
        request.add_header("Authorization", f"Bearer {self.access['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def add(self, name: str, **more: Any) -> RayNode:
        ip = f"127.0.0.{len(self.nodes) + 2}"
        self.nodes[name] = RayNode(
            self.folder / name, self._environment, *self._start("address"), ip=ip, **more
        )
        return self.nodes[name]

    def wait_for(self, count: int, seconds: float = 120) -> None:
        """Until so many nodes are alive."""
        deadline = time.monotonic() + seconds
        while self.count_alive() != count:
            assert time.monotonic() < deadline, f"{self.count_alive()} nodes, not {count}: {self.text}"
            time.sleep(0.3)

    def count_alive(self) -> int:
        nodes = self._get("/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    @property
    def text(self) -> str:
        return "\n".join(f"{name}: {node.process.text[-1500:]}" for name, node in self.nodes.items())

    def __enter__(self) -> Self:
        try:
            self.start_head()
            for count, name in enumerate(("one", "two"), start=2):  # a busy machine starts no two in time
                self.add(name)
                self.wait_for(count)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes.values()):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
