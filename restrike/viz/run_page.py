"""What there is to see in a run folder, and a page of it: scenes, curves, the report, pictures of predictions."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

SCENE_PAGE = "index.html"
_GENERATOR = b'content="Restrike scene page"'
_HEAD_BYTES = 2048  # of a page, in which its generator stands
_DEPTH = 3  # folders below a run in which scenes are looked for
_SHOWN = 8  # newest pictures of a folder that are open at once
_PICTURES = (".png", ".jpg")
_RUN_MARKS = ("config_*.yaml", "provenance_*.json", "checkpoints", "predictions", "rays", "curves.png", "report.md")
_STYLE = """
:root { color-scheme: light dark; --line: #8883; --dim: #8a93a3; --accent: #3b82d6; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 24px 20px 60px; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 10px; border-bottom: 1px solid var(--line); padding-bottom: 5px; }
p.dim, figcaption { color: var(--dim); margin: 0; font-size: 13px; overflow-wrap: anywhere; }
a { color: var(--accent); }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px; padding: 0;
  list-style: none; }
.scenes a { display: block; padding: 14px 16px; border: 1px solid var(--line); border-radius: 10px;
  text-decoration: none; font-weight: 600; }
.scenes a:hover { border-color: var(--accent); }
.scenes small { display: block; font-weight: 400; color: var(--dim); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 16px; }
figure { margin: 0; }
img { max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); background: #fff; }
pre { overflow-x: auto; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; font-size: 13px; }
details { margin-top: 14px; }
"""


@dataclass(frozen=True)
class RunFiles:
    """What a run folder has to show, as paths below it; the newest first.

    Attributes:
        root: The folder.
        scenes: Pages of predicted scenes.
        tables: Predictions of a classifier.
        curves: Pictures of the training.
        reports: Text of tests.
        pictures: Folder → pictures in it.
    """

    root: Path
    scenes: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    curves: list[Path] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    pictures: dict[str, list[Path]] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """All of them: nothing else of the folder is anybody's to see."""
        shown = [picture for pictures in self.pictures.values() for picture in pictures]
        return [*self.scenes, *self.tables, *self.curves, *self.reports, *shown]


def is_scene_page(path: Path) -> bool:
    """Whether a file is a page that `write_scene_page` wrote."""
    try:
        with path.open("rb") as file:
            return _GENERATOR in file.read(_HEAD_BYTES)
    except OSError:
        return False


def is_run_folder(folder: Path) -> bool:
    """Whether something in a folder is what a run writes."""
    return any(next(folder.glob(mark), None) is not None for mark in _RUN_MARKS)


def list_run(root: Path) -> RunFiles:
    """Look through a run folder. Links that lead out of it are left out."""

    def newest(paths: list[Path]) -> list[Path]:
        inside = [path for path in paths if path.is_file() and path.resolve().is_relative_to(root.resolve())]
        inside.sort(key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
        return [path.relative_to(root) for path in inside]

    pages = [path for depth in range(1, _DEPTH + 1) for path in root.glob("*/" * depth + SCENE_PAGE)]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name != "checkpoints")
    below = {folder.name: newest([x for x in folder.iterdir() if x.suffix in _PICTURES]) for folder in folders}
    loose = [x for x in root.iterdir() if x.suffix in _PICTURES and x.name != "curves.png"]
    pictures = {".": newest(loose), **below}
    return RunFiles(
        root,
        scenes=newest([page for page in pages if is_scene_page(page)]),
        tables=newest([*root.glob("predictions*.csv"), *root.glob("predictions*.json")]),
        curves=newest([root / "curves.png"]),
        reports=newest([root / "report.md"]),
        pictures={name: found for name, found in pictures.items() if found},
    )


def run_page(files: RunFiles, prefix: str = "") -> str:
    """The page, which refers to each file by `prefix` and its path."""
    title = html.escape(files.root.resolve().name)
    parts = [f"<h1>{title}</h1>", f'<p class="dim">{html.escape(str(files.root.resolve()))}</p>']
    if files.scenes:
        items = "".join(f"<li>{_scene_link(prefix, path)}</li>" for path in files.scenes)
        parts.append(f'<h2>Scenes</h2><ul class="scenes">{items}</ul>')
    if files.curves:
        parts += ["<h2>Curves</h2>", *(_figure(prefix, path) for path in files.curves)]
    for path in files.reports:
        text = (files.root / path).read_text(encoding="utf-8", errors="replace")
        parts.append(f"<h2>Report</h2><pre>{html.escape(text.strip())}</pre>")
    if files.tables:
        links = " · ".join(f'<a href="{_address(prefix, path)}">{html.escape(path.name)}</a>' for path in files.tables)
        parts.append(f"<h2>Tables</h2><p>{links}</p>")
    for name, pictures in files.pictures.items():
        parts.append(f"<h2>{'Pictures' if name == '.' else html.escape(name)}</h2>")
        parts.append(_figures(prefix, pictures[:_SHOWN]))
        if older := pictures[_SHOWN:]:
            parts.append(f"<details><summary>{len(older)} older</summary>{_figures(prefix, older)}</details>")
    if not files.files():
        parts.append("<p>Nothing to see yet: curves, pictures and the report come as the run goes on.</p>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _scene_link(prefix: str, path: Path) -> str:
    name, place = html.escape(path.parent.name), html.escape(str(path.parent))
    return f'<a href="{_address(prefix, path)}">{name}<small>{place}</small></a>'


def _figures(prefix: str, pictures: list[Path]) -> str:
    return f'<div class="pictures">{"".join(_figure(prefix, path) for path in pictures)}</div>'


def _figure(prefix: str, path: Path) -> str:
    address, name = _address(prefix, path), html.escape(path.name)
    picture = f'<a href="{address}"><img loading="lazy" src="{address}" alt="{name}"></a>'
    return f"<figure>{picture}<figcaption>{name}</figcaption></figure>"


def _address(prefix: str, path: Path) -> str:
    return html.escape(prefix + quote(path.as_posix()))
