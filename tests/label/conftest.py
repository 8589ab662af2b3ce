"""Browser of the labelling page tests, and worker processes that all label stores share."""

from types import SimpleNamespace

import pytest
from browser import browser as browser
from web_server_fixture import get_image_pool

from finesight.label import label_store


@pytest.fixture(autouse=True)
def share_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the processes that decode images once, and not for each label store."""

    def share_pool() -> SimpleNamespace:
        return SimpleNamespace(borrow_worker=get_image_pool().borrow_worker, close=lambda: None)

    monkeypatch.setattr(label_store, "create_image_pool", share_pool)
