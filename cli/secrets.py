"""Takes credentials out of what is written into the run folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_USER_IN_URL = re.compile(r"([a-zA-Z][\w+.\-]*://)[^/\s@]+@")
_QUERY_OF_URL = re.compile(r"([a-zA-Z][\w+.\-]*://[^\s?'\"]+\?)[^\s'\"]+")  # signed URLs have their signature there
_SECRET_NAME = re.compile(r"(_KEY|_KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # a shorter value would be found by chance


def hide_secrets(value: Any, env: Mapping[str, str] = os.environ) -> Any:
    """A plain config or text without user names, passwords and queries in URLs, and without the values of secret
    environment variables (WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, …)."""
    if isinstance(value, dict):
        return {key: hide_secrets(item, env) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item, env) for item in value]
    if not isinstance(value, str):
        return value
    value = _QUERY_OF_URL.sub(rf"\1{HIDDEN}", _USER_IN_URL.sub(rf"\1{HIDDEN}@", value))
    for name, secret in env.items():
        if _SECRET_NAME.search(name) and len(secret) >= _SHORTEST_SECRET:
            value = value.replace(secret, HIDDEN)
    return value
