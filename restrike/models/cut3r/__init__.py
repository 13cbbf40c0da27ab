"""CUT3R (arXiv 2501.12387): views one after another through a state that remembers the scene."""

from restrike.models.cut3r.heads import Predictions
from restrike.models.cut3r.model import CUT3R
from restrike.models.cut3r.stream import Stream

__all__ = ["CUT3R", "Predictions", "Stream"]
