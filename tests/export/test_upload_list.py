"""Models on the hubs: listed first, private unless asked, and the token goes nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from case_files import load_cases
from fake_hub_servers import TOKEN, FakeHubServer, run_hub_server
from fake_upload_servers import (
    UploadHuggingFaceHandler,
    UploadModelScopeHandler,
    UploadStorageHandler,
)
from huggingface_hub import constants
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.export.hf_files import list_uploads
from finesight.hub import modelscope
from finesight.hub.address import parse_address
from finesight.hub.repository import publish_model
from finesight.infer.model_loader import resolve_model_source
from finesight.model_folder import locate_model

CASES = load_cases("upload_list")

VARIABLES = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


@pytest.fixture(params=["hf", "modelscope"])
def hub(
    request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHubServer]:
    """Each hub in turn, empty, and its token in the environment."""
    monkeypatch.setenv(VARIABLES[request.param], TOKEN)
    kind = UploadHuggingFaceHandler if request.param == "hf" else UploadModelScopeHandler
    with run_hub_server(kind, UploadStorageHandler) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"{request.node.callspec.params['hub']}:me/latex"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = create_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Tiny\n")
    (folder / "sha256.json").unlink()
    return folder


def upload(folder: Path, name: str, *, public: bool = False) -> str:
    files = list_uploads(resolve_model_source(str(folder)), str(folder))
    return publish_model(parse_address(name), files, public=public, message="Upload")


def test_model_is_uploaded_completely_and_private(
    hub: FakeHubServer, name: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for extra in ("modeling_tiny.py", "optimizer.pt", "notes.docx", "old.safetensors"):
        (folder / extra).write_bytes(b"not for others")
    page = upload(folder, name)
    assert page.startswith(hub.url)
    assert page.endswith("me/latex")
    sent = hub.repositories["models/me/latex"]
    assert sent == {path.name: path.read_bytes() for path in model.iterdir()}
    assert "models/me/latex" in hub.gated

    # And it comes back as it was.
    (back,) = locate_model(name).weight_files()
    assert back.read_bytes() == (model / "model.safetensors").read_bytes()


def test_public_upload_is_explicit(hub: FakeHubServer, name: str, model: Path) -> None:
    upload(model, name, public=True)
    assert "models/me/latex" not in hub.gated


def test_new_version_is_a_new_commit(
    hub: FakeHubServer, name: str, model: Path, tmp_path: Path
) -> None:
    upload(model, name)
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "README.md").write_text("# Better\n")
    before = sum(asked.path.endswith("x") for asked in hub.storage.requests)
    upload(folder, name)
    assert hub.repositories["models/me/latex"]["README.md"] == b"# Better\n"
    assert sum(asked.path.endswith("x") for asked in hub.storage.requests) <= before + 1


@pytest.mark.parametrize("public", [False, True])
def test_visibility_mismatch_is_rejected(
    hub: FakeHubServer, name: str, model: Path, public: bool
) -> None:
    upload(model, name, public=not public)
    count = len(hub.requests)
    with pytest.raises(UserError, match="exists and is " + ("private" if public else "pub")):
        upload(model, name, public=public)
    assert len(hub.requests) == count + 1


def test_missing_and_wrong_tokens(
    hub: FakeHubServer, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = VARIABLES[name.partition(":")[0]]
    monkeypatch.setenv(variable, "another")
    with pytest.raises(UserError) as caught:
        upload(model, name)
    assert "another" not in str(caught.value)
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=rf"{variable}: no token"):
        upload(model, name)
    assert hub.repositories == {}


def test_token_is_not_sent_to_storage(hub: FakeHubServer, name: str, model: Path) -> None:
    upload(model, name)
    assert hub.storage.requests
    for requested in hub.storage.requests:
        assert "Authorization" not in requested.headers
        assert "Cookie" not in requested.headers


def test_transient_storage_errors_are_retried(hub: FakeHubServer, name: str, model: Path) -> None:
    hub.storage.faults.statuses["PUT"] = [503, 500]
    upload(model, name)
    assert len(hub.repositories["models/me/latex"]) == len(list(model.iterdir()))


def test_failed_upload_leaves_repository_empty(hub: FakeHubServer, name: str, model: Path) -> None:
    hub.storage.faults.statuses["PUT"] = [403] * 100
    with pytest.raises(UserError):
        upload(model, name)
    assert hub.repositories["models/me/latex"] == {}


def test_offline_mode_sends_no_requests(
    hub: FakeHubServer, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        upload(model, name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["hf:me/latex@v1", "modelscope:datasets/me/latex"])
def test_invalid_targets_are_rejected(model: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not a model, or has a revision"):
        upload(model, name)


def test_changed_folder_is_rejected(tmp_path: Path) -> None:
    folder = create_tiny_model(tmp_path / "tiny")
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match="has changed since it was written"):
        list_uploads(resolve_model_source(str(folder)), str(folder))


@pytest.mark.parametrize(("url", "shown"), CASES["test_modelscope_token_is_sent_only_to_its_hosts"])
def test_modelscope_token_is_sent_only_to_its_hosts(url: str, shown: bool) -> None:
    assert modelscope.is_same_domain(url, "https://www.modelscope.cn") is shown
    assert not modelscope.is_same_domain("https://a.127.0.0.1/x", "https://127.0.0.1")
