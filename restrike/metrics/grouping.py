"""Groups of scenes whose results count alike in an average: CO3D's categories, or category and frame order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class GroupedMean:
    """Rows of a metric's states by group name; without names, everything is one group."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = None if names is None else list(names)
        if self.names is not None and (not self.names or len(set(self.names)) != len(self.names)):
            raise ValueError(f"groups: expected distinct names, got {self.names}")

    def __len__(self) -> int:
        return 1 if self.names is None else len(self.names)

    def index(self, group: Sequence[str] | None, batch_size: int, device: torch.device) -> Tensor:
        """Row of each scene, [B] int64.

        Raises:
            ValueError: names came without being announced, are missing, or are unknown.
        """
        if self.names is None:
            if group is not None:
                raise ValueError(f"group {list(group)} came, but the metric was built without groups=[...]")
            return torch.zeros(batch_size, dtype=torch.int64, device=device)
        if group is None or len(group) != batch_size:
            raise ValueError(f"group: expected {batch_size} names, one a scene, got {group}")
        unknown = sorted(set(group) - set(self.names))
        if unknown:
            raise ValueError(f"group: {unknown} not among the groups announced: {self.names}")
        return torch.tensor([self.names.index(name) for name in group], device=device)
