"""What was trained is what is served: the file that evaluation, prediction and merging read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from finesight.config import PictureRule, Tune

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """`manifest.json` of a run folder, and of the model folder that the run is merged into.

    `base` is the model as the recipe named it and `base_fingerprint` the SHA-256 over the headers
    and index of its weight files; a base that has another one is refused. `picture` is the size
    rule in force (the family's own when the recipe names none), `system` the system prompt (None
    for a family without one).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    family: str
    base: str
    base_fingerprint: str
    picture: PictureRule
    system: str | None
    end_token: str
    tune: Tune
    versions: dict[str, str]
