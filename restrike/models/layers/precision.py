"""Parts of a model that autocast must leave in float32."""

from __future__ import annotations

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context without autocast on that kind of device; on meta, which has none, without the one that is imitated there
    (`restrike.plan` keeps its state as the CPU's)."""
    kind = "cpu" if device.type == "meta" else device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
