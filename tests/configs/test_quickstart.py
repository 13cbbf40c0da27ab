"""The README's promise about the quickstart."""

import json
from pathlib import Path

import pytest

from cli.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*")
def test_the_quickstart_reads_held_out_digits(tmp_path):
    data, run = tmp_path / "digits", tmp_path / "run"
    assert main(["prepare", "digits", "--out", str(data)]) == 0
    line = ["--config", str(ROOT / "conf" / "quickstart.yaml"), "--run_dir", str(run), "--data.data", str(data)]
    assert main(["fit", *line]) == 0
    assert main(["test", *line, "--ckpt_path", "last"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert max(report["test/top1"], report["test/top1_ema"]) >= 0.95
    assert report["test/top1_majority_class"] < 0.15
    assert report["images"] == 360
    for name in ("curves.png", "predictions/test.png", "weights/faster_vit_0_224.pth.tar"):
        assert (run / name).is_file()
