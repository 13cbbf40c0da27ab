"""What export raises."""

from __future__ import annotations


class ExportError(ValueError):
    """A network that a format cannot carry, or a place that cannot be written; the message says what to do."""
