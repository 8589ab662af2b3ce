"""Test tiers: the slow tests, and the end-to-end test of each command in the default tier.

`make test` runs the default tier, `make test-slow` the slow one. Tests marked `fuzz` in their file
belong to the third tier, `make test-fuzz`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from case_files import load_cases

TESTS = Path(__file__).parent

# Prefixes of test ids below tests/: folders, files, or single tests of a file.
SLOW = tuple(load_cases("slow_tests"))
SLOW_FIXTURES = {"browser"}
# Single tests that take 20 seconds or more, most of them alone.
LONGEST = tuple(load_cases("longest_tests"))

DEFAULT_MARKERS, SLOW_MARKERS = "not slow and not fuzz", "slow"
"""Values of the option -m in the Makefile."""

END_TO_END = {
    "chat": "cli/test_chat.py::test_session_with_images_is_drawn_saved_and_undone",
    "compare": "cli/test_compare.py::test_comparison_table_and_page",
    "convert": "cli/test_convert.py::test_printed_import_commands_create_the_data",
    "check": "cli/test_check.py::test_fix_writes_valid_samples_and_reports_them",
    "data export": "cli/test_data.py::test_exported_samples_are_checked_by_the_next_command",
    "init": "cli/test_init.py::test_folder_of_images_becomes_a_trained_model",
    "import": "cli/test_import.py::test_summary_is_printed",
    "data convert-boxes": "cli/test_data.py::test_converted_boxes_are_counted",
    "plan": "cli/test_plan.py::test_plan_is_printed",
    "show": "cli/test_show.py::test_token_table_is_printed",
    "doctor": "cli/test_doctor.py::test_machine_is_diagnosed",
    "download": "cli/test_remote_data.py::test_download_command",
    "eval": "cli/test_eval.py::test_json_scores_and_predictions_file",
    "export": "cli/test_export.py::test_gguf_conversion",
    "label": "cli/test_label.py::test_suggestions_are_printed_once_and_answered_on_the_page",
    "launch": "cli/test_launch.py::test_job_file_and_start_command",
    "merge": "cli/test_merge.py::test_run_is_merged_into_model_folder",
    "predict": "cli/test_predict.py::test_one_json_line_per_image",
    "quickstart": "test_quickstart.py::test_every_stage_writes_its_files",
    "report": "cli/test_report.py::test_report_is_written_into_run",
    "serve": "cli/test_serve.py::test_sigterm_finishes_running_requests_and_exits_with_0",
    "studio": "cli/test_studio.py::test_page_shows_the_workspace",
    "train": "cli/test_train.py::test_json_result",
    "web": "cli/test_web.py::test_public_host_requires_a_password_unless_open",
}


def is_slow(test_id: str, fixtures: Collection[str] = ()) -> bool:
    """Check if a test belongs to the slow tier.

    Args:
        test_id: Test below tests/, such as `cli/test_merge.py::test_run[a]`.
        fixtures: Names of the fixtures that the test uses.
    """
    if test_id.partition("[")[0] in END_TO_END.values():
        return False
    return test_id.startswith(SLOW) or not SLOW_FIXTURES.isdisjoint(fixtures)


def is_longest(test_id: str) -> bool:
    """Check if a test takes so long that it has to start first."""
    return test_id.startswith(LONGEST)


def may_contain_tests(file: str, markers: str) -> bool:
    """Check if a file can contain tests of the tier that `make` selects with these markers.

    Args:
        file: File below tests/, such as `cli/test_merge.py`.
        markers: Value of the option -m. Other values than those of `make` select all files.
    """
    if markers == DEFAULT_MARKERS:
        tests = [test for test in END_TO_END.values() if test.startswith(f"{file}::")]
        return bool(tests) or not file.startswith(SLOW)
    if markers != SLOW_MARKERS or any(file.startswith(one.partition("::")[0]) for one in SLOW):
        return True
    folder = TESTS / Path(file).parent
    sources = (folder / Path(file).name, folder / "conftest.py")
    return any(provides_slow_fixture(path) for path in sources if path.is_file())


def provides_slow_fixture(path: Path) -> bool:
    """Check if a test file or conftest.py defines or imports a slow fixture."""
    text = path.read_text("utf-8")
    forms = [(f"def {fixture}(", f"import {fixture} as {fixture}") for fixture in SLOW_FIXTURES]
    return any(form in text for pair in forms for form in pair)
