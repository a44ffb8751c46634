"""A real MLflow server, to be stopped and started again."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import urllib.request
from pathlib import Path

from sweepsvc.recorder import ui_command
from tests.waiting import until


class Server:
    """`mlflow server` on a store of its own, always on the same free port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._command = ui_command(f"sqlite:///{folder}/mlflow.db", folder / "artifacts", port=port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until(self._answers, seconds=90)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            until(lambda: not self._answers(), seconds=30)
        self._process = None
