"""Repositories of both hubs: listing, download, resumption, verification, offline use."""

import re
import shutil
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import fake_hub_servers
import pytest
from case_files import load_cases
from fake_hub_servers import (
    COMMIT,
    TOKEN,
    FakeHubServer,
    HubHandler,
    HuggingFaceHandler,
    run_hub_server,
)
from huggingface_hub import constants

from finesight.errors import UserError
from finesight.files.hub_address import HubAddress, parse_address
from finesight.hub.repository import HubRepository, download_folder, fetch_model, open_repository
from finesight.model_folder import DOWNLOAD_PATTERNS, locate_model

CASES = load_cases("repository")

NAME = "models/Some/model"
WEIGHTS = bytes(range(256)) * 1000
MODEL = {
    "config.json": b'{"model_type": "qwen2_vl"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}" * 2000,
    "modeling_qwen.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "LICENSE": b"Apache-2.0",
}


class RemoteModel(NamedTuple):
    """Model on the server of a hub."""

    server: FakeHubServer
    address: HubAddress

    @property
    def files(self) -> dict[str, bytes]:
        return self.server.repositories[NAME]

    def fetch(self) -> Path:
        return fetch_model(self.address, DOWNLOAD_PATTERNS)

    def fetch_weights(self) -> bytes:
        return (self.fetch() / "model.safetensors").read_bytes()

    def list_weight_ranges(self) -> list[str | None]:
        """Return the requested byte ranges of the weights."""
        blobs = self.server.storage.blobs
        paths = {f"/{digest}" for digest in blobs if blobs[digest][0] == "model.safetensors"}
        requests = self.server.lfs_requests
        return [request.range for request in requests if request.path.split("?")[0] in paths]


@pytest.fixture(params=["hf", "modelscope"])
def model(request: pytest.FixtureRequest) -> RemoteModel:
    server: FakeHubServer = request.getfixturevalue(request.param.replace("hf", "huggingface"))
    server.repositories[NAME] = dict(MODEL)
    return RemoteModel(server, parse_address(f"{request.param}:Some/model"))


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_model_files_exclude_code_and_weights_are_lazy(model: RemoteModel) -> None:
    model_files = {name: MODEL[name] for name in MODEL if not name.endswith((".py", ".bin"))}
    small_files = {name: model_files[name] for name in model_files if name != "model.safetensors"}
    located = locate_model(str(model.address))
    assert located.family == "qwen2_vl"
    assert read_folder(located.path) == small_files
    assert not model.list_weight_ranges()
    original = dict(model.files)
    model.files.update({"config.json": b"{}", "model.safetensors": WEIGHTS[1:]})
    with pytest.raises(UserError, match=r"model\.safetensors differs from the listing"):
        located.weight_files()
    assert read_folder(located.path) == small_files, "files of two commits were mixed"
    model.files.update(original)
    model.server.lfs_requests.clear()
    assert located.weight_files() == [located.path / "model.safetensors"]
    assert read_folder(located.path) == model_files
    assert locate_model(str(model.address)).weight_files() == located.weight_files()
    assert len(model.server.lfs_requests) == 1, "existing files were requested again"


def test_interrupted_download_is_resumed(model: RemoteModel) -> None:
    model.server.faults.cuts["model.safetensors"] = [100_000, 0, 50_000]
    model.server.faults.statuses["model.safetensors"] = [503, 429]
    assert model.fetch_weights() == WEIGHTS
    assert model.list_weight_ranges()[2:] == [None, *["bytes=100000-"] * 2, "bytes=150000-"]


@pytest.mark.parametrize("change", ["none", "partial file", "server without ranges"])
def test_killed_download_is_resumed_by_next_process(model, cache, change):
    model.server.faults.cuts["model.safetensors"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match="received 200000 of 256000 bytes") as raised:
        model.fetch()
    assert "start again to resume the download" in str(raised.value.remedy)
    model.server.lfs_requests.clear()
    if change == "partial file":
        (partial,) = cache.rglob(".model.safetensors.partial")
        partial.write_bytes(b"of an earlier revision")
    model.server.faults.without_ranges = change == "server without ranges"
    assert model.fetch_weights() == WEIGHTS
    if change == "none":
        assert model.list_weight_ranges() == ["bytes=200000-"]
    assert not [path for path in model.fetch().rglob(".*") if path.name != ".cache"]


def test_concurrent_processes_download_once(model: RemoteModel) -> None:
    faults = model.server.faults
    faults.stalls["model.safetensors"] = 1000
    with ThreadPoolExecutor(3) as threads:
        futures = [
            threads.submit(lambda: locate_model(str(model.address)).weight_files())
            for _ in range(3)
        ]
        assert faults.stalled_event.wait(30)
        faults.resume_event.set()
        ((weights,),) = {tuple(future.result()) for future in futures}
    assert weights.read_bytes() == WEIGHTS
    assert model.list_weight_ranges() == [None]


def test_insufficient_disk_space(model: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="1e-05 GB are free on this disk") as raised:
        model.fetch()
    assert "--to" in str(raised.value.remedy)
    assert not model.server.lfs_requests


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_digest_mismatch_is_rejected(model: RemoteModel, cache: Path, name: str) -> None:
    model.server.faults.corrupted.add(name)
    with pytest.raises(UserError, match="differs from the listing: its") as raised:
        model.fetch()
    assert len(re.findall(r"[0-9a-f]{40,64}", raised.value.what)) == 2
    kept = [path for path in cache.rglob(f"*{name}*") if path.is_file()]
    assert not kept, "a corrupt file was kept"


@pytest.mark.parametrize("has_total_size", [True, False])
def test_short_file_is_not_requested_endlessly(model: RemoteModel, has_total_size: bool) -> None:
    opened = open_repository(model.address)
    model.files["model.safetensors"] = WEIGHTS[1:]
    model.server.faults.without_sizes = not has_total_size
    with pytest.raises(UserError, match=r"received 255999 bytes, expected|255999 of 256000 bytes"):
        opened.fetch_files(["model.safetensors"])


def test_token_is_sent_only_to_the_hub(model: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.server.gated.add(NAME)
    with pytest.raises(UserError, match="gated") as raised:
        model.fetch()
    variable = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[model.address.hub]
    assert f"export {variable}=" in str(raised.value.remedy)
    assert f"{model.server.url}/" in str(raised.value.remedy)
    monkeypatch.setenv(variable, TOKEN)
    model.fetch()
    assert f"Bearer {TOKEN}" in [request.token for request in model.server.requests]
    assert {request.token for request in model.server.lfs_requests} == {None}


def test_offline_mode_uses_the_cache(request, model, monkeypatch):
    folder = model.fetch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.getfixturevalue("without_sockets")
    assert model.fetch() == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json of \S+ is not downloaded"):
        model.fetch()
    other = parse_address(f"{model.address.hub}:Some/other")
    with pytest.raises(UserError, match="is not downloaded, and HF_HUB_OFFLINE") as raised:
        fetch_model(other, DOWNLOAD_PATTERNS)
    assert f"finesight download {other}" in str(raised.value.remedy)


def test_revisions_and_missing_repositories(model: RemoteModel) -> None:
    opened = open_repository(parse_address(f"{model.address}@v1"))
    assert opened.address.revision == "v1"
    assert fetch_model(opened.address, DOWNLOAD_PATTERNS) == opened.folder
    hub = model.address.hub
    for name in (f"{hub}:No/thing", f"{hub}:datasets/Some/model", f"{model.address}@v9"):
        with pytest.raises(UserError, match="revision" if "@" in name else "does not exist"):
            open_repository(parse_address(name))


@pytest.mark.parametrize("path", ["../config.json", "/etc/config.json", "a/../../b.json", "C:\\a"])
def test_path_traversal_is_rejected(model: RemoteModel, path: str) -> None:
    model.files[path] = b"{}"
    with pytest.raises(UserError, match="may be outside"):
        open_repository(model.address).fetch_files([path])


@pytest.mark.parametrize("target", CASES["test_redirects_to_internal_hosts_are_rejected"])
def test_redirects_to_internal_hosts_are_rejected(model: RemoteModel, target: str) -> None:
    model.server.faults.redirect_url = target
    with pytest.raises(UserError, match="not an allowed address, the redirect target of") as raised:
        model.fetch()
    assert target in raised.value.what
    assert "Signature" not in str(raised.value)


def test_invalid_listings_are_rejected(model: RemoteModel) -> None:
    del model.files["model.safetensors"]
    assert (model.fetch() / "pytorch_model.bin").read_bytes() == b"pickle"
    model.files["consolidated.pth"] = model.files.pop("pytorch_model.bin")
    with pytest.raises(UserError, match=r"has only pickled weights: consolidated\.pth"):
        model.fetch()
    model.files["LICENSE/a.txt"] = b""
    with pytest.raises(UserError, match=r"LICENSE is listed as a file and as .* LICENSE/a\.txt"):
        open_repository(model.address)


def test_paginated_listing(huggingface: FakeHubServer, modelscope: FakeHubServer) -> None:
    files = {f"data/{n}.txt": b"%d" % n for n in range(450)}
    huggingface.page = 100
    modelscope.faults.statuses["page 2"] = [403]  # a temporary error of this hub
    for hub, source in ((huggingface, "hf"), (modelscope, "modelscope")):
        hub.repositories["datasets/Some/set"] = files
        opened = open_repository(parse_address(f"{source}:datasets/Some/set"))
        assert sorted(opened.paths) == sorted(files)
    assert not modelscope.faults.statuses["page 2"]


def test_cache_is_separate_per_endpoint(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = parse_address("hf:Some/model")
    for config in (b"mirror", b"origin"):
        with run_hub_server(HuggingFaceHandler) as hub:
            hub.repositories[NAME] = {**MODEL, "config.json": config}
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            assert (fetch_model(address, DOWNLOAD_PATTERNS) / "config.json").read_bytes() == config
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="is not downloaded") as raised:
        open_repository(address)
    assert raised.value.where.endswith("finesight/hf/models/Some/model")


def test_concurrent_deliveries_create_one_folder(huggingface, tmp_path):
    huggingface.repositories[NAME] = {"config.json": b"{}"}
    opened = open_repository(parse_address("hf:Some/model"))
    target = tmp_path / "models" / "mine"
    (tmp_path / "elsewhere").mkdir()
    target.parent.mkdir()
    (target.parent / f".mine.{COMMIT[:12]}.partial").symlink_to(tmp_path / "elsewhere")

    class ConcurrentRepository(HubRepository):
        def download_files(self, paths: Sequence[str], folder: Path) -> Path:
            download_folder(opened, paths, target)
            return HubRepository.download_files(self, paths, folder)

    concurrent = ConcurrentRepository(opened.address, opened.commit, opened.files, opened.folder)
    with pytest.raises(UserError, match="mine: exists already"):
        download_folder(concurrent, opened.paths, target)
    assert [path.name for path in target.rglob("*")] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_huggingface_hub_cache_is_reused(huggingface, cache, monkeypatch):
    huggingface.repositories[NAME] = dict(MODEL)
    folder = cache / "hub" / "models--Some--model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(COMMIT)
    for name in MODEL:
        if name != "model.safetensors":
            (folder / name).write_bytes(MODEL[name])
    assert locate_model("Some/model").path != folder, "the model would be stored twice"
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    huggingface.requests.clear()
    assert locate_model("Some/model").weight_files() == [folder / "model.safetensors"]
    assert not [request for request in huggingface.requests if "/resolve/" in request.path]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate_model("Some/model").path == folder


@pytest.mark.parametrize("commit", ["..", "../../x", "a\0b", "main", "", "a" * 300])
def test_invalid_commit_is_rejected(huggingface, monkeypatch, commit):
    huggingface.repositories[NAME] = dict(MODEL)
    monkeypatch.setattr(fake_hub_servers, "COMMIT", commit)
    with pytest.raises(UserError, match="invalid commit"):
        open_repository(parse_address("hf:Some/model"))


def test_invalid_tokens_are_not_shown(huggingface, modelscope, monkeypatch):
    huggingface.repositories[NAME] = dict(MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "töken")
    with pytest.raises(UserError, match="rejects the token") as rejected:
        locate_model("Some/model")
    assert "unset HF_TOKEN" in rejected.value.remedy
    with pytest.raises(UserError, match="some of which are invalid in a token") as unsendable:
        open_repository(parse_address("modelscope:Some/model"))
    assert not re.search("outdated|töken", f"{rejected.value}{unsendable.value}")


@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_tokens_that_a_hub_repeats_are_not_shown(huggingface, modelscope, monkeypatch, hub):
    def refuse(handler: HubHandler, path: str, *rest: object) -> None:
        received = handler.headers.get("Authorization", ""), handler.headers.get("Cookie", "")
        text = f"{received} is not welcome"
        handler.send_json({"Message": text, "error": text}, 418, {"X-Error-Message": text})

    server = huggingface if hub == "hf" else modelscope
    server.repositories[NAME] = dict(MODEL)
    for method in ("respond", "receive"):
        monkeypatch.setattr(server.RequestHandlerClass, method, refuse)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with pytest.raises(UserError, match="not welcome") as caught:
        open_repository(parse_address(f"{hub}:Some/model"))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://[", "nothing"])
@pytest.mark.parametrize("hub", ["hf", "modelscope"])
def test_connection_error(cache, monkeypatch, hub, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS", 0)
    with pytest.raises(UserError, match=f"{hub}:Some/model is not available") as raised:
        open_repository(parse_address(f"{hub}:Some/model"))
    assert "check the connection" in str(raised.value.remedy)


def test_invalid_names_and_answers(huggingface, modelscope, monkeypatch):
    with pytest.raises(UserError, match="hf:Some/a--b is not available"):
        open_repository(parse_address("hf:Some/a--b"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{modelscope.url}/nothing")
    with pytest.raises(UserError, match="does not exist"):
        open_repository(parse_address("modelscope:Some/model"))
    modelscope.requests.clear()
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UserError, match=r"pip install 'finesight\[modelscope\]'"):
        open_repository(parse_address("modelscope:Some/model"))
    assert not modelscope.requests
