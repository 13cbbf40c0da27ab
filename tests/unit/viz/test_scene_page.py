"""The 3-D page: self-contained; in a real browser it draws, turns, toggles, filters, and asks nobody for anything."""

import base64
import dataclasses
import http.server
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from browser import launched_browser, needs_browser
from own_scene_layouts import toy_views
from restrike.viz.scene import ColoredPoints, SceneViews
from restrike.viz.scene_page import PageCamera, PageLayer, PageScene, page_scene, picture_side, write_scene_page
from restrike.viz.scene_views import colorize_depth, depth_range

LOOKED_THROUGH = 2
PROBES = [(20, 20), (48, 36), (70, 30), (40, 60), (80, 60), (30, 45)]  # (u, v) of the picture


@pytest.fixture(scope="module")
def views() -> SceneViews:
    scene = toy_views("train 0 desk </script><b>")
    confidence = torch.linspace(1, 5, scene.depth.numel()).view_as(scene.depth)
    return dataclasses.replace(scene, confidence=confidence)


@pytest.fixture(scope="module")
def page(views: SceneViews, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cloud = ColoredPoints(torch.rand(50, 3), torch.zeros(50, 3, dtype=torch.uint8))
    scenes = [dataclasses.replace(page_scene(views), unit="m"), PageScene("only points", [PageLayer("cloud", cloud)])]
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
    assert layer["picture"].startswith("data:image/jpeg;base64,")


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
    assert path.stat().st_size < 200_000


def test_pictures_of_hundreds_of_views_stay_within_a_bound():
    assert picture_side(1) == picture_side(8) == 384
    for views in (40, 300, 1000):
        assert views * picture_side(views) ** 2 * 3 / 4 <= 3_000_000


def test_depth_is_coloured_by_its_logarithm_where_it_spans_much(views, tmp_path):
    far = dataclasses.replace(views, depth=views.depth * torch.logspace(0, 2, 96))
    scenes = [page_scene(views), page_scene(far)]
    near, wide = (scene["depth_range"] for scene in data_of(write_scene_page(tmp_path / "a.html", scenes))["scenes"])
    assert not near["is_log"] and wide["is_log"]
    low, high = depth_range(views.depth)
    assert near["low"] == pytest.approx(low) and near["high"] == pytest.approx(high)


def test_unknown_depth_is_no_level_of_its_own_range(views, tmp_path):
    depth = views.depth.clone()
    depth[0, :10] = 0
    depth[0, 10:20] = torch.nan
    path = write_scene_page(tmp_path / "a.html", [page_scene(dataclasses.replace(views, depth=depth))])
    data = data_of(path)["scenes"][0]["layers"][0]["depth"].partition(",")[2]
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert levels.shape == (72, 96) and (levels[:20] == 0).all() and (levels[20:] > 0).all()


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def visit(browser: Any, page: Path) -> "Visit":
    return Visit(browser.new_context(viewport={"width": 900, "height": 700}, reduced_motion="reduce"), page)


class Visit:
    """The page in a window, and everything that it asks for, breaks, or says is broken."""

    def __init__(self, context: Any, page: Path) -> None:
        self.window, self.requests, self.errors = context.new_page(), [], []
        context.on("request", lambda request: self.requests.append(request.url))
        self.window.on("pageerror", lambda error: self.errors.append(str(error)))
        self.window.goto(page.as_uri())
        self.until("viewer.pointsShown > 0")

    def until(self, condition: str) -> None:
        """Wait for it, asking from outside: `wait_for_function` asks inside, where the page forbids eval."""
        for _ in range(300):
            if self.do(condition):
                return
            self.window.wait_for_timeout(100)
        raise AssertionError(f"never came true: {condition}")

    def do(self, script: str) -> Any:
        return self.window.evaluate(script)

    def slide(self, name: str, value: float) -> None:
        self.do(f"(() => {{ {name}.value = {value}; {name}.dispatchEvent(new Event('input')); }})()")

    def pixels(self) -> np.ndarray:
        """RGBA [H, W, 4] of the 3-D view; alpha is 0 where nothing is drawn."""
        script = """() => {
            draw();
            const got = new Uint8Array(4 * canvas.width * canvas.height);
            gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, got);
            return [canvas.width, canvas.height, btoa(Array.from(got, (x) => String.fromCharCode(x)).join(""))];
        }"""
        width, height, data = self.do(script)
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[::-1]

    def drawn(self) -> float:
        """Share of the 3-D view that something is drawn on."""
        return float((self.pixels()[..., 3] > 0).mean())

    def points(self) -> int:
        self.do("draw()")
        return int(self.do("viewer.pointsShown"))

    def panel(self, kind: str) -> np.ndarray:
        """RGB [H, W, 3] of what the panel shows of the chosen view."""
        self.window.click(f"[data-kind={kind}]")
        self.until(f"String(viewer.painted) === '{kind},' + viewer.chosen")
        script = "() => { const c = document.getElementById('map'); return [c.width, c.height, c.toDataURL()]; }"
        width, height, data = self.do(script)
        picture = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")
        assert picture.size == (width, height)
        return np.asarray(picture)


@needs_browser
def test_a_browser_draws_the_points_and_the_slider_hides_the_least_sure(visit, views):
    whole = views.depth.numel()
    assert visit.drawn() > 0.1 and visit.points() == whole
    visit.slide("confidence", 128)
    assert abs(visit.points() / whole - 0.5) < 0.01 and visit.window.inner_text("#confidence-value").startswith("≥ 3")
    half = visit.drawn()
    visit.slide("confidence", 255)
    assert visit.points() < 0.01 * whole and visit.drawn() < half
    visit.slide("confidence", 0)
    visit.window.click(".layer input >> nth=0")
    assert visit.points() == whole * 5 // 6
    visit.window.click("#none")
    assert visit.points() == 0 and visit.drawn() == 0
    visit.window.click("#all")
    assert visit.points() == whole
    visit.window.click("#shade")
    assert visit.drawn() > 0.1, "without shading, too"
    visit.window.click("#shade")
    assert visit.errors == []


@needs_browser
def test_a_mouse_turns_and_zooms(visit):
    first = visit.do("JSON.stringify(viewer.view)")
    visit.window.mouse.move(300, 300)
    visit.window.mouse.down()
    visit.window.mouse.move(360, 320, steps=3)
    visit.window.mouse.up()
    assert visit.do("JSON.stringify(viewer.view.rotation)") not in first
    distance = visit.do("viewer.view.distance")
    visit.window.mouse.wheel(0, -300)
    visit.until(f"viewer.view.distance < {distance}")
    visit.window.click("#reset")
    assert visit.do("JSON.stringify(viewer.view)") == first


@needs_browser
def test_the_panel_shows_a_views_depth_with_its_value_under_the_pointer(visit, views):
    visit.window.click(f".layer .pick >> nth={LOOKED_THROUGH}")
    photo = visit.panel("photo").astype(float)
    assert np.abs(photo - views.images[LOOKED_THROUGH].permute(1, 2, 0).numpy()).mean() < 8  # JPEG
    low, high = depth_range(views.depth)
    expected = colorize_depth(views.depth[LOOKED_THROUGH], low, high).astype(float)
    assert np.abs(visit.panel("depth") - expected).mean() < 2, "the same colours, in 255 steps"
    assert visit.window.is_visible("#legend")
    ticks = visit.window.inner_text("#ticks").split()
    assert ticks[-1] == "m" and float(ticks[0]) == pytest.approx(low, rel=0.01)
    assert float(ticks[-2]) == pytest.approx(high, rel=0.01)
    box = visit.window.locator("#map").bounding_box()
    visit.window.mouse.move(box["x"] + box["width"] * 48.5 / 96, box["y"] + box["height"] * 36.5 / 72)
    value, unit = visit.window.inner_text("#readout").split()
    assert unit == "m" and float(value) == pytest.approx(float(views.depth[LOOKED_THROUGH, 36, 48]), abs=0.02)
    bright = visit.panel("confidence").sum()
    visit.slide("confidence", 128)
    assert visit.panel("confidence").sum() < bright, "what the slider hides fades"
    visit.slide("confidence", 0)
    visit.window.click("[data-kind=photo]")
    assert not visit.window.is_visible("#legend")


@needs_browser
def test_through_a_camera_the_points_are_its_photo(visit, views):
    visit.window.click(f".layer .pick >> nth={LOOKED_THROUGH}")
    visit.window.click("#look")
    got = visit.pixels()
    height, width = got.shape[:2]
    zoom = min(height / 72, width / 96)
    colors = [got[round(height / 2 + (v - 36) * zoom), round(width / 2 + (u - 48) * zoom), :3] for u, v in PROBES]
    own = np.array([views.images[LOOKED_THROUGH, :, v, u].tolist() for u, v in PROBES], dtype=float)
    difference = np.abs(np.array(colors, dtype=float) - own).max(-1)
    assert np.median(difference) < 25, f"through a camera the points are its picture: {colors} for {own}"
    assert visit.window.inner_text("#through-name") == f"view {LOOKED_THROUGH}"
    photo, points = visit.window.locator("#overlay").bounding_box(), visit.window.locator("#canvas").bounding_box()
    assert photo["width"] == pytest.approx(96 * zoom, abs=2) and photo["height"] == pytest.approx(72 * zoom, abs=2)
    assert photo["x"] + photo["width"] / 2 == pytest.approx(points["x"] + points["width"] / 2, abs=1)
    visit.window.keyboard.press("ArrowRight")
    visit.window.click("#leave")
    assert not visit.window.is_visible("#through")


@needs_browser
def test_another_scene_without_photos_or_confidence(visit):
    visit.window.select_option("#scene", "1")
    assert visit.points() == 50
    assert not visit.window.is_visible("#confidence-row") and not visit.window.is_visible("#inspector")
    visit.window.select_option("#scene", "0")
    assert visit.window.is_visible("#inspector")


@needs_browser
def test_no_request_leaves_the_page_even_if_a_script_tries(visit, page):
    asked: list[str] = []

    class Outside(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Outside)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    beacon = f"http://127.0.0.1:{server.server_port}/beacon"
    loaded = [url for url in visit.requests if not url.startswith("data:")]
    assert loaded == [page.as_uri()], "the page itself is all that was loaded"
    try:
        refused = visit.do(f"""async () => {{
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            await fetch("{beacon}").catch(() => 0);
            new Image().src = "{beacon}";
            await new Promise((done) => setTimeout(done, 300));
            return refused;
        }}""")
    finally:
        server.shutdown()
        server.server_close()
    assert {"connect-src", "img-src"} <= set(refused) and asked == []
    assert visit.errors == []


@needs_browser
def test_a_telephone_shows_the_scene_above_the_panel(browser, page):
    size = {"width": 390, "height": 780}
    visit = Visit(browser.new_context(viewport=size, device_scale_factor=2, has_touch=True, is_mobile=True), page)
    canvas, panel = (visit.window.locator(name).bounding_box() for name in ("#canvas", "aside"))
    assert canvas["height"] > 300 and panel["y"] >= canvas["height"] - 1 and panel["width"] == 390
    assert visit.drawn() > 0.1 and visit.do("document.documentElement.scrollWidth") == 390
    visit.window.tap("[data-kind=depth]")
    assert visit.window.is_visible("#legend") and visit.errors == []
