"""Loading a checkpoint runs no code from it, and says what is wrong with a file."""

import argparse
import collections
import hashlib
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from restrike.checkpoints import CheckpointError, atomic, safe_load

WEIGHTS = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.float16)}


class Gadget:
    """Unpickling it makes a folder: a real attack, with a harmless end."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar", "w.pt", "w.ckpt", "w.safetensors"])
def test_every_kind_of_file(tmp_path, name):
    save_file(WEIGHTS, tmp_path / name) if "safe" in name else torch.save(WEIGHTS, tmp_path / name)
    loaded = safe_load(tmp_path / name)
    assert all(torch.equal(loaded[key], value) for key, value in WEIGHTS.items())


def test_old_files_without_a_zip_archive_load_too(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(safe_load(tmp_path / "w.pth")["a"], WEIGHTS["a"])


def test_a_releases_arguments_become_attributes_of_an_inert_object(tmp_path):
    arguments = argparse.Namespace(lr=0.005, model="faster_vit_0_224", opt_betas=None)
    torch.save({"state_dict": WEIGHTS, "args": arguments}, tmp_path / "w.pth.tar")
    allowed = set(torch.serialization.get_safe_globals())
    loaded = safe_load(tmp_path / "w.pth.tar")["args"]
    assert vars(loaded) == vars(arguments) and not isinstance(loaded, argparse.Namespace)
    assert set(torch.serialization.get_safe_globals()) == allowed, "nothing more is allowed afterwards"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside weights", "in the arguments"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, zipped, place):
    gadget = Gadget(tmp_path / "ran")
    content = {
        "alone": gadget,
        "beside weights": {"state_dict": WEIGHTS, "extra": gadget},
        "in the arguments": {"state_dict": WEIGHTS, "args": argparse.Namespace(hook=gadget)},
    }[place]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"w\.pth holds \w+\.mkdir, .* could run code"):
        safe_load(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the attack works where nothing stops it"


def test_a_bare_pickle_is_refused_too(tmp_path):
    for protocol in (2, 4):
        (tmp_path / "w.pth").write_bytes(pickle.dumps(Gadget(tmp_path / "ran"), protocol))
        with pytest.raises(CheckpointError, match=r"w\.pth"):
            safe_load(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def damaged(tmp_path, kind):
    path = tmp_path / "w.pth"
    torch.save(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": content[: len(content) // 2],
            "one byte short": content[:-1],
            "text": b"<html>404 not found</html>" * 9,
            "zeros": b"\0" * 4096,
        }[kind]
    )
    return path


@pytest.mark.parametrize("kind", ["empty", "half", "one byte short", "text", "zeros"])
def test_a_damaged_file_gives_one_error_that_names_it(tmp_path, kind):
    with pytest.raises(CheckpointError, match=r"w\.pth.*(fetch or write it again)"):
        safe_load(damaged(tmp_path, kind))


def test_damaged_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*damaged"):
        safe_load(path)


def test_a_zip_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"w\.pth.*fetch or write it again"):
        safe_load(tmp_path / "w.pth")


def test_a_flipped_byte_in_a_file_of_ours(tmp_path):
    path = tmp_path / "w.ckpt"
    atomic.save({"w": torch.zeros(1000)}, path)
    safe_load(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.ckpt.*sha256"):
        safe_load(path)


def test_missing_files_and_folders(tmp_path):
    torch.save(WEIGHTS, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no checkpoint .*w\.pth; its folder has: other\.pth") as caught:
        safe_load(tmp_path / "w.pth")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(CheckpointError, match="its folder has: no files"):
        safe_load(tmp_path / "nowhere" / "w.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        safe_load(tmp_path)


def test_expected_hash(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(WEIGHTS, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    safe_load(path, sha256=digest)
    safe_load(path, sha256=digest[:8].upper())
    for wrong in ("0" * 64, digest[1:], "", digest[:7]):
        with pytest.raises(CheckpointError, match=rf"has SHA-256 {digest}"):
            safe_load(path, sha256=wrong)


def test_plain_containers_stay_what_they_are(tmp_path):
    content = {"o": collections.OrderedDict(x=1), "l": [1, 2.5, None, True, "s", (1, 2)], "epoch": 3}
    torch.save(content, tmp_path / "w.pt")
    assert safe_load(tmp_path / "w.pt") == content
