"""Repositories of both hubs: listed, fetched whole, resumed, verified, found again offline."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub_servers
import pytest
from hub_servers import COMMIT, TOKEN, HuggingFace, Serving, serving
from huggingface_hub import constants

from finesight.errors import UserError
from finesight.hub import WANTED, locate
from finesight.remote import repository, transfer
from finesight.remote.address import Address, any_address
from finesight.remote.repository import Repository, deliver, fetch_model, open_repository

WEIGHTS = bytes(range(256)) * 1000
MODEL = {
    "config.json": b'{"model_type": "qwen2_vl"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}" * 2000,
    "modeling_qwen.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "LICENSE": b"Apache-2.0",
}


@pytest.fixture(params=["hf", "modelscope"])
def hub(request: pytest.FixtureRequest) -> Serving:
    """Each hub in turn, with a model on it."""
    server: Serving = request.getfixturevalue(
        {"hf": "huggingface"}.get(request.param, "modelscope")
    )
    server.repositories["models/Some/model"] = dict(MODEL)
    return server


@pytest.fixture
def address(request: pytest.FixtureRequest, hub: Serving) -> Address:
    """Where the model is on the hub that is being tested."""
    return any_address(f"{request.node.callspec.params['hub']}:Some/model")


def weights_asked(hub: Serving) -> list[str | None]:
    """The ranges in which the weights were asked for."""
    return [asked.range for asked in hub.fetched if asked.path.split("?")[0] in _of_weights(hub)]


def _of_weights(hub: Serving) -> set[str]:
    assert hub.storage is not None
    return {f"/{d}" for d, (name, _) in hub.storage.blobs.items() if name == "model.safetensors"}


def test_a_model_comes_without_code_and_its_weights_when_they_are_asked_for(
    hub: Serving, address: Address
) -> None:
    wanted = {name: MODEL[name] for name in MODEL if not name.endswith((".py", ".bin"))}
    small = {name: wanted[name] for name in wanted if name != "model.safetensors"}
    model = locate(str(address))
    assert model.family == "qwen2_vl"
    assert _held(model.path) == small
    assert not weights_asked(hub)
    assert model.weight_files() == [model.path / "model.safetensors"]
    assert _held(model.path) == wanted
    assert locate(str(address)).weight_files() == model.weight_files()
    assert len(hub.fetched) == 2, "files that are there were asked for again"


def _held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_are_of_the_commit_that_the_small_files_are_of(
    hub: Serving, address: Address
) -> None:
    model = locate(str(address))
    hub.repositories["models/Some/model"] |= {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS[1:],
    }
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that was listed"):
        model.weight_files()
    assert _held(model.path)["config.json"] == MODEL["config.json"]
    assert "model.safetensors" not in _held(model.path)


def test_a_cut_connection_is_continued(hub: Serving, address: Address) -> None:
    hub.faults.cuts["model.safetensors"] = [100_000, 0, 50_000]
    folder = fetch_model(address, WANTED)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert weights_asked(hub) == [None, *["bytes=100000-"] * 2, "bytes=150000-"]


def test_a_killed_download_is_continued_by_the_next(hub: Serving, address: Address) -> None:
    hub.faults.cuts["model.safetensors"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match="200000 of 256000 bytes were received") as raised:
        fetch_model(address, WANTED)
    assert "start again: it goes on where it stopped" in raised.value.remedy
    hub.fetched.clear()
    folder = fetch_model(address, WANTED)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert weights_asked(hub) == ["bytes=200000-"]
    assert not [path for path in folder.rglob(".*") if path.name != ".cache"]


def test_several_processes_fetch_a_model_once(hub: Serving, address: Address) -> None:
    hub.faults.stalls["model.safetensors"] = 1000
    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(lambda: locate(str(address)).weight_files()) for _ in range(3)]
        assert hub.faults.stalled.wait(30)
        hub.faults.going_on.set()
        ((weights,),) = {tuple(one.result()) for one in asking}
    assert weights.read_bytes() == WEIGHTS
    assert weights_asked(hub) == [None]


def test_a_disk_without_room(
    hub: Serving, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = types.SimpleNamespace(f_bavail=10, f_frsize=1000)
    monkeypatch.setattr(os, "statvfs", lambda folder: room)
    with pytest.raises(UserError, match="bytes are needed and 10000 are free") as raised:
        fetch_model(address, WANTED)
    assert "--to" in raised.value.remedy
    assert not hub.fetched


def test_a_server_without_ranges(hub: Serving, address: Address) -> None:
    hub.faults.without_ranges = True
    hub.faults.cuts["model.safetensors"] = [100_000]
    folder = fetch_model(address, WANTED)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_is_busy_is_asked_again(hub: Serving, address: Address) -> None:
    hub.faults.statuses["model.safetensors"] = [503, 429]
    assert (fetch_model(address, WANTED) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_bytes_than_listed_are_refused(hub: Serving, address: Address, name: str) -> None:
    hub.faults.wrong.add(name)
    with pytest.raises(UserError, match="is not the file that was listed: its") as raised:
        fetch_model(address, WANTED)
    assert len(re.findall(r"[0-9a-f]{40,64}", raised.value.what)) == 2
    home = repository._home(address)
    assert not [path for path in home.rglob(f"*{name}*") if path.is_file()], "kept what is wrong"


@pytest.mark.parametrize("said", [True, False])
def test_a_file_that_is_shorter_than_listed_is_not_asked_for_without_end(
    hub: Serving, address: Address, monkeypatch: pytest.MonkeyPatch, said: bool
) -> None:
    found = open_repository(address)
    hub.repositories["models/Some/model"]["model.safetensors"] = WEIGHTS[1:]
    if not said:
        monkeypatch.setattr(transfer, "_announced", lambda response: None)
    with pytest.raises(UserError, match=r"255999 bytes were received|255999 of 256000 bytes"):
        found.fetch(["model.safetensors"])


def test_a_beginning_of_another_file_is_not_kept(hub: Serving, address: Address) -> None:
    hub.faults.cuts["model.safetensors"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(UserError):
        fetch_model(address, WANTED)
    (partial,) = repository._home(address).rglob(".model.safetensors.partial")
    partial.write_bytes(b"of an earlier revision")
    assert (fetch_model(address, WANTED) / "model.safetensors").read_bytes() == WEIGHTS


def test_the_token_goes_to_the_hub_alone(
    hub: Serving, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("models/Some/model")
    with pytest.raises(UserError, match="gated") as raised:
        fetch_model(address, WANTED)
    variable = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[address.hub]
    assert variable in raised.value.expected
    assert f"export {variable}=" in raised.value.remedy
    assert f"{hub.url}/" in raised.value.remedy
    assert "licence" in str(raised.value)
    monkeypatch.setenv(variable, TOKEN)
    fetch_model(address, WANTED)
    assert f"Bearer {TOKEN}" in [asked.token for asked in hub.asked]
    assert {asked.token for asked in hub.fetched} == {None}


def test_offline_what_was_fetched_is_found(
    request: pytest.FixtureRequest, hub: Serving, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_model(address, WANTED)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.getfixturevalue("without_sockets")
    assert fetch_model(address, WANTED) == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json of .* was not downloaded before"):
        fetch_model(address, WANTED)
    other = any_address(f"{address.hub}:Some/other")
    with pytest.raises(UserError, match="was not downloaded before, and HF_HUB_OFFLINE") as raised:
        fetch_model(other, WANTED)
    assert f"finesight download {other}" in raised.value.remedy


def test_what_the_hub_does_not_have(hub: Serving, address: Address) -> None:
    for name in (f"{address.hub}:No/thing", f"{address.hub}:datasets/Some/model"):
        with pytest.raises(UserError, match="has no"):
            open_repository(any_address(name))
    with pytest.raises(UserError, match="revision") as raised:
        open_repository(any_address(f"{address}@v9"))
    assert raised.value.remedy


def test_a_revision(hub: Serving, address: Address) -> None:
    found = open_repository(any_address(f"{address}@v1"))
    assert found.address.revision == "v1"
    assert fetch_model(found.address, WANTED) == found.folder


@pytest.mark.parametrize("path", ["../config.json", "/etc/config.json", "a/../../b.json", "C:\\a"])
def test_names_that_lead_elsewhere(hub: Serving, address: Address, path: str) -> None:
    hub.repositories["models/Some/model"][path] = b"{}"
    with pytest.raises(UserError, match="could lie outside"):
        open_repository(address).fetch([path])


@pytest.mark.parametrize(
    "target",
    [
        *("file:///etc/passwd", "http://169.254.169.254/latest", "http://example.com/a"),
        *("https://169.254.169.254/a", "https://[::1]/a", "https://localhost/a", "ftp://h.com/a"),
        *("https://10.0.0.1/a", "https://2130706433/a", "https://user@example.com/a"),
        *("https://foo/a", "https://box.lan/a", "https://box.internal./a"),
        *("https://[64:ff9b::a00:1]/a", "https://[2002:a00:1::]/a"),
    ],
)
def test_redirects_to_inner_places(hub: Serving, address: Address, target: str) -> None:
    hub.faults.elsewhere = target
    with pytest.raises(UserError, match=r"is not asked, to which .* redirects") as raised:
        fetch_model(address, WANTED)
    assert target in raised.value.what
    assert "Signature" not in str(raised.value)


def test_what_an_endpoint_gave_is_not_anothers(
    huggingface: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = any_address("hf:Some/model")
    for said in (b"mirror", b"origin"):
        with serving(HuggingFace) as hub:
            hub.repositories["models/Some/model"] = {**MODEL, "config.json": said}
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            assert (fetch_model(address, WANTED) / "config.json").read_bytes() == said
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    assert repository._home(address).parts[-4:] == ("hf", "models", "Some", "model")


def test_a_file_in_a_file(hub: Serving, address: Address) -> None:
    hub.repositories["models/Some/model"]["LICENSE/a.txt"] = b""
    with pytest.raises(UserError, match=r"LICENSE is listed as a file, and as .* LICENSE/a\.txt"):
        open_repository(address)


def test_of_two_deliveries_the_first_to_finish_makes_the_folder(
    huggingface: Serving, tmp_path: Path
) -> None:
    huggingface.repositories["models/Some/model"] = {"config.json": b"{}"}
    found = open_repository(any_address("hf:Some/model"))
    to = tmp_path / "models" / "mine"
    (tmp_path / "elsewhere").mkdir()
    to.parent.mkdir()
    (to.parent / f".mine.{COMMIT[:12]}.partial").symlink_to(tmp_path / "elsewhere")

    class Slower(Repository):
        def bring(self, paths: Sequence[str], folder: Path) -> Path:
            deliver(found, paths, to)
            return Repository.bring(self, paths, folder)

    with pytest.raises(UserError, match="mine exists already"):
        deliver(Slower(found.address, found.commit, found.files, found.folder), found.paths, to)
    assert [path.name for path in to.rglob("*")] == ["config.json"]
    assert [path.name for path in to.parent.iterdir()] == ["mine"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("commit", ["..", "../../x", "a\0b", "main", "", "a" * 300])
def test_a_commit_that_is_none(
    huggingface: Serving, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    huggingface.repositories["models/Some/model"] = dict(MODEL)
    monkeypatch.setattr(hub_servers, "COMMIT", commit)
    with pytest.raises(UserError, match="a commit that is none"):
        open_repository(any_address("hf:Some/model"))


def test_a_token_that_cannot_be_sent(modelscope: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "töken")
    with pytest.raises(UserError, match="some of which no token has") as raised:
        open_repository(any_address("modelscope:Some/model"))
    assert "töken" not in str(raised.value)


def test_pickled_weights_alone(hub: Serving, address: Address) -> None:
    files = hub.repositories["models/Some/model"]
    del files["model.safetensors"]
    assert (fetch_model(address, WANTED) / "pytorch_model.bin").read_bytes() == b"pickle"
    files["consolidated.pth"] = files.pop("pytorch_model.bin")
    with pytest.raises(UserError, match=r"the only weights .* are pickled: consolidated\.pth"):
        fetch_model(address, WANTED)


def test_a_listing_in_pages(huggingface: Serving, modelscope: Serving) -> None:
    files = {f"data/{n}.txt": b"%d" % n for n in range(450)}
    huggingface.page = 100
    for hub, source in ((huggingface, "hf"), (modelscope, "modelscope")):
        hub.repositories["datasets/Some/set"] = files
        found = open_repository(any_address(f"{source}:datasets/Some/set"))
        assert sorted(found.paths) == sorted(files)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://[", "nothing"])
def test_no_connection(
    huggingface: Serving, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match="hf:Some/model cannot be had") as raised:
        open_repository(any_address("hf:Some/model"))
    assert "check the connection and HF_ENDPOINT" in raised.value.remedy


def test_a_name_that_the_hub_does_not_allow(huggingface: Serving) -> None:
    with pytest.raises(UserError, match="hf:Some/a--b cannot be had"):
        open_repository(any_address("hf:Some/a--b"))


def test_a_token_that_is_none(huggingface: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface.repositories["models/Some/model"] = dict(MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    with pytest.raises(UserError, match="does not know the token") as raised:
        locate("Some/model")
    assert "unset HF_TOKEN" in raised.value.remedy
    assert "hf_outdated" not in str(raised.value)


def test_a_page_denied_by_mistake(modelscope: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    from finesight.remote.web import Web

    modelscope.repositories["datasets/Some/set"] = {f"{n}.txt": b"a" for n in range(250)}
    real, denied = Web.json, []

    def json(self: Web, url: str, params: dict[str, str]) -> object:
        if params["PageNumber"] == "2" and not denied:
            denied.append(url)
            raise UserError("access denied")
        return real(self, url, params)

    monkeypatch.setattr(Web, "json", json)
    assert len(open_repository(any_address("modelscope:datasets/Some/set")).paths) == 250
    assert denied


def test_huggingface_hubs_own_cache_is_as_good(
    huggingface: Serving, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface.repositories["models/Some/model"] = dict(MODEL)
    folder = cache / "hub" / "models--Some--model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(COMMIT)
    for name in MODEL:
        if name != "model.safetensors":
            (folder / name).write_bytes(MODEL[name])
    assert locate("Some/model").path != folder, "a model would lie in two places"
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    huggingface.asked.clear()
    assert locate("Some/model").weight_files() == [folder / "model.safetensors"]
    assert not [asked for asked in huggingface.asked if "/resolve/" in asked.path]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate("Some/model").path == folder


def test_an_answer_that_is_no_hubs(modelscope: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{modelscope.url}/nothing")
    with pytest.raises(UserError, match="has no"):
        open_repository(any_address("modelscope:Some/model"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://[")
    with pytest.raises(UserError, match="is not asked"):
        open_repository(any_address("modelscope:Some/model"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no answer: ConnectError") as raised:
        open_repository(any_address("modelscope:Some/model"))
    assert "check the connection" in raised.value.remedy
