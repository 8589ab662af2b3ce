"""Models on the hubs: listed first, private unless asked, and the token goes nowhere else."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from case_files import load_cases
from fake_hub_servers import (
    TOKEN,
    FakeHubServer,
    HuggingFaceHandler,
    ModelScopeHandler,
    run_hub_server,
)
from huggingface_hub import constants
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.export.hf_files import list_uploads
from finesight.files.hub_address import parse_address
from finesight.hub import modelscope
from finesight.hub.repository import publish_model
from finesight.infer.model_loader import resolve_model_source
from finesight.model_folder import locate_model

CASES = load_cases("upload_list")

VARIABLES = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


class Target(NamedTuple):
    """Empty hub, and the address of a new model."""

    server: FakeHubServer
    address: str

    @property
    def files(self) -> dict[str, bytes]:
        return self.server.repositories["models/me/latex"]

    @property
    def is_private(self) -> bool:
        return "models/me/latex" in self.server.gated


@pytest.fixture(params=["hf", "modelscope"])
def target(
    request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    monkeypatch.setenv(VARIABLES[request.param], TOKEN)
    kind = HuggingFaceHandler if request.param == "hf" else ModelScopeHandler
    with run_hub_server(kind) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield Target(server, f"{request.param}:me/latex")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = create_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Tiny\n")
    (folder / "sha256.json").unlink()
    return folder


def upload(folder: Path, name: str, *, public: bool = False) -> str:
    files = list_uploads(resolve_model_source(str(folder)), str(folder))
    return publish_model(parse_address(name), files, public=public, message="Upload")


def test_model_is_uploaded_completely_and_private(target, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for extra in ("modeling_tiny.py", "optimizer.pt", "notes.docx", "old.safetensors"):
        (folder / extra).write_bytes(b"not for others")
    target.server.storage.faults.statuses["PUT"] = [503, 500]  # these errors are temporary
    page = upload(folder, target.address)
    assert page.startswith(target.server.url)
    assert page.endswith("me/latex")
    assert target.files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert target.is_private
    assert target.server.storage.requests
    for requested in target.server.storage.requests:
        assert not {"Authorization", "Cookie"} & set(requested.headers)
    (downloaded,) = locate_model(target.address).weight_files()
    assert downloaded.read_bytes() == (model / "model.safetensors").read_bytes()


def test_new_version_is_a_new_commit(target: Target, model: Path, tmp_path: Path) -> None:
    def count_objects() -> int:
        return sum(asked.path.endswith("x") for asked in target.server.storage.requests)

    upload(model, target.address)
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "README.md").write_text("# Better\n")
    before = count_objects()
    upload(folder, target.address)
    assert target.files["README.md"] == b"# Better\n"
    assert count_objects() <= before + 1


@pytest.mark.parametrize("public", [False, True])
def test_visibility_is_explicit_and_never_changed(target, model, public):
    upload(model, target.address, public=not public)
    assert target.is_private is public
    count = len(target.server.requests)
    with pytest.raises(UserError, match="exists and is " + ("private" if public else "pub")):
        upload(model, target.address, public=public)
    assert len(target.server.requests) == count + 1


def test_missing_and_wrong_tokens(target, model, monkeypatch):
    variable = VARIABLES[target.address.partition(":")[0]]
    monkeypatch.setenv(variable, "another")
    with pytest.raises(UserError) as caught:
        upload(model, target.address)
    assert "another" not in str(caught.value)
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=rf"{variable}: no token"):
        upload(model, target.address)
    assert target.server.repositories == {}
    target.server.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        upload(model, target.address)
    assert target.server.requests == []


def test_failed_upload_leaves_repository_empty(target: Target, model: Path) -> None:
    target.server.storage.faults.statuses["PUT"] = [403] * 100
    with pytest.raises(UserError):
        upload(model, target.address)
    assert target.files == {}


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


@pytest.mark.parametrize("name", ["hf:me/latex@v1", "modelscope:datasets/me/latex"])
def test_invalid_targets_are_rejected(model: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not a model, or has a revision"):
        upload(model, name)
