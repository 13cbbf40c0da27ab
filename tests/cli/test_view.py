"""`python -m cli view`: a scene or a run over HTTP, nothing else, and one message for what cannot be seen."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from cli import view
from cli.__main__ import main
from cli.view import ViewServer, make_server
from restrike.viz.scene import ColoredPoints
from restrike.viz.scene_page import PageLayer, PageScene, write_scene_page


def write_scene(folder: Path, title: str) -> Path:
    cloud = ColoredPoints(torch.rand(5, 3), torch.zeros(5, 3, dtype=torch.uint8))
    return write_scene_page(folder / "index.html", [PageScene(title, [PageLayer("cloud", cloud)])], title)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    write_scene(tmp_path / "scene", "my scene")
    (tmp_path / "scene" / "points.ply").write_text("ply")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "scene"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a <b>"
    for name in ("predictions/val_step_0000100.png", "predictions/val_step_0000200.png", "rays/ä b.png", "curves.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"PNG " + name.encode())
    for number, picture in enumerate(sorted((folder / "predictions").iterdir())):
        os.utime(picture, (number, number))
    (folder / "report.md").write_text("| top1 | <0.5> |\n")
    (folder / "config_fit.yaml").write_text("secret: true\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.png").write_bytes(b"secret")
    (folder / "predictions" / "out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "outside.png").write_bytes(b"secret")
    write_scene(folder / "scenes" / "desk", "desk")
    (folder / "export").mkdir()
    (folder / "export" / "index.html").write_text("<html>not ours</html>")
    return folder


@contextmanager
def served(folder: Path, host: str = "localhost") -> Iterator[ViewServer]:
    with make_server(folder, host, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(
    server: ViewServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """The path as it stands: clients of a higher level would tidy it."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    result = answer.status, answer.headers, answer.read()
    connection.close()
    return result


def test_a_scenes_page_is_served_and_is_not_kept_by_the_browser(scene):
    with served(scene) as server, urlopen(server.address) as answer:
        assert answer.read() == (scene / "index.html").read_bytes()
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        status, headers, body = get(server, "/", "HEAD")
        assert status == 200 and body == b"" and int(headers["Content-Length"]) > 1000


def test_a_run_shows_scenes_curves_report_and_pictures_the_newest_first(run):
    with served(run) as server:
        text = get(server, "/")[2].decode()
        assert "<h1>a &lt;b&gt;</h1>" in text and "&lt;0.5&gt;" in text and "not ours" not in text
        assert text.index("val_step_0000200.png") < text.index("val_step_0000100.png")
        for path in ("scenes/desk/index.html", "curves.png", "rays/%C3%A4%20b.png", "predictions/val_step_0000100.png"):
            assert f'"/files/{path}"' in text
            assert get(server, f"/files/{path}")[0] == 200
        assert get(server, "/files/rays/%C3%A4%20b.png")[2] == "PNG rays/ä b.png".encode()
        (run / "rays" / "new.png").write_bytes(b"new")
        assert "rays/new.png" in get(server, "/")[2].decode() and get(server, "/files/rays/new.png")[2] == b"new"


OUTSIDE = [
    "/../secret.txt", "/files/../../secret.txt", "/files/%2e%2e/%2e%2e/secret.txt", "/files//etc/passwd",
    "//etc/passwd",
    "/files/..%2f..%2fsecret.txt", "/files/predictions/../config_fit.yaml", "/files/config_fit.yaml", "/points.ply",
    "/files/points.ply", "/files/checkpoints/last.png", "/files/predictions/out.png", "/files/", "/files/predictions",
    "/files/export/index.html", "/index.html%00.png", "/C:/secret.txt", "/files/..\\..\\secret.txt",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_else_is_served_and_no_path_leads_out(path, scene, run):
    for folder in (scene, run):
        with served(folder) as server:
            status, _, body = get(server, path)
            assert status == 404 and b"secret" not in body.replace(path.encode(), b"")


def test_a_web_page_that_borrows_our_address_is_refused(scene):
    with served(scene) as server:
        assert get(server, "/", Host="evil.example:8000")[0] == 403
        assert get(server, "/", Host=f"localhost:{server.server_address[1]}")[0] == 200
        assert get(server, "/", "POST")[0] == 501


def test_it_listens_to_this_machine_alone_unless_told(scene):
    with served(scene) as server:
        assert server.is_local and server.server_address[0] in ("127.0.0.1", "::1")
    with served(scene, "0.0.0.0") as server:
        assert not server.is_local and get(server, "/", Host="node7:8000")[0] == 200


def test_a_port_that_is_taken_gives_way_to_the_next_or_is_named(scene, monkeypatch, capsys):
    with served(scene) as first:
        taken = first.server_address[1]
        monkeypatch.setattr(view, "DEFAULT_PORT", taken)
        with make_server(scene) as second:
            assert taken < second.server_address[1] < taken + 50
        assert main(["view", str(scene), "--no-browser", "--port", str(taken)]) == 2
        assert f"--port {taken}: something else listens there" in capsys.readouterr().err
    assert main(["view", str(scene), "--port", "99999"]) == 2
    assert "expected 0 … 65535" in capsys.readouterr().err


def test_what_cannot_be_seen_is_one_message(scene, run, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["view", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error
        return error

    assert "no such folder: nowhere" in refused("nowhere")
    assert "not a folder" in refused(str(tmp_path / "secret.txt"))
    (tmp_path / "empty").mkdir()
    assert "is neither a scene (predict writes its index.html into --data.out) nor a run folder" in refused(
        str(tmp_path / "empty")
    )
    assert str(scene) in refused(str(tmp_path)), "the scene inside is named"
    assert "not ours" not in refused(str(run / "export"))
    assert "python -m cli view --help" in refused()
    assert "--host" in refused(str(scene), "--host", "no.such.host.invalid")


def test_the_command_prints_its_address_and_ends_with_ctrl_c(scene, monkeypatch, capsys):
    def interrupted(self: ViewServer) -> None:
        raise KeyboardInterrupt

    opened: list[str] = []
    monkeypatch.setattr(ViewServer, "serve_forever", interrupted)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(view, "_has_screen", lambda: True)
    assert main(["view", str(scene / "index.html"), "--port", "0"]) == 0
    address = capsys.readouterr().out.split()[1]
    assert address.startswith("http://localhost:") and opened == [address]
    assert main(["view", str(scene), "--port", "0", "--no-browser"]) == 0 and len(opened) == 1
