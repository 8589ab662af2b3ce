"""Names of the built-in data formats, which help lists without importing the formats and NumPy."""

import pkgutil
from collections.abc import Sequence
from importlib.util import find_spec

FORMAT_PACKAGE = "finesight.data.formats"

FORMAT_HELPERS = (
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


def list_format_names() -> Sequence[str]:
    """List the names of the built-in formats, sorted."""
    spec = find_spec(FORMAT_PACKAGE)
    assert spec is not None, f"no package {FORMAT_PACKAGE}"
    modules = {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)}
    return sorted(name.replace("_", "-") for name in modules.difference(FORMAT_HELPERS))
