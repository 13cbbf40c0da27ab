"""The 3-D page: self-contained; in a real browser it draws, turns, toggles, filters, and asks nobody for anything."""

import base64
import dataclasses
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from own_scene_layouts import toy_views
from restrike.viz.scene import ColoredPoints, SceneViews
from restrike.viz.scene_page import PageCamera, PageLayer, PageScene, page_scene, write_scene_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
LOOKED_THROUGH = 2
PROBES = [(20, 20), (48, 36), (70, 30), (40, 60), (80, 60), (30, 45)]  # (u, v) of the picture

# What a user does, in order; each step's outcome goes into the document, which the browser prints.
SCRIPT = """
<script>
window.onload = () => setTimeout(() => {
  const seen = { violations: [], errors: [] }, pixels = () => {
    draw();
    const got = new Uint8Array(4 * canvas.width * canvas.height);
    gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, got);
    return got;
  };
  const drawn = () => pixels().reduce((n, value, i) => n + (i % 4 === 0 && value > 40 ? 1 : 0), 0);
  document.addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.blockedURI));
  window.onerror = (message) => seen.errors.push(message);
  seen.size = [canvas.width, canvas.height];
  seen.scenes = document.getElementById("scene").options.length;
  seen.drawn = drawn();
  seen.points = viewer.pointsShown;
  const boxes = document.querySelectorAll(".layer input");
  boxes[0].click(); draw(); seen.without_first = viewer.pointsShown;
  document.getElementById("none").click(); document.getElementById("light").checked = false;
  seen.drawn_none = drawn(); seen.points_none = viewer.pointsShown;
  document.getElementById("all").click(); draw(); seen.points_all = viewer.pointsShown;
  const slider = document.getElementById("confidence");
  seen.slider_shown = getComputedStyle(slider.parentElement).display !== "none";
  slider.value = 128; draw(); seen.points_confident = viewer.pointsShown; slider.value = 0;
  const turn = JSON.stringify(viewer.view.rotation), distance = viewer.view.distance;
  const at = { pointerId: 1, bubbles: true, buttons: 1 };
  canvas.setPointerCapture = () => {};
  canvas.dispatchEvent(new PointerEvent("pointerdown", { ...at, clientX: 300, clientY: 300 }));
  canvas.dispatchEvent(new PointerEvent("pointermove", { ...at, clientX: 360, clientY: 320 }));
  canvas.dispatchEvent(new PointerEvent("pointerup", { ...at, clientX: 360, clientY: 320 }));
  seen.turned = turn !== JSON.stringify(viewer.view.rotation);
  canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -300, cancelable: true }));
  seen.zoomed = viewer.view.distance < distance;
  document.getElementById("reset").click(); seen.reset = turn === JSON.stringify(viewer.view.rotation);
  document.getElementById("cameras").checked = false;
  document.getElementById("size").value = 6;
  document.querySelectorAll(".layer img")[LOOK].click();
  const got = pixels(), zoom = canvas.height / 72;
  seen.colors = PROBES.map(([u, v]) => {
    const x = Math.round(canvas.width / 2 + (u - 48) * zoom), y = Math.round(canvas.height / 2 - (v - 36) * zoom);
    return [...got.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3)];
  });
  const choose = document.getElementById("scene");
  choose.value = 1; choose.dispatchEvent(new Event("change")); draw();
  seen.points_second = viewer.pointsShown;
  seen.slider_second = getComputedStyle(slider.parentElement).display !== "none";
  seen.requests = performance.getEntriesByType("resource").map((each) => each.name.slice(0, 60))
    .filter((name) => !name.startsWith("data:"));
  fetch("ADDRESS").catch(() => {});
  new Image().src = "ADDRESS";
  setTimeout(() => {
    const result = document.createElement("pre");
    result.id = "result";
    result.textContent = JSON.stringify(seen);
    document.body.append(result);
  }, 300);
}, 300);
</script>
"""


@pytest.fixture(scope="module")
def views() -> SceneViews:
    scene = toy_views("train 0 desk </script><b>")
    confidence = torch.linspace(1, 5, scene.depth.numel()).view_as(scene.depth)
    return dataclasses.replace(scene, confidence=confidence)


@pytest.fixture(scope="module")
def page(views: SceneViews, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cloud = ColoredPoints(torch.rand(50, 3), torch.zeros(50, 3, dtype=torch.uint8))
    scenes = [page_scene(views), PageScene("only points", [PageLayer("cloud", cloud)])]
    return write_scene_page(tmp_path_factory.mktemp("page") / "new" / "index.html", scenes, "Samples <of> a test")


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_holds_everything_itself(page, views):
    text = page.read_text()
    assert "://" not in text and "default-src 'none'" in text and "<b>" not in text
    assert not re.search(r"(src|href)\s*=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert "<title>Samples &lt;of&gt; a test</title>" in text
    scene = data_of(page)["scenes"][0]
    assert scene["title"] == "train 0 desk </script><b>" and len(scene["layers"]) == 6
    layer = scene["layers"][1]
    points = np.frombuffer(base64.b64decode(layer["points"]), "<f4").reshape(-1, 3)
    assert layer["count"] == len(points) == 72 * 96
    in_camera = points @ views.world_to_camera[1, :, :3].numpy().T + views.world_to_camera[1, :, 3].numpy()
    np.testing.assert_allclose(in_camera[:, 2], views.depth[1].flatten(), rtol=1e-4)
    assert layer["thumbnail"].startswith("data:image/jpeg;base64,")


def test_confidence_becomes_quantiles_so_that_each_step_hides_as_many_points(page):
    scene, second = data_of(page)["scenes"]
    values = scene["confidence_values"]
    assert values[0] == pytest.approx(1) and values[255] == pytest.approx(5) and values == sorted(values)
    levels = np.concatenate([np.frombuffer(base64.b64decode(x["confidence"]), np.uint8) for x in scene["layers"]])
    assert abs((levels >= 128).mean() - 0.5) < 0.01
    assert second["confidence_values"] is None and second["layers"][0]["confidence"] is None


def test_points_are_thinned_to_a_bound(views, tmp_path):
    path = write_scene_page(tmp_path / "index.html", [page_scene(views, max_points=600)])
    assert [layer["count"] for layer in data_of(path)["scenes"][0]["layers"]] == [100] * 6
    assert path.stat().st_size < 120_000


def test_predicted_and_true_cameras_go_side_by_side(views, tmp_path):
    camera = PageCamera(views.intrinsics[0], views.world_to_camera[0], (72, 96))
    none = ColoredPoints(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8))
    scene = PageScene("both", [*page_scene(views).layers, PageLayer("predicted", none, camera, color=(255, 0, 0))])
    layer = data_of(write_scene_page(tmp_path / "index.html", [scene]))["scenes"][0]["layers"][-1]
    assert layer["count"] == 0 and layer["color"] == [255, 0, 0] and len(layer["camera"]["frustum"]) == 5


def test_nothing_to_show_is_refused(tmp_path):
    for scenes in ([], [PageScene("empty")]):
        with pytest.raises(ValueError, match="at least one scene, and one layer"):
            write_scene_page(tmp_path / "index.html", scenes)
    assert not (tmp_path / "index.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here: the page is not tried in a browser")
def test_a_browser_draws_toggles_and_asks_nobody(page, views, tmp_path):
    asked: list[str] = []

    class Outside(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Outside)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = SCRIPT.replace("ADDRESS", f"http://127.0.0.1:{server.server_port}/beacon")
    script = script.replace("PROBES", json.dumps(PROBES)).replace("LOOK", str(LOOKED_THROUGH))
    copy = tmp_path / "index.html"
    copy.write_text(page.read_text().replace("</body>", f"{script}</body>"))
    try:
        seen = browse(copy, tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    check_what_was_seen(seen, views)
    assert asked == [] and len(seen["violations"]) >= 2, "the content security policy stops what a script would fetch"


def browse(page: Path, folder: Path) -> dict:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}", "--window-size=900,600", "--virtual-time-budget=6000", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the script in the page did not finish: {done.stderr[-2000:]}"
    return json.loads(found[1])


def check_what_was_seen(seen: dict, views: SceneViews) -> None:
    whole = views.depth.numel()
    assert seen["errors"] == [] and seen["requests"] == [] and seen["scenes"] == 2
    assert seen["drawn"] > 0.02 * seen["size"][0] * seen["size"][1], "the canvas is not blank"
    assert seen["points"] == seen["points_all"] == whole and seen["without_first"] == whole * 5 // 6
    assert seen["drawn_none"] == seen["points_none"] == 0
    assert seen["slider_shown"] and abs(seen["points_confident"] / whole - 0.5) < 0.01
    assert seen["turned"] and seen["zoomed"] and seen["reset"]
    assert seen["points_second"] == 50 and not seen["slider_second"]
    own = np.array([views.images[LOOKED_THROUGH, :, v, u].tolist() for u, v in PROBES], dtype=float)
    difference = np.abs(np.array(seen["colors"], dtype=float) - own).max(-1)
    assert np.median(difference) < 25, f"through a camera the points are its picture: {seen['colors']} for {own}"
