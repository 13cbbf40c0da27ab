import itertools

import pytest
import torch

from benchmarks.__main__ import NAMES, check_device, commands, main
from benchmarks.harness import (
    DOCUMENT,
    INTRODUCTION,
    MARKER,
    SUMMARY,
    SUMMARY_END,
    Row,
    Timing,
    assert_close,
    compare,
    compare_forms,
    environment,
    record,
    restore,
    withdraw,
)
from benchmarks.targets import BESIDE, MEASURES, PARTS, Goal, summary


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
    assert document.read_text().startswith(INTRODUCTION.partition(SUMMARY)[0])
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


def test_several_forms_share_the_peer_of_a_round():
    calls, clock = [], itertools.count()
    forms = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = compare_forms(forms, lambda: calls.append("p"), warmup=0, clock=lambda: next(clock))
    assert "".join(calls) == "pab" + ("bap" + "pab") * 3
    assert timings["a"].peer_s is timings["b"].peer_s and len(timings["a"].ours_s) == 7


def test_rows_of_a_command_are_withdrawn_and_come_back_if_it_fails(tmp_path):
    document = tmp_path / "benchmarks.md"
    old, renamed, other = (
        Row(name, "1 ms", f"`python -m benchmarks {command}`")
        for name, command in (("a", "ema"), ("b", "ema"), ("c", "loader"))
    )
    record(old, renamed, other, where="CPU", document=document)
    taken = withdraw("python -m benchmarks ema", document)
    assert "| a |" not in document.read_text() and "| c |" in document.read_text()
    record(Row("a", "2 ms", old.command), where="GPU", document=document)
    restore(taken, document)
    text = document.read_text()
    assert text.count("| a |") == text.count("| b |") == 1 and "| a | – | – | 2 ms" in text


def cells(name, ratio="–", ours="–"):
    return {"name": name, "ratio": ratio, "ours": ours}


def test_a_goal_counts_the_rows_that_miss_it():
    goal = Goal("^x", "≥ 2×", at_least=2)
    figures = goal.figures([cells("x, 1", "**2.50×**"), cells("x, 2", "**1.90×**"), cells("y", "**9×**")])
    assert (goal.measured(figures), goal.verdict(figures)) == ("1.9–2.5×", "**missed** by 1 of 2")
    assert goal.verdict([2.0, 3.0]) == "met" and goal.verdict([1.0]) == "**missed**"
    assert (goal.measured([]), goal.verdict([])) == ("–", "not measured")
    assert Goal("x", "reported").verdict([1.0]) == "reported"


def test_the_best_form_of_each_case_has_to_reach_a_goal_for_either():
    goal = Goal("^x", "≥ 2×", at_least=2, needs="best")
    rows = [cells("x, batch 1, a", "**1.5×**"), cells("x, batch 1, b", "**2.5×**"), cells("x, batch 8, a", "**2.1×**")]
    assert goal.figures(rows) == [2.5, 2.1]
    least = Goal("^x", "≤ 1000 ms", at_most=1000, column="ours", unit="ms")
    figures = least.figures([cells("x", ours="1,234 ms")])
    assert figures == [1234] and least.measured(figures) == "1,234 ms" and least.verdict(figures) == "**missed**"


def test_the_table_of_targets_follows_the_rows_and_leaves_the_text_after_it(tmp_path):
    document = tmp_path / "benchmarks.md"
    record(row("EMA update, n, against timm ModelEmaV2", ratio="**7.00×**"), where="CPU", document=document)
    document.write_text(document.read_text().replace(SUMMARY_END, f"{SUMMARY_END}\n\nBy hand."))
    assert "| 3 | EMA update | ≥ 6× V2 | 7× | met |" in document.read_text()
    record(row("EMA update, n, against timm ModelEmaV2", ratio="**5.00×**"), where="CPU", document=document)
    text = document.read_text()
    assert "| 3 | EMA update | ≥ 6× V2 | 5× | **missed** |" in text and text.count(SUMMARY) == 1
    assert text.index(SUMMARY_END) < text.index("By hand.") < text.index(MARKER)


def test_every_measure_has_a_line_and_commands_that_exist(capsys):
    assert len([line for line in summary([]) if line[2].isdigit()]) == len(MEASURES) == 14
    assert main(["--list"]) == 0 and "python -m benchmarks fastervit training" in capsys.readouterr().out
    assert set(PARTS) <= set(NAMES)
    assert commands([]) == commands([str(number) for number in MEASURES])
    assert set(commands(BESIDE)) == set(BESIDE) == set(commands(NAMES)) - set(commands([]))


def test_the_document_holds_the_table_that_its_rows_give(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text(DOCUMENT.read_text())
    restore({}, document)
    assert document.read_text() == DOCUMENT.read_text()


def test_what_to_run_is_given_by_name_part_or_number():
    assert commands(["3", "ema"]) == ["ema"]
    assert commands(["fastervit training", "loader"]) == commands(["fastervit", "training", "loader"])
    assert commands(["fastervit"]) == [f"fastervit {part}" for part in PARTS["fastervit"]]
    assert commands(["2", "11"]) == ["fastervit training", "checkpoint"]
    for word in ("emma", "99", "training"):
        with pytest.raises(ValueError, match=f"no benchmark called {word}"):
            commands([word])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_runs(capsys):
    assert main(["fastervit", "--device", "cuda"]) == 2
    assert "no GPU that PyTorch can use" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not for loader"):
        check_device("cpu", ["loader", "ema"])
