"""Pictures of results and of data. Matplotlib and Pillow are imported when something is drawn."""

from restrike.viz.contact_sheet import Prediction, contact_sheet
from restrike.viz.curves import join_metrics, plot_curves, read_metrics
from restrike.viz.scene import ColoredPoints, SceneViews
from restrike.viz.scene_page import PageCamera, PageLayer, PageScene, page_scene, write_scene_page
from restrike.viz.scene_views import draw_cameras, draw_views

__all__ = [
    "ColoredPoints",
    "PageCamera",
    "PageLayer",
    "PageScene",
    "Prediction",
    "SceneViews",
    "contact_sheet",
    "draw_cameras",
    "draw_views",
    "join_metrics",
    "page_scene",
    "plot_curves",
    "read_metrics",
    "write_scene_page",
]
