"""The fault matrix: every row with its fault in short words, its policy, and the tests that hold it.

A test is named `file::function`, the file below `tests/`. A row whose subject is not built yet names the issue that
brings it instead. `test_rows.py` checks that no row is forgotten and that each named test exists.
"""

from __future__ import annotations

from dataclasses import dataclass

REFUSED = "refused"  # unsafe or destroying: always an error
OURS = "ours"  # an error where deltatune wrote the file or made the call; what PEFT accepts of its own, with a warning
HOLDS = "holds"  # no refusal but a promise: it works, or nothing is lost


@dataclass(frozen=True)
class Row:
    """One row; `waits` is the number of the issue that brings its subject."""

    number: int
    fault: str
    policy: str
    tests: tuple[str, ...] = ()
    waits: int | None = None


ROWS = [
    # G1: configs
    Row(
        1,
        "rank of 0, -4, 2.5, True, '8', 10^9",
        REFUSED,
        ("faults/test_config.py::test_a_value_out_of_range_is_refused_by_name",),
    ),
    Row(
        2,
        "alpha of NaN, inf, 0, negative, '16'",
        REFUSED,
        ("faults/test_config.py::test_a_value_out_of_range_is_refused_by_name",),
    ),
    Row(
        3,
        "dropout of NaN, -0.1, 1.0, 1.5",
        REFUSED,
        ("faults/test_config.py::test_a_value_out_of_range_is_refused_by_name",),
    ),
    Row(
        4,
        "unknown field in code or JSON",
        OURS,
        (
            "faults/test_config.py::test_an_unknown_field_in_code_or_in_a_file_of_ours",
            "faults/test_config.py::test_an_unknown_field_in_a_file_of_others_is_kept",
        ),
    ),
    Row(
        5,
        "unknown field, file of a newer version",
        OURS,
        ("faults/test_config.py::test_a_field_of_a_newer_version_names_both",),
    ),
    Row(
        6, "wrong type in JSON", REFUSED, ("faults/test_config.py::test_a_wrong_value_in_a_file_names_file_and_field",)
    ),
    Row(
        7,
        "key twice in JSON",
        REFUSED,
        ("faults/test_config.py::test_what_is_no_json_object_is_refused_with_file_and_place",),
    ),
    Row(
        8,
        "NaN and Infinity in JSON",
        REFUSED,
        ("faults/test_config.py::test_what_is_no_json_object_is_refused_with_file_and_place",),
    ),
    Row(
        9,
        "JSON truncated, empty, no object, bad UTF-8, BOM",
        REFUSED,
        ("faults/test_config.py::test_what_is_no_json_object_is_refused_with_file_and_place",),
    ),
    Row(
        10,
        "JSON above 1 MB or nested deeper than 32",
        REFUSED,
        (
            "faults/test_config.py::test_what_is_no_json_object_is_refused_with_file_and_place",
            "faults/test_config.py::test_many_keys_take_no_time",
        ),
    ),
    Row(
        11,
        "method unknown or missing",
        REFUSED,
        ("faults/test_config.py::test_a_wrong_value_in_a_file_names_file_and_field",),
    ),
    Row(
        12,
        "target pattern does not compile or is no list of strings",
        REFUSED,
        ("faults/test_config.py::test_a_wrong_value_in_a_file_names_file_and_field",),
    ),
    Row(
        13,
        "backtracking pattern",
        OURS,
        (
            "faults/test_config.py::test_a_pattern_that_backtracks_ends",
            "faults/test_config.py::test_a_pattern_that_would_fill_the_memory_is_refused",
            "faults/test_config.py::test_patterns_match_as_those_of_python",
        ),
    ),
    Row(
        14,
        "field that names a module, class, URL, path",
        OURS,
        ("faults/test_config.py::test_a_field_that_names_code_or_a_place_is_never_followed",),
    ),
    Row(
        15,
        "options that exclude each other",
        REFUSED,
        ("faults/test_config.py::test_options_that_exclude_each_other_are_both_named",),
    ),
    Row(
        16,
        "YAML settings with tags, anchor bombs, tabs",
        REFUSED,
        ("faults/test_config.py::test_settings_in_yaml_run_nothing_and_do_not_unfold",),
    ),
    Row(
        17,
        "layer lists out of range, repeated, huge",
        REFUSED,
        ("faults/test_config.py::test_a_value_out_of_range_is_refused_by_name",),
    ),
    # G2: injection and names
    Row(
        18,
        "target matches nothing",
        REFUSED,
        ("faults/test_injection.py::test_targets_that_are_not_there_are_answered_with_those_that_are",),
    ),
    Row(
        19,
        "one of several targets matches nothing",
        OURS,
        ("faults/test_injection.py::test_a_dead_name_beside_live_ones_is_told_by_field_and_name",),
    ),
    Row(
        20,
        "rank or alpha pattern, exclude, modules_to_save match nothing",
        OURS,
        (
            "faults/test_injection.py::test_a_dead_name_beside_live_ones_is_told_by_field_and_name",
            "faults/test_injection.py::test_a_module_to_train_whole_that_is_not_there",
        ),
    ),
    Row(
        21,
        "target is an unsupported layer",
        REFUSED,
        ("faults/test_injection.py::test_a_layer_that_no_method_takes_is_named_with_type_and_those_that_are_taken",),
    ),
    Row(
        22,
        "tied weight targeted",
        OURS,
        ("faults/test_injection.py::test_merging_into_a_tied_weight_leaves_the_other_end_right",),
    ),
    Row(
        23,
        "adapter name that is a path, has control characters, is reserved",
        REFUSED,
        ("faults/test_injection.py::test_a_name_that_could_be_a_path_is_refused_escaped_and_nothing_is_written",),
    ),
    Row(
        24,
        "adapter name equals a part of a module path",
        HOLDS,
        ("faults/test_injection.py::test_a_name_that_is_a_part_of_a_path_is_data",),
    ),
    Row(
        25,
        "adapter name already present",
        OURS,
        ("faults/test_injection.py::test_a_name_that_is_there_and_a_model_that_is_wrapped",),
    ),
    Row(
        26,
        "injection into a wrapped model",
        OURS,
        ("faults/test_injection.py::test_a_name_that_is_there_and_a_model_that_is_wrapped",),
    ),
    Row(
        27,
        "failure at the k-th module of an injection",
        REFUSED,
        (
            "faults/test_injection.py::test_an_injection_that_fails_at_the_kth_module_is_undone",
            "laws/test_refusal.py::test_a_failure_at_the_kth_layer_is_rolled_back",
        ),
    ),
    Row(
        28,
        "task without a head for the model",
        OURS,
        (
            "faults/test_injection.py::test_a_task_that_is_none_is_refused_with_those_that_are",
            "faults/test_injection.py::test_a_task_whose_head_the_model_lacks_is_told_by_task_and_class",
        ),
    ),
    Row(
        29,
        "memory runs out while tensors are made",
        REFUSED,
        ("faults/test_injection.py::test_memory_that_runs_out_is_told_and_nothing_is_left",),
    ),
    Row(
        30,
        "training with nothing that trains",
        REFUSED,
        ("faults/test_injection.py::test_training_with_nothing_that_trains_is_refused_before_the_first_step",),
    ),
    # G3: loading
    Row(
        31,
        "path missing, is a file, has no adapter",
        REFUSED,
        (
            "faults/test_load.py::test_a_path_where_nothing_is",
            "faults/test_load.py::test_a_file_in_place_of_a_folder_and_a_folder_without_an_adapter",
        ),
    ),
    Row(
        32,
        "weights truncated, empty, HTML, LFS pointer, random",
        REFUSED,
        (
            "faults/test_load.py::test_a_file_cut_anywhere",
            "faults/test_load.py::test_a_file_of_something_else",
            "faults/test_load.py::test_a_git_lfs_pointer_is_called_so",
        ),
    ),
    Row(33, "one flipped bit", REFUSED, ("faults/test_load.py::test_a_flipped_bit_anywhere_among_the_values",)),
    Row(
        34,
        "another tool's file without digests",
        HOLDS,
        ("faults/test_load.py::test_a_file_without_a_digest_loads_and_is_not_called_verified",),
    ),
    Row(35, "keys missing", REFUSED, ("faults/test_load.py::test_tensors_that_do_not_fit",)),
    Row(36, "surplus keys", OURS, ("faults/test_load.py::test_tensors_that_do_not_fit",)),
    Row(37, "key of the base or of another adapter", OURS, ("faults/test_load.py::test_tensors_that_do_not_fit",)),
    Row(38, "shape mismatch, transposed", REFUSED, ("faults/test_load.py::test_tensors_that_do_not_fit",)),
    Row(
        39,
        "NaN or Inf in a tensor",
        REFUSED,
        (
            "faults/test_load.py::test_tensors_that_do_not_fit",
            "faults/test_load.py::test_values_that_are_not_finite_load_where_that_is_allowed",
        ),
    ),
    Row(
        40,
        "int, bool, complex; too large for half precision",
        REFUSED,
        (
            "faults/test_load.py::test_tensors_that_do_not_fit",
            "faults/test_load.py::test_a_number_too_large_for_half_precision",
        ),
    ),
    Row(41, "another base", OURS, ("faults/test_load.py::test_another_base",)),
    Row(42, "more or fewer layers, another vocabulary", REFUSED, ("faults/test_load.py::test_another_base",)),
    Row(
        43,
        "pickles, both formats",
        OURS,
        (
            "faults/test_load.py::test_no_pickle_runs_whatever_it_holds",
            "faults/test_load.py::test_a_program_of_random_changes_gives_tensors_or_an_error",
            "faults/test_load.py::test_bombs_are_refused_before_they_unfold",
            "faults/test_load.py::test_both_formats_and_nothing_that_says_which",
        ),
    ),
    Row(
        44,
        "path or link that leads out",
        REFUSED,
        (
            "faults/test_load.py::test_a_subfolder_that_leads_out",
            "faults/test_load.py::test_a_link_that_leads_out",
        ),
    ),
    Row(
        45,
        "too many tensors, shape bombs",
        REFUSED,
        (
            "faults/test_load.py::test_more_tensors_than_any_adapter_has_are_refused_from_the_header_alone",
            "faults/test_load.py::test_shapes_that_cannot_be",
        ),
    ),
    Row(
        46,
        "config disagrees with tensors or header",
        OURS,
        (
            "faults/test_load.py::test_a_config_that_disagrees_with_the_tensors",
            "faults/test_load.py::test_a_config_that_disagrees_with_what_the_file_was_saved_with",
        ),
    ),
    Row(
        47,
        "a load that fails at the k-th tensor",
        REFUSED,
        ("faults/test_load.py::test_a_load_that_fails_at_any_tensor_leaves_everything_and_a_retry_works",),
    ),
    Row(
        48,
        "file overwritten or cut while in use",
        HOLDS,
        ("faults/test_load.py::test_a_file_that_is_overwritten_or_cut_while_the_adapter_serves",),
    ),
    Row(
        49,
        "base with code of its own",
        REFUSED,
        ("faults/test_load.py::test_a_base_with_code_of_its_own_does_not_run_it",),
    ),
    Row(
        50,
        "unreadable file, FIFO, device, folder",
        REFUSED,
        (
            "faults/test_load.py::test_a_pipe_a_folder_or_a_device_in_place_of_a_file_is_not_waited_for",
            "faults/test_load.py::test_a_file_that_may_not_be_read",
        ),
    ),
    # G4: saving
    Row(51, "killed at any file operation of a save", HOLDS, ("faults/test_crash.py::test_killed_at_any_operation",)),
    Row(
        52,
        "ENOSPC, EIO at any file operation",
        HOLDS,
        (
            "faults/test_save.py::test_a_disk_that_fails_once_or_for_good",
            "faults/test_crash.py::test_a_disk_that_fails_at_any_operation",
        ),
    ),
    Row(
        53,
        "power loss",
        HOLDS,
        ("faults/test_crash.py::test_power_that_fails_at_any_operation_takes_only_what_was_not_synced",),
    ),
    Row(
        54,
        "value that JSON has not",
        REFUSED,
        ("faults/test_save.py::test_a_config_that_is_no_json_is_refused_before_any_write",),
    ),
    Row(
        55,
        "another adapter is there",
        OURS,
        ("faults/test_save.py::test_an_adapter_of_another_kind_for_another_base_is_not_replaced_in_silence",),
    ),
    Row(
        56,
        "two save to one folder",
        HOLDS,
        (
            "faults/test_save.py::test_two_who_save_to_one_folder_never_leave_a_mixture",
            "faults/test_save.py::test_two_who_save_at_once_leave_one_whole_adapter",
            "faults/test_lock.py::test_who_comes_second_waits_for_the_first_to_end",
            "faults/test_lock.py::test_processes_that_save_adapters_at_once_leave_config_and_tensors_of_one",
            "faults/test_lock.py::test_a_dead_saver_holds_nobody_up",
            "faults/test_lock.py::test_one_that_does_not_end_is_named_and_nothing_is_written",
        ),
    ),
    Row(
        57,
        "NaN weights at save",
        REFUSED,
        ("faults/test_save.py::test_weights_that_are_not_finite_do_not_replace_good_ones",),
    ),
    Row(
        58,
        "user's files in the folder",
        HOLDS,
        ("faults/test_save.py::test_a_users_files_are_untouched_and_have_no_influence",),
    ),
    Row(
        59,
        "empty or unknown selection",
        REFUSED,
        ("faults/test_save.py::test_a_selection_of_nothing_or_of_what_is_not_there",),
    ),
    Row(
        60,
        "read-only folder, file in the way",
        REFUSED,
        (
            "faults/test_save.py::test_a_file_in_the_way",
            "faults/test_save.py::test_a_folder_that_may_not_be_written",
        ),
    ),
    Row(61, "modes, umask, links", HOLDS, ("faults/test_save.py::test_modes_follow_the_umask_and_links_stay_links",)),
    Row(
        62,
        "stale files of other formats and adapters",
        HOLDS,
        (
            "faults/test_save.py::test_a_file_of_the_other_format_goes_with_the_save_that_makes_it_stale",
            "faults/test_save.py::test_a_stop_at_any_step_of_such_a_save_leaves_the_old_adapter_or_the_new",
        ),
    ),
    # G5: merging
    Row(
        63,
        "NaN, Inf or overflow in the k-th layer of a merge",
        REFUSED,
        (
            "faults/test_merge.py::test_a_value_that_is_not_finite_in_any_layer_stops_the_merge_before_the_first",
            "faults/test_merge.py::test_an_update_that_half_precision_cannot_hold",
            "faults/test_merge.py::test_a_failure_at_any_layer_leaves_all_as_they_were",
            "faults/test_merge.py::test_experts_in_one_parameter_too",
        ),
    ),
    Row(
        64,
        "merge twice, unknown adapter, empty list",
        OURS,
        (
            "faults/test_merge.py::test_merging_twice_nothing_or_what_is_not_there",
            "faults/test_merge.py::test_merging_some_of_the_active_adapters_leaves_the_others_acting",
        ),
    ),
    Row(
        65,
        "unmerge",
        HOLDS,
        (
            "faults/test_merge.py::test_fifty_merges_leave_no_trace",
            "faults/test_merge.py::test_a_model_that_is_cast_or_moved_while_merged_comes_back_as_that",
            "laws/test_merge.py::test_in_half_precision_too",
        ),
    ),
    Row(
        66,
        "merge into low precision loses the change",
        HOLDS,
        (
            "faults/test_merge.py::test_what_rounding_loses_is_told_or_refused",
            "bases/test_packed.py::test_merging_packs_again_says_what_that_lost_and_unmerging_is_exact",
        ),
    ),
    Row(
        67,
        "load, replace, train, delete while merged",
        OURS,
        (
            "faults/test_merge.py::test_what_would_make_merged_weights_stale_is_refused",
            "faults/test_merge.py::test_an_optimizer_step_on_what_is_merged_is_told_and_leaves_the_base",
        ),
    ),
    Row(
        68,
        "merge of bias without bias, tied weights, quantised base",
        REFUSED,
        (
            "faults/test_merge.py::test_a_bias_that_a_layer_has_no_room_for",
            "faults/test_merge.py::test_a_tied_embedding_parts_from_its_head_and_both_are_right",
            "bases/test_packed.py::test_merging_packs_again_says_what_that_lost_and_unmerging_is_exact",
        ),
    ),
    Row(
        69,
        "combine: NaN weights, other count, name exists, other ranks",
        REFUSED,
        ("faults/test_merge.py::test_combinations_that_cannot_be",),
    ),
    Row(
        70,
        "memory, kill, full disk during a merge that is saved",
        HOLDS,
        (
            "ship/test_place.py::test_killed_at_any_operation_it_is_whole_or_absent",
            "ship/test_place.py::test_all_is_on_the_disk_before_it_has_its_name",
            "ship/test_place.py::test_a_disk_that_fails_at_any_operation",
            "ship/test_place.py::test_a_disk_that_fills_while_the_merged_model_is_written",
            "ship/test_place.py::test_memory_that_runs_out_while_the_merged_model_is_proven",
            "faults/test_crash.py::test_a_merged_model_that_cannot_be_saved_leaves_its_input",
        ),
    ),
    # G6: training and resuming
    Row(
        71,
        "killed at any file operation of a checkpoint, at random instants",
        HOLDS,
        (
            "train/test_checkpoint.py::test_death_at_any_operation_leaves_the_old_or_the_new_checkpoint",
            "train/test_resume.py::test_a_run_killed_at_random_moments_ends_in_the_same_bits",
            "train/test_faults.py::test_many_kills_end_in_the_same_bits",
        ),
    ),
    Row(
        72,
        "disk full while checkpointing",
        HOLDS,
        (
            "train/test_checkpoint.py::test_a_full_disk_leaves_the_previous_checkpoint_and_says_so",
            "train/test_faults.py::test_a_disk_that_fails_at_any_operation_leaves_a_whole_checkpoint",
        ),
    ),
    Row(
        73,
        "SIGINT and SIGTERM",
        HOLDS,
        (
            "train/test_loop.py::test_a_signal_ends_the_run_after_the_step_with_a_checkpoint",
            "train/test_loop.py::test_a_signal_during_an_evaluation_does_not_lose_it",
            "train/test_faults.py::test_the_command_ends_with_the_code_of_the_signal_and_a_checkpoint",
            "train/test_faults.py::test_a_second_signal_ends_at_once",
        ),
    ),
    Row(
        74,
        "file of a checkpoint missing, cut, changed",
        HOLDS,
        (
            "train/test_resume.py::test_a_torn_checkpoint_is_passed_over_and_told",
            "train/test_resume.py::test_resuming_is_refused_when_no_checkpoint_is_whole",
            "train/test_checkpoint.py::test_a_broken_manifest_is_told",
        ),
    ),
    Row(
        75,
        "resumed under other conditions",
        REFUSED,
        (
            "train/test_resume.py::test_changed_settings_are_refused_by_name",
            "train/test_resume.py::test_changed_data_is_refused_and_moved_data_is_not",
            "train/test_resume.py::test_another_base_is_refused",
            "train/test_resume.py::test_a_change_can_be_allowed_by_name",
        ),
    ),
    Row(
        76,
        "pickle in a checkpoint",
        REFUSED,
        (
            "train/test_resume.py::test_no_pickle_is_written",
            "train/test_faults.py::test_a_pickle_in_a_checkpoint_is_never_opened",
        ),
    ),
    Row(
        77,
        "loss or gradient not finite",
        REFUSED,
        (
            "train/test_loop.py::test_numbers_that_are_not_finite_stop_the_run_at_that_step",
            "cli/test_refusals.py::test_every_deliberate_error_has_a_code",
        ),
    ),
    Row(
        78,
        "data empty, malformed, without labels",
        REFUSED,
        (
            "faults/test_data.py::test_a_file_that_cannot_be_trained_on_is_refused_before_a_model_is_loaded",
            "faults/test_data.py::test_what_only_tokens_can_tell_is_refused_before_the_first_step",
            "faults/test_data.py::test_answers_that_are_all_cut_away_are_refused_and_some_are_counted",
            "cli/test_refusals.py::test_bad_data_file_is_told_by_file_line_and_field",
            "cli/test_refusals.py::test_unlabelled_row_of_a_classifier",
            "train/test_loop.py::test_bad_data_is_refused_before_the_model_is_looked_for_and_leaves_nothing",
        ),
    ),
    Row(
        79,
        "memory runs out at step k",
        REFUSED,
        (
            "train/test_loop.py::test_memory_that_runs_out_is_told_with_what_to_lower",
            "cli/test_refusals.py::test_full_disk_and_memory_are_resources",
        ),
    ),
    Row(
        80,
        "settings out of range",
        REFUSED,
        (
            "train/test_settings.py::test_what_cannot_be_is_answered_in_one_line",
            "train/test_faults.py::test_numbers_that_no_run_can_have",
            "train/test_faults.py::test_fewer_steps_than_have_been_made",
        ),
    ),
    Row(
        81,
        "two runs in one folder",
        REFUSED,
        (
            "train/test_loop.py::test_two_runs_cannot_share_a_folder",
            "train/test_faults.py::test_a_lock_left_by_a_killed_run_is_no_lock",
        ),
    ),
    Row(
        82,
        "clock jumps, copied checkpoints",
        HOLDS,
        (
            "train/test_checkpoint.py::test_order_is_by_step_and_not_by_time",
            "train/test_checkpoint.py::test_folders_of_other_programs_are_neither_read_nor_removed",
        ),
    ),
    # G7: command line
    Row(
        83,
        "unknown command or flag, bad number",
        REFUSED,
        (
            "cli/test_refusals.py::test_no_settings_and_unknown_verbs_and_options",
            "cli/test_refusals.py::test_unknown_setting_is_answered_with_the_nearest",
            "cli/test_refusals.py::test_wrong_type_and_value_out_of_range_name_the_setting",
        ),
    ),
    Row(
        84,
        "output exists, is inside of the input, is the input",
        REFUSED,
        (
            "train/test_loop.py::test_the_folder_of_another_run_is_not_overwritten_unasked",
            "cli/test_train.py::test_a_finished_folder_is_not_overwritten_unasked",
        ),
    ),
    Row(
        85,
        "stdout closed, odd locale, path that is no UTF-8",
        HOLDS,
        (
            "cli/test_faults.py::test_a_reader_that_stops_early_gets_no_traceback",
            "cli/test_faults.py::test_odd_locales_and_paths",
        ),
    ),
    Row(
        86,
        "package or device missing",
        REFUSED,
        (
            "train/test_loop.py::test_a_device_that_is_not_there_is_told",
            "cli/test_faults.py::test_a_package_that_is_missing_is_named",
        ),
    ),
    Row(
        87,
        "crash inside",
        HOLDS,
        (
            "cli/test_refusals.py::test_a_fault_of_ours_is_one_line_unless_debug_is_asked_for",
            "cli/test_faults.py::test_random_arguments_end_in_a_code_and_one_line",
        ),
    ),
    # G8: serving
    Row(88, "bad requests", REFUSED, waits=9),
    Row(89, "unknown or path-like adapter in a request, numbers too large", REFUSED, waits=9),
    Row(
        90,
        "mixed calls from many threads",
        HOLDS,
        (
            "faults/test_threads.py::test_400_mixed_calls_of_8_threads",
            "faults/test_threads.py::test_mixed_calls_of_every_seam",
            "faults/test_threads.py::test_mixtures_of_experts_in_threads",
            "faults/test_threads.py::test_generation_in_threads",
            "faults/test_threads.py::test_threads_that_train_different_adapters_get_their_own_gradients",
            "core/test_calls.py::test_tasks_of_one_thread_do_not_meet",
            "core/test_store.py::test_many_threads_get_exact_results",
        ),
    ),
    Row(
        91,
        "load, unload, replace under traffic",
        HOLDS,
        (
            "faults/test_threads.py::test_what_is_not_asked_for_comes_and_goes_under_traffic",
            "faults/test_threads.py::test_a_running_pass_ends_with_the_adapter_it_began_with",
            "faults/test_threads.py::test_merging_and_disabling_under_traffic",
            "faults/test_threads.py::test_changes_of_many_threads_neither_mix_nor_hang",
            "combine/test_hotswap.py::test_every_answer_under_traffic_is_of_one_adapter",
            "core/test_store.py::test_none_in_use_is_taken_off",
        ),
    ),
    Row(92, "slow clients, disconnects", HOLDS, waits=9),
]
