"""Test tiers: the slow tests, and the end-to-end test of each command in the default tier.

`make test` runs the default tier, `make test-slow` the slow one. Tests marked `fuzz` in their file
belong to the third tier, `make test-fuzz`.
"""

from __future__ import annotations

from collections.abc import Collection

# Prefixes of test ids below tests/: folders, files, or single tests of a file.
SLOW = (
    "check/test_convention_detector.py",
    "cli/test_bad_input.py::test_full_disk_leaves_no_partial_files",
    "cli/test_damaged_folders.py",
    "cli/test_merge.py",
    "cli/test_qwen_vl_chat.py",
    "cli/test_remote_model.py",
    "cli/test_remote_processes.py",
    "cli/test_train.py::test_full_disk_is_reported",
    "cli/test_train.py::test_killed_data_workers_leave_a_checkpoint",
    "cli/test_train.py::test_signal_saves_checkpoint_and_exits_with_75",
    "data/test_fuzzed_imports.py",
    "docs/test_documentation.py::test_code_blocks_of_page_run",
    "docs/test_site.py",
    "doctor/test_package_check.py",
    "doctor/test_run_trained.py",
    "doctor/test_smoke_test.py",
    "evaluate/test_interval_coverage.py",
    "export/test_families.py",
    "export/test_verified_merge.py",
    "faults/",
    "infer/test_inference_service.py::test_cancelling_at_any_stage_frees_blocks",
    "invariants/",
    "launch/test_launch_scripts.py",
    "model/quant/test_quantize.py::test_quantized_model_accuracy_is_preserved",
    "model/quant/test_quantize.py::test_triton_interpreter_runs_all_kernels",
    "model/test_context_parallel.py",
    "plan/test_peak_memory.py",
    "pretraining/",
    "report/test_example_data.py::test_large_images_use_bounded_memory",
    "serve/test_hostile.py",
    "serve/test_load.py",
    "serve/test_request_middleware.py::test_stalled_client_is_disconnected",
    "track/test_mlflow.py",
    "track/test_tracker_manager.py",
    "train/parallel/",
    "train/test_cuda_graphs.py::test_larger_packs_are_captured_if_launch_bound",
    "train/test_cuda_graphs.py::test_packs_share_graphs_if_launch_bound",
    "train/test_dataloader_workers.py",
    "train/test_image_record.py",
    "train/test_quantized_runs.py",
    "train/test_out_of_memory.py",
    "train/test_trainer.py::test_activation_checkpointing_changes_only_memory",
    "train/test_vision_cache_distributed.py",
    "train/test_vision_cache.py",
    "test_api.py::test_documentation_page_detects_the_circle",
    "test_benchmarks.py",
    "test_bundled_model_quality.py",
    "test_container.py",
    "test_packaging.py",
    "test_pretraining.py",
)
SLOW_FIXTURES = {"browser"}

END_TO_END = {
    "chat": "cli/test_chat.py::test_session_with_images_is_drawn_saved_and_undone",
    "compare": "cli/test_compare.py::test_comparison_table_and_page",
    "convert": "cli/test_convert.py::test_printed_import_commands_create_the_data",
    "check": "cli/test_check.py::test_fix_writes_valid_samples_and_reports_them",
    "data export": "cli/test_data_export.py::test_summary_is_printed",
    "import": "cli/test_import.py::test_summary_is_printed",
    "data convert-boxes": "cli/test_convert_boxes.py::test_summary_is_printed",
    "plan": "cli/test_plan.py::test_plan_is_printed",
    "show": "cli/test_show.py::test_token_table_is_printed",
    "doctor": "cli/test_doctor.py::test_machine_is_diagnosed",
    "download": "cli/test_remote_data.py::test_download_command",
    "eval": "cli/test_eval.py::test_json_scores_and_predictions_file",
    "export": "cli/test_export.py::test_gguf_conversion",
    "launch": "cli/test_launch.py::test_job_file_and_start_command",
    "merge": "cli/test_merge.py::test_run_is_merged_into_model_folder",
    "predict": "cli/test_predict.py::test_one_json_line_per_image",
    "quickstart": "test_quickstart_demo.py::test_every_stage_writes_its_files",
    "report": "cli/test_report.py::test_report_is_written_into_run",
    "serve": "cli/test_serve.py::test_sigterm_finishes_running_requests_and_exits_with_0",
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
