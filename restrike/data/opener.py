"""Bring a file from where it is (path, http(s), s3, pipe) to a local file, whole and checked, or fail with its name.

A transfer that breaks off is resumed with a Range request, with backoff. Messages never show credentials or query
strings (signed URLs carry secrets there). `pipe:` runs a shell command, so a list of URLs would be code: it works
only where it was allowed in so many words.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

_CHUNK = 1 << 20
_FINAL_STATUS = frozenset(range(400, 500)) - {408, 425, 429}

T = TypeVar("T")


class FetchError(OSError):
    """A file could not be fetched; the message names it (redacted), what came, and how often it was tried."""


class NoRangesError(FetchError):
    """The server sends whole files only."""


class _Retry(Exception):
    """This attempt failed in a way that another one may mend."""


@dataclass(frozen=True)
class Transfer:
    """How to fetch.

    Attributes:
        attempts: tries before giving up.
        timeout_s: seconds without a byte before an attempt counts as dead.
        backoff_s: pause after the first failure; doubles each time, up to a minute.
        allow_pipe: let `pipe:COMMAND` run COMMAND in a shell.
    """

    attempts: int = 6
    timeout_s: float = 30.0
    backoff_s: float = 0.5
    allow_pipe: bool = False


def scheme(location: str) -> str:
    """ "file", "http", "https", "s3" or "pipe"; plain paths are "file".

    Raises:
        ValueError: another scheme.
    """
    head, separator, _ = location.partition(":")
    if not separator or "/" in head:
        return "file"
    if head in ("file", "http", "https", "s3", "pipe"):
        return head
    raise ValueError(f"'{redact(location)}': unknown scheme '{head}:'; use a path, http(s)://, s3:// or pipe:")


def local_path(location: str) -> Path:
    """The path of a plain or `file:` location."""
    return Path(unquote(urlsplit(location).path)) if location.startswith("file:") else Path(location).expanduser()


def redact(location: str) -> str:
    """Without user, password, query and fragment; of a pipe only the program's name."""
    if location.startswith("pipe:"):
        return f"pipe:{(location[5:].split() or [''])[0]} …"
    if "://" not in location:
        return location
    parts = urlsplit(location)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def join(base: str, name: str) -> str:
    """`name` in the folder `base`; a query string (a signature) stays at the end."""
    if scheme(base) == "pipe":
        raise ValueError("a pipe: has no folder; give the shards as patterns (data.train_shards)")
    if scheme(base) == "file":
        return str(local_path(base) / name)
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def fetch(
    location: str,
    target: Path,
    transfer: Transfer,
    expected_bytes: int | None = None,
    expected_sha256: str | None = None,
) -> None:
    """Copy a location into `target`, which must not exist yet; on failure nothing stays behind.

    Raises:
        FetchError: refused, missing, truncated, of another length or hash than expected, after all attempts.
        ValueError: unknown scheme, or a pipe that was not allowed.
    """
    kind = scheme(location)
    if kind == "pipe" and not transfer.allow_pipe:
        raise ValueError(f"'{redact(location)}' would run a shell command; set data.allow_pipe=true to allow it")

    def attempt() -> None:
        _attempt(kind, location, target, transfer)
        _check(target, expected_bytes, expected_sha256)

    try:
        _retried(location, transfer, attempt)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def read_range(
    location: str,
    begin: int,
    end: int,
    transfer: Transfer,
    expected_bytes: int | None = None,
    problem: Callable[[bytes], str] = lambda data: "",
) -> bytes:
    """Bytes [begin, end) of a remote file.

    Args:
        location: http(s):// or s3://.
        begin, end: within the file.
        transfer: attempts and timeout.
        expected_bytes: length of the whole file; another one means that it was replaced.
        problem: of what came, in words; "" where there is none. Tried again otherwise.

    Raises:
        NoRangesError: the server ignores the range.
        FetchError: refused, missing, replaced, or damaged in every attempt.
        ValueError: a location that has no ranges (pipe).
    """
    kind = scheme(location)
    if kind not in ("http", "https", "s3"):
        raise ValueError(f"'{redact(location)}': byte ranges are read over http(s):// and s3:// only")

    def attempt() -> bytes:
        if kind == "s3":
            data = _s3(location, lambda system: system.cat_file(location, start=begin, end=end))
        else:
            data = _read_http(location, begin, end, transfer.timeout_s, expected_bytes)
        if len(data) != end - begin:
            raise _Retry(f"truncated: {len(data)} of {end - begin} bytes at {begin}")
        if found := problem(data):
            raise _Retry(found)
        return data

    return _retried(location, transfer, attempt)


def _retried(location: str, transfer: Transfer, attempt: Callable[[], T]) -> T:
    """Raises FetchError after the last attempt."""
    tries: list[str] = []
    for number in range(transfer.attempts):
        if number:
            time.sleep(min(60.0, transfer.backoff_s * 2 ** (number - 1)))
        try:
            return attempt()
        except _Retry as error:
            tries.append(str(error))
    raise FetchError(f"{redact(location)}: {tries[-1]} (tried {len(tries)} times)")


def _attempt(kind: str, location: str, target: Path, transfer: Transfer) -> None:
    if kind in ("http", "https"):
        _fetch_http(location, target, transfer.timeout_s)
    elif kind == "s3":
        _s3(location, lambda system: system.get_file(location, str(target)))
    elif kind == "pipe":
        _fetch_pipe(location[5:], target, redact(location))
    else:
        try:
            shutil.copyfile(local_path(location), target)
        except FileNotFoundError as error:
            raise FetchError(f"{location}: no such file") from error


def _check(target: Path, expected_bytes: int | None, expected_sha256: str | None) -> None:
    """A file of the wrong length or hash is thrown away: resuming it would only add to the damage."""
    size = target.stat().st_size
    problem = ""
    if expected_bytes is not None and size != expected_bytes:
        problem = f"expected {expected_bytes} bytes, got {size}"
    elif expected_sha256 is not None:
        with open(target, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected_sha256:
            problem = f"expected sha256 {expected_sha256[:16]}…, got {found[:16]}…"
    if problem:
        target.unlink()
        raise _Retry(problem)


def _fetch_http(url: str, target: Path, timeout_s: float) -> None:
    """One GET, resuming at the length of a partial target."""
    have = target.stat().st_size if target.exists() else 0
    request = _request(url, f"bytes={have}-" if have else None)
    with _http_errors(url, target, have), urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            target.unlink()
            raise _Retry("the server answered with another range than asked for")
        length = response.headers.get("Content-Length")
        with open(target, "ab" if resumed else "wb") as file:
            got = _copy(response, file)
        if length is not None and got != int(length):
            raise _Retry(f"truncated: the server announced {length} bytes and sent {got}")


def _read_http(url: str, begin: int, end: int, timeout_s: float, expected_bytes: int | None) -> bytes:
    """One GET of a range."""
    request = _request(url, f"bytes={begin}-{end - 1}")
    with _http_errors(url), urllib.request.urlopen(request, timeout=timeout_s) as response:  # noqa: S310
        if response.status != 206:
            raise NoRangesError(f"{redact(url)}: the server answers a Range request with status {response.status}")
        answered, _, total = response.headers.get("Content-Range", "").partition("/")
        if answered != f"bytes {begin}-{end - 1}":
            raise _Retry("the server answered with another range than asked for")
        if expected_bytes is not None and total.isdigit() and int(total) != expected_bytes:
            raise FetchError(f"{redact(url)}: has {total} bytes, its catalogue says {expected_bytes}; was it replaced?")
        return response.read()


@contextmanager
def _http_errors(url: str, target: Path | None = None, have: int = 0) -> Iterator[None]:
    """urllib's errors as ours: final ones, and those that another attempt may mend."""
    try:
        yield
    except FetchError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have and target:  # the partial file is as long as the whole, or longer
            target.unlink()
            raise _Retry("the server refused to resume") from None
        if error.code in _FINAL_STATUS:
            raise FetchError(f"{redact(url)}: HTTP {error.code} {error.reason}") from None
        raise _Retry(f"HTTP {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise _Retry(f"no connection ({error.reason})") from None
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno == 28 and target:
            raise FetchError(f"{redact(url)}: no space left in {target.parent}; see data.cache_dir") from error
        raise _Retry(f"connection broke ({type(error).__name__}: {error})") from None


def _request(url: str, byte_range: str | None) -> urllib.request.Request:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))  # noqa: S310  (scheme checked)
    if at:  # unredirected: credentials stay with the host that they were given for
        credentials = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {credentials}")
    if byte_range:
        request.add_header("Range", byte_range)
    return request


def _copy(source: http.client.HTTPResponse | BinaryIO, file: BinaryIO) -> int:
    total = 0
    while chunk := source.read(_CHUNK):
        file.write(chunk)
        total += len(chunk)
    return total


def _s3(location: str, use: Callable[[Any], T]) -> T:
    """Through fsspec: credentials, endpoint and profile from where the S3 clients look for them."""
    try:
        import fsspec

        file_system = fsspec.filesystem("s3")
    except ImportError as error:
        raise FetchError(f"{redact(location)}: s3:// needs s3fs; pip install 'restrike[s3]'") from error
    try:
        return use(file_system)
    except FileNotFoundError as error:
        raise FetchError(f"{redact(location)}: no such object") from error
    except PermissionError as error:
        raise FetchError(f"{redact(location)}: access denied; check the S3 credentials") from error
    except (OSError, TimeoutError) as error:
        raise _Retry(f"{type(error).__name__}: {error}") from error


def _fetch_pipe(command: str, target: Path, label: str) -> None:
    with open(target, "wb") as file:
        done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)  # noqa: S602
    if done.returncode:
        raise FetchError(
            f"{label}: exit status {done.returncode}: {done.stderr.decode(errors='replace')[-300:].strip()}"
        )
