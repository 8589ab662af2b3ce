"""Names of the built-in data formats, which help lists without importing the formats and NumPy."""

from finesight.plugins import list_modules

FORMAT_PACKAGE = "finesight.ingest.formats"

FORMAT_HELPERS = (
    "clip_bounds",
    "conversation_placeholders",
    "conversation_rows",
    "dataset_format",
    "image_annotations",
    "json_annotations",
    "row_keys",
    "split_folders",
    "xml_annotations",
)
"""Modules of the package that are no formats."""


def list_format_names() -> list[str]:
    """List the names of the built-in formats, sorted."""
    modules = list_modules(FORMAT_PACKAGE, FORMAT_HELPERS)
    return sorted(module.replace("_", "-") for module in modules)
