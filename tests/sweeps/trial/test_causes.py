"""A hub that does not answer and a full disk are told from what no second try will mend."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import requests
from huggingface_hub import errors as hub
from safetensors import SafetensorError

from sweeps.errors import BadData, BadModel, DownloadFailed, EvaluationFailed
from sweeps.spec import ModelSpec
from sweeps.trial import readers
from sweeps.trial.causes import disk_full, hub_not_reached
from sweeps.trial.evaluate import _failing_as
from sweeps.trial.source import unloadable

http = __import__(hub.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])  # the hub's own HTTP library


def answered(status: int) -> hub.HfHubHTTPError:
    request = http.Request("GET", "https://hub")
    return hub.HfHubHTTPError(f"{status}", response=http.Response(status, request=request))


def behind(error: BaseException) -> OSError:
    """As transformers raises it: its own words, with the cause behind them."""
    try:
        raise OSError("We couldn't connect to the hub") from error
    except OSError as wrapped:
        return wrapped


UNREACHED: list[BaseException] = [
    ConnectionRefusedError("refused"),
    ConnectionError("Couldn't reach 'x' on the Hub (LocalEntryNotFoundError)"),
    TimeoutError("timed out"),
    socket.gaierror(-3, "Temporary failure in name resolution"),
    requests.exceptions.ConnectTimeout("slow"),
    requests.exceptions.ReadTimeout("slow"),
    requests.exceptions.ConnectionError("refused"),
    http.ConnectError("refused"),
    http.ReadTimeout("slow"),
    http.RemoteProtocolError("closed"),
    answered(429),
    answered(503),
]
ANSWERED: list[BaseException] = [
    answered(401),
    answered(403),
    answered(404),
    hub.OfflineModeIsEnabled("offline mode is enabled"),
    ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"),
    hub.LocalEntryNotFoundError("outgoing traffic has been disabled"),
    FileNotFoundError("no such file"),
    ValueError("no such architecture"),
]


def named(error: BaseException) -> str:
    return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("error", UNREACHED, ids=named)
@pytest.mark.parametrize("wrap", [lambda error: error, behind], ids=["itself", "behind"])
def test_no_answer_is_told_as_such(error: BaseException, wrap: Callable[[Any], Any]) -> None:
    assert hub_not_reached(wrap(error))


@pytest.mark.parametrize("error", ANSWERED, ids=named)
@pytest.mark.parametrize("wrap", [lambda error: error, behind], ids=["itself", "behind"])
def test_an_answer_or_a_hub_that_must_not_be_asked_is_not(
    error: BaseException, wrap: Callable[[Any], Any]
) -> None:
    assert not hub_not_reached(wrap(error))


def test_a_model_a_dataset_and_a_benchmark_that_cannot_be_fetched_may_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(error: BaseException) -> Callable[..., None]:
        def load(*_: Any, **__: Any) -> None:
            raise error

        return load

    spec = ModelSpec(id="some/model")
    assert isinstance(unloadable(spec, behind(http.ConnectError("refused"))), DownloadFailed)
    assert isinstance(unloadable(spec, behind(answered(404))), BadModel)
    monkeypatch.setattr(datasets, "load_dataset", raising(ConnectionError("Couldn't reach it")))
    with pytest.raises(DownloadFailed, match="the hub must be reached for the dataset some/rows"):
        readers.read_hub("some/rows", "train")
    monkeypatch.setattr(datasets, "load_dataset", raising(answered(404)))
    with pytest.raises(BadData):
        readers.read_hub("some/rows", "train")
    with pytest.raises(DownloadFailed, match="the hub was not reached"), _failing_as("x must load", "remedy"):
        raise ConnectionError("Couldn't reach it")
    with pytest.raises(EvaluationFailed), _failing_as("x must load", "remedy"):
        raise answered(404)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more_is_full_wherever_the_error_comes_from(code: int) -> None:
    plain = OSError(code, "text", "/runs/3/adapter")
    found = disk_full(behind(plain), "/runs/3")
    assert found is not None
    assert "for /runs/3/adapter; free some space" in str(found)
    rust = SafetensorError(f'I/O error: text (os error {code}) at path "/runs/3/.tmp"')
    found = disk_full(rust, "/runs/3")
    assert found is not None
    assert "for /runs/3; free some space" in str(found)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "text"), OSError("text"), SafetensorError("bad")])
def test_other_errors_are_no_full_disk(error: Exception) -> None:
    assert disk_full(error, "/runs/3") is None
