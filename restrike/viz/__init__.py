"""Pictures of results. Matplotlib and Pillow are imported when something is drawn."""

from restrike.viz.contact_sheet import Prediction, contact_sheet
from restrike.viz.curves import join_metrics, plot_curves, read_metrics

__all__ = ["Prediction", "contact_sheet", "join_metrics", "plot_curves", "read_metrics"]
