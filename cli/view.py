"""`python -m cli view`: a predicted scene, or what there is to see of a run, in the browser."""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import os
import shutil
import socket
import sys
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from cli.errors import UserError
from restrike.viz.run_page import SCENE_PAGE, is_run_folder, is_scene_page, list_run, run_page

DEFAULT_PORT = 8000
_TRIED_PORTS = 50  # from the default one on, where it is taken
_PREFIX = "/files/"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".md": "text/plain; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".json": "application/json",
}
# A scene's page also brings a policy of its own, and the stricter of both holds.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_EPILOG = """\
what DIR may be:
  a scene        what predict wrote (--data.out), or doctor --draw: its page
  a run folder   scenes in it, curves, the report, pictures of predictions; reload to see what is new

On another machine: ssh -L 8000:localhost:8000 HOST, and open the address here. Only what is shown is served.
"""


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"view: {message}; python -m cli view --help lists the options")


def _parser() -> _Options:
    parser = _Options(
        "python -m cli view", description=__doc__, epilog=_EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="DIR", help="a predicted scene, or a run folder")
    parser.add_argument("--host", default="localhost", help="default: localhost, which nobody else can reach")
    parser.add_argument("--port", type=int, help=f"default: {DEFAULT_PORT}, or the next that is free; 0 takes any")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser


def main(argv: list[str]) -> int:
    """Serve until Ctrl-C.

    Raises:
        UserError: nothing to see, or an address that cannot be served at.
    """
    options = _parser().parse_args(argv)
    with make_server(options.folder, options.host, options.port) as server:
        address = server.address
        print(f"{options.folder}: {address} (Ctrl-C ends)", flush=True)
        if not server.is_local:
            print("everybody who reaches this machine can see it: leave --host out to keep it to yourself", flush=True)
        if not options.no_browser and _has_screen():
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def make_server(folder: Path, host: str = "localhost", port: int | None = None) -> ViewServer:
    """A server that waits to be told to `serve_forever`.

    Raises:
        UserError: see `main`.
    """
    if folder.is_file() and folder.name == SCENE_PAGE:
        folder = folder.parent
    check_folder(folder)
    if port is not None and not 0 <= port <= 65535:
        raise UserError(f"--port: expected 0 … 65535, got {port}")
    ports = range(DEFAULT_PORT, DEFAULT_PORT + _TRIED_PORTS) if port is None else [port]
    for number in ports:
        try:
            return ViewServer(folder, host, number)
        except PermissionError:
            raise UserError(f"--port {number}: no permission; take one from 1024 on") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"--host {host}: {error.strerror or error}") from None
    raise UserError(
        f"--port {port}: something else listens there; leave --port out for the next that is free"
        if port is not None
        else f"ports {ports[0]} to {ports[-1]} are all taken: give another one with --port"
    )


def check_folder(folder: Path) -> None:
    """Say what is wrong with a folder that has nothing to show.

    Raises:
        UserError: no folder, or neither a scene nor a run.
    """
    if not folder.is_dir():
        raise UserError(f"view: {'not a folder' if folder.exists() else 'no such folder'}: {folder}")
    if is_scene_page(folder / SCENE_PAGE) or is_run_folder(folder):
        return
    near = sorted(x for x in folder.iterdir() if x.is_dir() and (is_scene_page(x / SCENE_PAGE) or is_run_folder(x)))
    hint = f"; inside it are {', '.join(map(str, near[:5]))}" if near else ""
    raise UserError(
        f"view: {folder} is neither a scene (predict writes its {SCENE_PAGE} into --data.out) nor a run folder "
        f"(config_fit.yaml, checkpoints, predictions){hint}"
    )


class ViewServer(ThreadingHTTPServer):
    """Serves one folder: the page at "/", and exactly the files that it shows."""

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # Windows would let two servers share a port

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.folder = folder
        self.host = host
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        super().__init__((str(place[0]), port), _Handler)
        self.is_local = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def address(self) -> str:
        """To open in a browser."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.server_address[1]}/"

    def find(self, path: str) -> tuple[str, bytes | Path] | None:
        """Content type, and bytes or the file, of a request's path; None where there is nothing."""
        page = self.folder / SCENE_PAGE
        if path == "/":
            if is_scene_page(page):
                return _KINDS[".html"], page
            return _KINDS[".html"], run_page(list_run(self.folder), _PREFIX).encode()
        if not path.startswith(_PREFIX) or is_scene_page(page):
            return None
        # Names are compared with those that the page shows, never joined to a path: nothing leads elsewhere.
        wanted = path.removeprefix(_PREFIX)
        shown = next((file for file in list_run(self.folder).files() if file.as_posix() == wanted), None)
        return None if shown is None else (_KINDS[shown.suffix], self.folder / shown)


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        if not self._is_asked_by_name():
            self.send_error(HTTPStatus.FORBIDDEN, "This server answers to its own address alone")
            return
        found = self.server.find(unquote(urlsplit(self.path).path))
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content = found
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        self.send_response(HTTPStatus.OK)
        for name, value in {"Content-Type": kind, "Content-Length": str(size), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if isinstance(content, bytes):
                self.wfile.write(content)
            else:
                with content.open("rb") as file:
                    shutil.copyfileobj(file, self.wfile)

    def _is_asked_by_name(self) -> bool:
        """A web page that gives its own name our address (DNS rebinding) would else read what is here."""
        if not self.server.is_local:
            return True
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        return name in ("localhost", "127.0.0.1", "::1", self.server.host)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are nobody's news."""


def _has_screen() -> bool:
    """Without one, `webbrowser` would start a browser of text in this terminal."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
