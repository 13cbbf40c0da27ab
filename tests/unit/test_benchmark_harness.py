import itertools

import pytest
import torch

from benchmarks.harness import INTRODUCTION, MARKER, Row, Timing, assert_close, compare, environment, record


def test_rounds_alternate_and_start_with_each_side_in_turn():
    calls, clock = [], itertools.count()
    timing = compare(
        lambda: calls.append("o"), lambda: calls.append("p"), rounds=7, warmup=0, clock=lambda: next(clock)
    )
    assert "".join(calls) == "po" + "op" + "po" + "op" + "po" + "op" + "po"
    assert len(timing.ours_s) == len(timing.peer_s) == 7


def test_short_calls_are_repeated_within_a_round():
    clock = itertools.count()
    timing = compare(lambda: None, lambda: None, rounds=7, min_round_s=5, clock=lambda: next(clock))
    assert timing.ours_s == [1.0] * 7


def test_the_ratio_is_a_median_of_rounds_not_of_times():
    timing = Timing(ours_s=[1, 2, 4, 100, 1, 1, 1], peer_s=[2, 4, 8, 200, 2, 2, 50])
    assert timing.ratio == 2 and timing.quartiles == (2, 2)
    with pytest.raises(ValueError, match="at least 7"):
        compare(lambda: None, lambda: None, rounds=3)


def test_unequal_outputs_are_never_timed():
    assert assert_close(torch.ones(3), torch.ones(3), 1e-6) == 0
    with pytest.raises(AssertionError, match="nothing was timed"):
        assert_close(torch.ones(3), torch.ones(3) * 1.1, 1e-3)


def row(name, ratio="**2.00×**"):
    return Row(name=name, ours="1 ms", command="`x`", ratio=ratio, date="2026-01-01")


def test_rows_replace_those_of_their_name_and_leave_text_alone(tmp_path, capsys):
    document = tmp_path / "docs" / "benchmarks.md"
    record(row("b"), row("a"), where="CPU", document=document)
    assert document.read_text().startswith(INTRODUCTION)
    document.write_text(document.read_text().replace(MARKER, f"By hand.\n\n{MARKER}"))
    record(row("b", ratio="**3.00×**"), where="CPU", document=document)
    record(row("a | c"), row("a"), where="GPU", document=document)
    text = document.read_text()
    assert text.count("| a |") == text.count("| b |") == text.count("| a / c |") == 1
    assert "By hand." in text and "3.00" in text and text.index("## CPU") < text.index("## GPU") < text.index("| a |")
    assert record(row("b"), where="CPU", document=document) is None and document.read_text().count("## CPU") == 1


def test_a_section_disappears_with_its_last_row(tmp_path):
    document = tmp_path / "benchmarks.md"
    record(row("a"), where="CPU", document=document)
    record(row("a"), where="GPU", document=document)
    assert "CPU" not in document.read_text().partition(MARKER)[2]


def test_a_row_of_a_comparison():
    timing = Timing(ours_s=[0.010] * 7, peer_s=[0.015] * 7)
    made = Row.of(timing, name="n", peer_name="timm", checked="c", command="x")
    assert (made.ratio, made.ours, made.peer) == ("**1.50×**", "10 ms", "15 ms (timm)")
    assert Row.of(timing, name="n", peer_name="timm", checked="c", command="x", items=2).ours == "200/s"


def test_environment_names_machine_and_versions():
    assert f"torch {torch.__version__.split('+')[0]}" in environment("no-such-package")
    assert "no-such-package (not installed)" in environment("no-such-package")
