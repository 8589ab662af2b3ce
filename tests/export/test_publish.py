"""Models on the hubs: listed first, private unless asked, and the token goes nowhere else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_servers import TOKEN, Serving, serving
from huggingface_hub import constants
from upload_servers import Bucket, TakingHuggingFace, TakingModelScope

from finesight.errors import UserError
from finesight.export.publish import uploads
from finesight.hub import locate
from finesight.infer.load import find_parts
from finesight.model.tiny import make_tiny
from finesight.remote import modelscope_upload
from finesight.remote.address import any_address
from finesight.remote.publishing import publish

VARIABLES = {"hf": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


@pytest.fixture(params=["hf", "modelscope"])
def hub(
    request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Serving]:
    """Each hub in turn, empty, and its token in the environment."""
    monkeypatch.setenv(VARIABLES[request.param], TOKEN)
    kind = TakingHuggingFace if request.param == "hf" else TakingModelScope
    with serving(kind, Bucket) as server:
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
    folder = make_tiny(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Tiny\n")
    (folder / "sha256.json").unlink()
    return folder


def send(folder: Path, name: str, *, public: bool = False) -> str:
    files = uploads(find_parts(str(folder)), str(folder))
    return publish(any_address(name), files, public=public, message="Upload")


def test_a_model_is_uploaded_whole_and_private(
    hub: Serving, name: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for extra in ("modeling_tiny.py", "optimizer.pt", "notes.docx", "old.safetensors"):
        (folder / extra).write_bytes(b"not for others")
    page = send(folder, name)
    assert page.startswith(hub.url)
    assert page.endswith("me/latex")
    sent = hub.repositories["models/me/latex"]
    assert sent == {path.name: path.read_bytes() for path in model.iterdir()}
    assert "models/me/latex" in hub.gated

    # And it comes back as it was.
    (back,) = locate(name).weight_files()
    assert back.read_bytes() == (model / "model.safetensors").read_bytes()


def test_public_is_asked_for(hub: Serving, name: str, model: Path) -> None:
    send(model, name, public=True)
    assert "models/me/latex" not in hub.gated


def test_a_new_version_is_a_further_commit(
    hub: Serving, name: str, model: Path, tmp_path: Path
) -> None:
    send(model, name)
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "README.md").write_text("# Better\n")
    assert hub.storage is not None
    before = sum(asked.path.endswith("x") for asked in hub.storage.asked)
    send(folder, name)
    assert hub.repositories["models/me/latex"]["README.md"] == b"# Better\n"
    assert sum(asked.path.endswith("x") for asked in hub.storage.asked) <= before + 1


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_that_others_see_otherwise_is_refused(
    hub: Serving, name: str, model: Path, public: bool
) -> None:
    send(model, name, public=not public)
    count = len(hub.asked)
    with pytest.raises(UserError, match="already, and it is " + ("private" if public else "pub")):
        send(model, name, public=public)
    assert len(hub.asked) == count + 1


def test_no_token_and_a_wrong_one(
    hub: Serving, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = VARIABLES[name.partition(":")[0]]
    monkeypatch.setenv(variable, "another")
    with pytest.raises(UserError) as caught:
        send(model, name)
    assert "another" not in str(caught.value)
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=rf"{variable}: no token"):
        send(model, name)
    assert hub.repositories == {}


def test_the_token_is_not_shown_to_the_storage(hub: Serving, name: str, model: Path) -> None:
    send(model, name)
    assert hub.storage is not None
    assert hub.storage.asked
    for asked in hub.storage.asked:
        assert "Authorization" not in asked.headers
        assert "Cookie" not in asked.headers


def test_a_storage_that_fails_for_a_moment_is_asked_again(
    hub: Serving, name: str, model: Path
) -> None:
    assert hub.storage is not None
    hub.storage.faults.statuses["PUT"] = [503, 500]
    send(model, name)
    assert len(hub.repositories["models/me/latex"]) == len(list(model.iterdir()))


def test_a_storage_that_stays_away_leaves_the_repository_empty(
    hub: Serving, name: str, model: Path
) -> None:
    assert hub.storage is not None
    hub.storage.faults.statuses["PUT"] = [403] * 100
    with pytest.raises(UserError):
        send(model, name)
    assert hub.repositories["models/me/latex"] == {}


def test_offline_nothing_is_asked(
    hub: Serving, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        send(model, name)
    assert hub.asked == []


@pytest.mark.parametrize("name", ["hf:me/latex@v1", "modelscope:datasets/me/latex"])
def test_other_places_are_refused(model: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not the name of a model alone"):
        send(model, name)


def test_a_folder_that_has_changed_is_refused(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "tiny")
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(UserError, match="has changed since it was written"):
        uploads(find_parts(str(folder)), str(folder))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://www.modelscope.cn/api/v1/models", True),
        ("https://lfs.modelscope.cn/object", True),
        ("http://www.modelscope.cn/api/v1/models", False),
        ("https://modelscope.cn.example.org/object", False),
        ("https://notmodelscope.cn/object", False),
        ("https://bucket.oss.aliyuncs.com/object?Signature=x", False),
    ],
)
def test_whom_the_token_of_modelscope_is_shown(url: str, shown: bool) -> None:
    assert modelscope_upload.is_of(url, "https://www.modelscope.cn") is shown
    assert not modelscope_upload.is_of("https://a.127.0.0.1/x", "https://127.0.0.1")
