"""What the files of a run folder are called: who writes them and who reads them agree here."""

from __future__ import annotations

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
DROPPED = "dropped.jsonl"
IMAGES = "images.safetensors"
MOVED = "moved.json"
RESULT = "result.json"
REPORT = "report.html"

CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions"
ADAPTER = "adapter"
MODEL = "model"
TRACK = "track"
