"""One message for a user's mistake, with the nearest right name and the place where the wrong one stands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake in the command line or a config: printed as one message, exit code 2, no traceback."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when nothing is like it. Dotted names also match by their last part."""
    pool = sorted(set(candidates))
    if found := difflib.get_close_matches(name, pool, n=1, cutoff=0.6):
        return found[0]
    by_leaf = {candidate.rsplit(".", 1)[-1]: candidate for candidate in pool}
    found = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_leaf, n=1, cutoff=0.75)
    return by_leaf[found[0]] if found else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing."""
    found = nearest(name, candidates)
    return f" Did you mean '{found}'?" if found and found != name else ""


def where_is_key(key: str, files: Iterable[Path]) -> str | None:
    """`file:line` of the first line that sets a key whose last part is that of `key`."""
    leaf = re.escape(key.rsplit(".", 1)[-1])
    pattern = re.compile(rf"^\s*(-\s+)?[\"']?{leaf}[\"']?\s*:")
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.match(line):
                return f"{file}:{number}"
    return None


_NAMES_OF_WRONG_KEYS = (
    r"Option '([^']+)' is not accepted",
    r"[Kk]ey '([^']+)' is not expected",
    r"does not accept option '([^']+)'",
    r"[Uu]nrecognized arguments: --?([\w.\-]+)",
    r"Could not override '([^']+)'",
    r"Key '([^']+)' is not in struct",
    r"Invalid option '([^']+)'",
    r"Unknown (?:key|option):? '([^']+)'",
)


def wrong_key(message: str) -> str | None:
    """The name that a parser's message complains about."""
    for pattern in _NAMES_OF_WRONG_KEYS:
        if found := re.search(pattern, message):
            return found.group(1)
    return None


def explain(message: str, candidates: Iterable[str], files: Iterable[Path], tokens: Iterable[str]) -> str:
    """A parser's message, shortened, with the nearest right name and where the wrong one was given."""
    text = shorten(message)
    key = wrong_key(message)
    if key is None:
        return text
    leaf = key.rsplit(".", 1)[-1]
    given = rf"^[-+~]*([\w.@/]+\.)?{re.escape(leaf)}(=|$)"
    place = "given on the command line" if any(re.match(given, token) for token in tokens) else None
    if place is None and (found := where_is_key(key, files)):
        place = f"set in {found}"
    hint = did_you_mean(key, (c for c in candidates if c.rsplit(".", 1)[-1] != leaf))
    return f"{text.rstrip('.')}{f' ({place})' if place else ''}.{hint}"


_NOISE = r"^\s*(full_key:|object_type=|reference_type=|provider=|Config search path)|To append to your config use"
_KEY = re.compile(r'Parser key "([^"]+)":')
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>")


def _innermost(text: str) -> str:
    """`key: what is wrong` of a report that lists every member of every union type on the way down."""
    keys = list(_KEY.finditer(text))
    block = text[keys[-1].end() :] if keys else text
    block, _, rest = block.partition("Given value:")
    value = rest.splitlines()[0].strip() if rest else ""
    errors = [re.sub(r"\s+", " ", error).strip() for error in re.split(r"\n\s*- ", block)[1:]]
    errors = [re.sub(r" Given value type:.*", "", error) for error in errors]
    errors = [e for e in errors if e and not re.match(r"Does not validate|Expected a path but", e)]
    # The branch that came furthest says what is wrong; the others only say that they are other types.
    deep = [error for error in errors if not error.startswith("Expected a <class")]
    deep = deep or [error for error in errors if "NoneType" not in error]
    deep = deep or [line.strip(" -") for line in block.splitlines() if line.strip(" -")][:1]
    what = " or ".join(_TYPE.sub(r"\1", error) for error in deep)
    got = f", got {value!r}" if what.startswith("Expected") else ""
    return f"{'.'.join(key[1] for key in keys)}: {what}{got}"


def shorten(message: str) -> str:
    """A parser's message without what repeats the whole config or the machinery behind it."""
    text = message.strip()
    if "Does not validate against any of the Union subtypes" in text:
        text = _innermost(text)
    text = text.replace(
        "Add the import path to import_path_allowlist in set_parsing_settings to allow it.",
        "It is not in the registry; if you trust that code, allow it with --allow_class_path.",
    )
    lines = [line for line in text.splitlines() if line.strip() and not re.search(_NOISE, line)]
    return "\n".join(line if len(line) <= 400 else f"{line[:400]} …" for line in lines)


def explain_weights(message: str) -> str | None:
    """torch's page about a state dict that does not fit, as one sentence; None for any other message."""
    if not message.startswith("Error(s) in loading state_dict"):
        return None
    parts = []
    for title, text in (("Missing key(s)", "it lacks"), ("Unexpected key(s)", "the model lacks")):
        if found := re.search(rf"{re.escape(title)} in state_dict: (.*)", message):
            names = re.findall(r'"([^"]+)"', found.group(1))
            parts.append(f"{text} {len(names)} weights, the first '{names[0]}'")
    if found := re.search(r"size mismatch for ([^:]+): (.*)", message):
        parts.append(f"'{found.group(1)}' has another shape")
    return f"--ckpt_path is of another model than the config's: {'; '.join(parts)}. Take the config of its own run"
