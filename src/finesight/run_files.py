"""Names of the files and folders in a run folder."""

from __future__ import annotations

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
SKIPPED_SAMPLES_FILE = "skipped_samples.jsonl"
IMAGES_FILE = "images.safetensors"
PARAM_AUDIT_FILE = "param_audit.json"
RESULT_FILE = "result.json"
REPORT_FILE = "report.html"

CHECKPOINTS_FOLDER = "checkpoints"
PREDICTIONS_FOLDER = "predictions"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
TRACKING_FOLDER = "track"
