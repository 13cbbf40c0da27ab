"""Credentials in the environment and in URLs: they reach no file of a run and no message."""

import logging
from pathlib import Path

import pytest

from cli.__main__ import main
from faults.cases import case
from faults.test_config import TINY
from restrike.data.cache import ShardCache
from restrike.data.dataset import DatasetLocation, open_split
from restrike.data.opener import FetchError, Transfer, fetch
from restrike.data.source import BadSampleError
from shard_tools import serve, write_set

CANARY = "canary0123456789"
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN")
SETTINGS = {
    **{f"the value of {name}": f"{CANARY}{name}" for name in VARIABLES},
    "a URL with a password": f"https://user:{CANARY}@host/data",
    "a signed URL": f"https://host/data?X-Amz-Signature={CANARY}",
    "a pipe with a signed URL": f"pipe:curl 'https://host/data?token={CANARY}'",
}
FAST = Transfer(attempts=2, timeout_s=5.0, backoff_s=0.001)
pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning's advice about its own demo model


@case("secrets", "{setting} in a setting", promise="hidden in every file of the run, and the run works")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_secret_in_a_setting(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning keeps an earlier test's closed stderr
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{CANARY}{name}")
    assert main(["fit", "--config", TINY, "--trainer.log_every_n_steps", "1", "--vars.secret", SETTINGS[setting]]) == 0
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {"config_fit.yaml", "provenance_fit.json", "metrics.csv"} <= {file.name for file in files}
    assert [file.name for file in files if CANARY.encode() in file.read_bytes()] == []
    assert "***" in next(file for file in files if file.name == "config_fit.yaml").read_text()


@case("secrets", "credentials in a URL that fails", promise="sent to the server, shown in no error")
def test_credentials_in_a_failing_url(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url.replace("http://", f"http://user:{CANARY}@")
        with pytest.raises(FetchError, match=r"/lost\.tar: HTTP 404") as caught:
            fetch(f"{url}/lost.tar?token={CANARY}", tmp_path / "target", FAST)
        assert "Authorization" in server.requests[0][1]
    assert CANARY not in str(caught.value)


@case("secrets", "credentials in the URL of a set that is not there", promise="shown in no error")
def test_credentials_in_the_url_of_no_set(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", transfer=FAST)
    with serve(tmp_path) as server:
        url = server.url.replace("http://", f"http://user:{CANARY}@")
        location = DatasetLocation(f"{url}/none?token={CANARY}", "auto", 3, {})
        with pytest.raises(ValueError, match=r"data\.data: .*HTTP 404") as caught:
            open_split(location, "train", cache)
    assert CANARY not in str(caught.value)


@case("secrets", "a signed URL of a shard that is lost during the run", promise="shown in no log and no cached name")
def test_a_signed_url_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    write_set(tmp_path / "set")
    cache = ShardCache(tmp_path / "cache", transfer=FAST)
    with serve(tmp_path / "set") as server:
        source = open_split(DatasetLocation(f"{server.url}?token={CANARY}", "auto", 3, {}), "train", cache)
        (tmp_path / "set" / "toy-train-0000.tar").unlink()
        with pytest.raises(BadSampleError) as caught:
            source.read(0)
    shown = [str(caught.value), source.place(0), source.key(0), source.fingerprint, caplog.text]
    shown += [path.name for path in cache.folder.iterdir()]
    assert [text for text in shown if CANARY in text] == []


@case("secrets", "a pipe with credentials that fails", promise="the error shows its program alone")
def test_a_failing_pipe(tmp_path: Path) -> None:
    transfer = Transfer(attempts=1, allow_pipe=True)
    with pytest.raises(FetchError, match=r"^pipe:false …: exit status 1") as caught:
        fetch(f"pipe:false --header 'Authorization: {CANARY}'", tmp_path / "target", transfer)
    assert CANARY not in str(caught.value)
