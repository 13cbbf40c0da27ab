"""Evaluation sets in their genuine layouts: Sintel, TUM, Bonn, KITTI, NYU-v2, 7-Scenes, NRGBD, ScanNet, RealEstate10K.

One module a layout; each gives `ViewSequence`s. `open_view_set` picks the frames of a protocol.
"""

from restrike.data.evaluation_sets.protocols import (
    PROTOCOLS,
    Scoring,
    ViewProtocol,
    ViewProtocolName,
    ViewSet,
    open_view_set,
)
from restrike.data.evaluation_sets.sequences import ViewFrame, ViewSequence

__all__ = [
    "PROTOCOLS",
    "Scoring",
    "ViewFrame",
    "ViewProtocol",
    "ViewProtocolName",
    "ViewSequence",
    "ViewSet",
    "open_view_set",
]
