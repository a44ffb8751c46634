"""What lies behind an error that a library raised: a hub that was not reached, a disk that is full."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator

from sweeps.errors import DiskFull

_NO_CONNECTION = (ConnectionError, TimeoutError, socket.gaierror)

# The HTTP libraries, by name: which of them the hub's client stands on changes from release to release, and
# their errors do not derive from the built-in ones.
_HTTP_LIBRARIES = ("requests", "httpx", "httpx2")
_NO_CONNECTION_NAMES = (
    "ConnectionError",
    "Timeout",
    "TimeoutException",
    "NetworkError",
    "RemoteProtocolError",
)

_OFFLINE = "OfflineModeIsEnabled"
_TOO_MANY_REQUESTS, _SERVER_ERROR = 429, 500

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it was caused by, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def hub_not_reached(error: BaseException) -> bool:
    """Whether the hub did not answer, or was too busy to: another try may succeed.

    Not where it answered that there is no such thing or no right to it, nor where it may not be asked.
    """
    chain = list(causes(error))
    # datasets drops the cause and leaves its name in the text.
    if any(_OFFLINE in f"{type(cause).__name__} {cause}" for cause in chain):
        return False
    answers = [status for cause in chain if (status := _http_status(cause)) is not None]
    if answers:
        return answers[0] == _TOO_MANY_REQUESTS or answers[0] >= _SERVER_ERROR
    return any(_is_no_connection(cause) for cause in chain)


def disk_full(error: BaseException, place: object) -> DiskFull | None:
    """The error as ours if, behind it, a file could not be written for want of space or of a writable disk.

    `place` is said where the error names no file.
    """
    for cause in causes(error):
        code = os_error_number(cause)
        if code in _DISK:
            named = getattr(cause, "filename", None) or place
            return DiskFull(
                f"the trial's files must find room on the disk, got {os.strerror(code)!r} for {named}; free "
                "some space or make it writable, and resume"
            )
    return None


def os_error_number(error: BaseException) -> int | None:
    """The errno of an error of the operating system, also where it comes out of safetensors' Rust as text."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return int(found[1])
    return None


def _http_status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_no_connection(error: BaseException) -> bool:
    if isinstance(error, _NO_CONNECTION):
        return True
    return any(
        kind.__module__.partition(".")[0] in _HTTP_LIBRARIES and kind.__name__ in _NO_CONNECTION_NAMES
        for kind in type(error).__mro__
    )
