"""Repositories of both hubs: listing, download, resumption, verification, offline use."""

from __future__ import annotations

import re
import shutil
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_hub_servers
import pytest
from each_value import each
from fake_hub_servers import COMMIT, TOKEN, FakeHubServer, HuggingFaceHandler, run_hub_server
from huggingface_hub import constants

from finesight.errors import UserError
from finesight.hub.address import HubAddress, parse_address
from finesight.hub.repository import HubRepository, download_folder, fetch_model, open_repository
from finesight.model_folder import DOWNLOAD_PATTERNS, locate_model

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
def hub(request: pytest.FixtureRequest) -> FakeHubServer:
    """Server of each hub with a model."""
    server: FakeHubServer = request.getfixturevalue(
        {"hf": "huggingface"}.get(request.param, "modelscope")
    )
    server.repositories["models/Some/model"] = dict(MODEL)
    return server


@pytest.fixture
def address(request: pytest.FixtureRequest, hub: FakeHubServer) -> HubAddress:
    """Address of the model on the tested hub."""
    return parse_address(f"{request.node.callspec.params['hub']}:Some/model")


def list_weight_ranges(hub: FakeHubServer) -> list[str | None]:
    """Return the requested byte ranges of the weights."""
    return [
        request.range
        for request in hub.lfs_requests
        if request.path.split("?")[0] in weight_paths(hub)
    ]


def weight_paths(hub: FakeHubServer) -> set[str]:
    return {
        f"/{digest}"
        for digest, (name, _) in hub.storage.blobs.items()
        if name == "model.safetensors"
    }


def test_model_files_exclude_code_and_weights_are_lazy(
    hub: FakeHubServer, address: HubAddress
) -> None:
    model_files = {name: MODEL[name] for name in MODEL if not name.endswith((".py", ".bin"))}
    small_files = {name: model_files[name] for name in model_files if name != "model.safetensors"}
    model = locate_model(str(address))
    assert model.family == "qwen2_vl"
    assert read_folder(model.path) == small_files
    assert not list_weight_ranges(hub)
    assert model.weight_files() == [model.path / "model.safetensors"]
    assert read_folder(model.path) == model_files
    assert locate_model(str(address)).weight_files() == model.weight_files()
    assert len(hub.lfs_requests) == 2, "existing files were requested again"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_match_the_commit_of_small_files(hub: FakeHubServer, address: HubAddress) -> None:
    model = locate_model(str(address))
    hub.repositories["models/Some/model"] |= {
        "config.json": b"{}",
        "model.safetensors": WEIGHTS[1:],
    }
    with pytest.raises(UserError, match=r"model\.safetensors differs from the listing"):
        model.weight_files()
    assert read_folder(model.path)["config.json"] == MODEL["config.json"]
    assert "model.safetensors" not in read_folder(model.path)


def test_interrupted_download_is_resumed(hub: FakeHubServer, address: HubAddress) -> None:
    hub.faults.cuts["model.safetensors"] = [100_000, 0, 50_000]
    folder = fetch_model(address, DOWNLOAD_PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list_weight_ranges(hub) == [None, *["bytes=100000-"] * 2, "bytes=150000-"]


def test_killed_download_is_resumed_by_next_process(
    hub: FakeHubServer, address: HubAddress
) -> None:
    hub.faults.cuts["model.safetensors"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(UserError, match="received 200000 of 256000 bytes") as raised:
        fetch_model(address, DOWNLOAD_PATTERNS)
    assert "start again to resume the download" in raised.value.remedy
    hub.lfs_requests.clear()
    folder = fetch_model(address, DOWNLOAD_PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert list_weight_ranges(hub) == ["bytes=200000-"]
    assert not [path for path in folder.rglob(".*") if path.name != ".cache"]


def test_concurrent_processes_download_once(hub: FakeHubServer, address: HubAddress) -> None:
    hub.faults.stalls["model.safetensors"] = 1000
    with ThreadPoolExecutor(3) as threads:
        futures = [
            threads.submit(lambda: locate_model(str(address)).weight_files()) for _ in range(3)
        ]
        assert hub.faults.stalled_event.wait(30)
        hub.faults.resume_event.set()
        ((weights,),) = {tuple(future.result()) for future in futures}
    assert weights.read_bytes() == WEIGHTS
    assert list_weight_ranges(hub) == [None]


def test_insufficient_disk_space(
    hub: FakeHubServer, address: HubAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_usage = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk_usage)
    with pytest.raises(UserError, match="1e-05 GB are free on this disk") as raised:
        fetch_model(address, DOWNLOAD_PATTERNS)
    assert "--to" in raised.value.remedy
    assert not hub.lfs_requests


def test_server_without_range_support(hub: FakeHubServer, address: HubAddress) -> None:
    hub.faults.without_ranges = True
    hub.faults.cuts["model.safetensors"] = [100_000]
    folder = fetch_model(address, DOWNLOAD_PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_busy_server_is_retried(hub: FakeHubServer, address: HubAddress) -> None:
    hub.faults.statuses["model.safetensors"] = [503, 429]
    assert (fetch_model(address, DOWNLOAD_PATTERNS) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_digest_mismatch_is_rejected(
    hub: FakeHubServer, cache: Path, address: HubAddress, name: str
) -> None:
    hub.faults.corrupted.add(name)
    with pytest.raises(UserError, match="differs from the listing: its") as raised:
        fetch_model(address, DOWNLOAD_PATTERNS)
    assert len(re.findall(r"[0-9a-f]{40,64}", raised.value.what)) == 2
    kept = [path for path in cache.rglob(f"*{name}*") if path.is_file()]
    assert not kept, "a corrupt file was kept"


@pytest.mark.parametrize("has_total_size", [True, False])
def test_short_file_is_not_requested_endlessly(
    hub: FakeHubServer, address: HubAddress, has_total_size: bool
) -> None:
    opened = open_repository(address)
    hub.repositories["models/Some/model"]["model.safetensors"] = WEIGHTS[1:]
    hub.faults.without_sizes = not has_total_size
    with pytest.raises(UserError, match=r"received 255999 bytes, expected|255999 of 256000 bytes"):
        opened.fetch_files(["model.safetensors"])


def test_partial_file_of_another_version_is_discarded(
    hub: FakeHubServer, cache: Path, address: HubAddress
) -> None:
    hub.faults.cuts["model.safetensors"] = [200_000, 0, 0, 0, 0]
    with pytest.raises(UserError):
        fetch_model(address, DOWNLOAD_PATTERNS)
    (partial,) = cache.rglob(".model.safetensors.partial")
    partial.write_bytes(b"of an earlier revision")
    assert (fetch_model(address, DOWNLOAD_PATTERNS) / "model.safetensors").read_bytes() == WEIGHTS


def test_token_is_sent_only_to_the_hub(
    hub: FakeHubServer, address: HubAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("models/Some/model")
    with pytest.raises(UserError, match="gated") as raised:
        fetch_model(address, DOWNLOAD_PATTERNS)
    variable = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[address.hub]
    assert variable in raised.value.expected
    assert f"export {variable}=" in raised.value.remedy
    assert f"{hub.url}/" in raised.value.remedy
    assert "license" in str(raised.value)
    monkeypatch.setenv(variable, TOKEN)
    fetch_model(address, DOWNLOAD_PATTERNS)
    assert f"Bearer {TOKEN}" in [request.token for request in hub.requests]
    assert {request.token for request in hub.lfs_requests} == {None}


def test_offline_mode_uses_the_cache(
    request: pytest.FixtureRequest,
    hub: FakeHubServer,
    address: HubAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = fetch_model(address, DOWNLOAD_PATTERNS)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request.getfixturevalue("without_sockets")
    assert fetch_model(address, DOWNLOAD_PATTERNS) == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json of .* is not downloaded"):
        fetch_model(address, DOWNLOAD_PATTERNS)
    other = parse_address(f"{address.hub}:Some/other")
    with pytest.raises(UserError, match="is not downloaded, and HF_HUB_OFFLINE") as raised:
        fetch_model(other, DOWNLOAD_PATTERNS)
    assert f"finesight download {other}" in raised.value.remedy


def test_missing_repository_and_revision(hub: FakeHubServer, address: HubAddress) -> None:
    for name in (f"{address.hub}:No/thing", f"{address.hub}:datasets/Some/model"):
        with pytest.raises(UserError, match="does not exist"):
            open_repository(parse_address(name))
    with pytest.raises(UserError, match="revision") as raised:
        open_repository(parse_address(f"{address}@v9"))
    assert raised.value.remedy


def test_revision(hub: FakeHubServer, address: HubAddress) -> None:
    opened = open_repository(parse_address(f"{address}@v1"))
    assert opened.address.revision == "v1"
    assert fetch_model(opened.address, DOWNLOAD_PATTERNS) == opened.folder


@pytest.mark.parametrize("path", ["../config.json", "/etc/config.json", "a/../../b.json", "C:\\a"])
def test_path_traversal_is_rejected(hub: FakeHubServer, address: HubAddress, path: str) -> None:
    hub.repositories["models/Some/model"][path] = b"{}"
    with pytest.raises(UserError, match="may be outside"):
        open_repository(address).fetch_files([path])


@each(
    "target",
    [
        *("file:///etc/passwd", "http://169.254.169.254/latest", "http://example.com/a"),
        *("https://169.254.169.254/a", "https://[::1]/a", "https://localhost/a", "ftp://h.com/a"),
        *("https://10.0.0.1/a", "https://2130706433/a", "https://user@example.com/a"),
        *("https://foo/a", "https://box.lan/a", "https://box.internal./a"),
        *("https://[64:ff9b::a00:1]/a", "https://[2002:a00:1::]/a"),
    ],
)
def test_redirects_to_internal_hosts_are_rejected(
    hub: FakeHubServer, address: HubAddress, target: str
) -> None:
    hub.faults.redirect_url = target
    with pytest.raises(UserError, match="not an allowed address, the redirect target of") as raised:
        fetch_model(address, DOWNLOAD_PATTERNS)
    assert target in raised.value.what
    assert "Signature" not in str(raised.value)


def test_cache_is_separate_per_endpoint(
    huggingface: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = parse_address("hf:Some/model")
    for config in (b"mirror", b"origin"):
        with run_hub_server(HuggingFaceHandler) as hub:
            hub.repositories["models/Some/model"] = {**MODEL, "config.json": config}
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            assert (fetch_model(address, DOWNLOAD_PATTERNS) / "config.json").read_bytes() == config
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="is not downloaded") as raised:
        open_repository(address)
    assert raised.value.where.endswith("finesight/hf/models/Some/model")


def test_file_inside_a_file_is_rejected(hub: FakeHubServer, address: HubAddress) -> None:
    hub.repositories["models/Some/model"]["LICENSE/a.txt"] = b""
    with pytest.raises(UserError, match=r"LICENSE is listed as a file and as .* LICENSE/a\.txt"):
        open_repository(address)


def test_concurrent_deliveries_create_one_folder(
    huggingface: FakeHubServer, tmp_path: Path
) -> None:
    huggingface.repositories["models/Some/model"] = {"config.json": b"{}"}
    opened = open_repository(parse_address("hf:Some/model"))
    target = tmp_path / "models" / "mine"
    (tmp_path / "elsewhere").mkdir()
    target.parent.mkdir()
    (target.parent / f".mine.{COMMIT[:12]}.partial").symlink_to(tmp_path / "elsewhere")

    class ConcurrentRepository(HubRepository):
        def download_files(self, paths: Sequence[str], folder: Path) -> Path:
            download_folder(opened, paths, target)
            return HubRepository.download_files(self, paths, folder)

    with pytest.raises(UserError, match="mine: exists already"):
        download_folder(
            ConcurrentRepository(opened.address, opened.commit, opened.files, opened.folder),
            opened.paths,
            target,
        )
    assert [path.name for path in target.rglob("*")] == ["config.json"]
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("commit", ["..", "../../x", "a\0b", "main", "", "a" * 300])
def test_invalid_commit_is_rejected(
    huggingface: FakeHubServer, monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    huggingface.repositories["models/Some/model"] = dict(MODEL)
    monkeypatch.setattr(fake_hub_servers, "COMMIT", commit)
    with pytest.raises(UserError, match="invalid commit"):
        open_repository(parse_address("hf:Some/model"))


def test_unsendable_token_is_rejected(
    modelscope: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "töken")
    with pytest.raises(UserError, match="some of which are invalid in a token") as raised:
        open_repository(parse_address("modelscope:Some/model"))
    assert "töken" not in str(raised.value)


def test_missing_modelscope_package_is_reported(
    modelscope: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UserError, match=r"pip install 'finesight\[modelscope\]'"):
        open_repository(parse_address("modelscope:Some/model"))
    assert not modelscope.requests


def test_repository_with_only_pickled_weights(hub: FakeHubServer, address: HubAddress) -> None:
    files = hub.repositories["models/Some/model"]
    del files["model.safetensors"]
    assert (fetch_model(address, DOWNLOAD_PATTERNS) / "pytorch_model.bin").read_bytes() == b"pickle"
    files["consolidated.pth"] = files.pop("pytorch_model.bin")
    with pytest.raises(UserError, match=r"has only pickled weights: consolidated\.pth"):
        fetch_model(address, DOWNLOAD_PATTERNS)


def test_paginated_listing(huggingface: FakeHubServer, modelscope: FakeHubServer) -> None:
    files = {f"data/{n}.txt": b"%d" % n for n in range(450)}
    huggingface.page = 100
    for hub, source in ((huggingface, "hf"), (modelscope, "modelscope")):
        hub.repositories["datasets/Some/set"] = files
        opened = open_repository(parse_address(f"{source}:datasets/Some/set"))
        assert sorted(opened.paths) == sorted(files)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://[", "nothing"])
def test_connection_error(
    huggingface: FakeHubServer, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(UserError, match="hf:Some/model is not available") as raised:
        open_repository(parse_address("hf:Some/model"))
    assert "check the connection and HF_ENDPOINT" in raised.value.remedy


def test_invalid_repository_name(huggingface: FakeHubServer) -> None:
    with pytest.raises(UserError, match="hf:Some/a--b is not available"):
        open_repository(parse_address("hf:Some/a--b"))


def test_invalid_token(huggingface: FakeHubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface.repositories["models/Some/model"] = dict(MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    with pytest.raises(UserError, match="rejects the token") as raised:
        locate_model("Some/model")
    assert "unset HF_TOKEN" in raised.value.remedy
    assert "hf_outdated" not in str(raised.value)


def test_temporary_denied_page_is_retried(
    modelscope: FakeHubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    modelscope.repositories["datasets/Some/set"] = {f"{n}.txt": b"a" for n in range(250)}
    modelscope.faults.statuses["page 2"] = [403]
    assert len(open_repository(parse_address("modelscope:datasets/Some/set")).paths) == 250
    assert not modelscope.faults.statuses["page 2"]


def test_huggingface_hub_cache_is_reused(
    huggingface: FakeHubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface.repositories["models/Some/model"] = dict(MODEL)
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


def test_invalid_hub_response(modelscope: FakeHubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{modelscope.url}/nothing")
    with pytest.raises(UserError, match="does not exist"):
        open_repository(parse_address("modelscope:Some/model"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://[")
    with pytest.raises(UserError, match="is not available: InvalidURL"):
        open_repository(parse_address("modelscope:Some/model"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="is not available: NetworkError") as raised:
        open_repository(parse_address("modelscope:Some/model"))
    assert "check the connection" in raised.value.remedy
