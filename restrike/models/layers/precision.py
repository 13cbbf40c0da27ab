"""Parts of a model that autocast must leave in float32."""

from __future__ import annotations

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Context without autocast on that kind of device; nothing where there is no autocast (meta)."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
