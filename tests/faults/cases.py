"""What a fault test says of itself, for the table in `docs/reliability.md`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

AREAS = (
    "save", "load", "hostile checkpoint", "shard", "sample", "scene", "numerics", "processes", "config", "secrets",
)  # fmt: skip

Test = TypeVar("Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        area: One of `AREAS`.
        fault: What goes wrong; `{parameter}` is filled in from the test's parameters.
        promise: What happens then.
    """

    area: str
    fault: str
    promise: str


def case(area: str, fault: str, *, promise: str) -> Callable[[Test], Test]:
    """Register a test as a fault case; each of its parameter sets counts as one."""
    assert area in AREAS, area

    def register(test: Test) -> Test:
        test.fault_case = Case(area, fault, promise)  # type: ignore[attr-defined]
        return test

    return register
