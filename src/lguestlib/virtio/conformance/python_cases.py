"""What CPython adds: rows Y1 to Y11, each by the tests of this library that watch over it."""

from lguestlib.virtio.conformance.case import Case, WatchedCase


def _row(row: str, title: str, *tests: str) -> WatchedCase:
    return WatchedCase((row,), title, "CPython", tuple(f"tests/{test}" for test in tests))


PYTHON_CASES: tuple[Case, ...] = (
    _row(
        "Y1", "live fields are never torn",
        "virtio/test_tearing.py::test_y1_no_value_is_read_that_was_never_written",
        "virtio/test_tearing.py::test_y1_struct_pack_into_would_be_caught",
        "test_layers.py::test_y1_pack_into_is_used_on_nothing_that_another_reads",
    ),
    _row(
        "Y2", "pointers and 64-bit integers reach ioctl whole",
        "abi/test_ioctl.py::test_an_integer_is_handed_over_as_it_is",
        "abi/test_ioctl.py::test_the_kernel_fills_in_what_it_is_given_the_address_of",
    ),
    _row(
        "Y3", "a call that blocks is interrupted",
        "abi/test_uio.py::test_y3_a_blocked_readv_is_interrupted",
        "abi/test_uio.py::test_y3_a_blocked_writev_is_interrupted",
        "abi/test_uio.py::test_y3_a_blocked_write_is_interrupted",
    ),
    _row(
        "Y4", "memory is unmapped when no view lives",
        "memory/test_region.py::test_y4_close_refuses_while_a_view_lives_and_succeeds_later",
    ),
    _row(
        "Y5", "received descriptors are close-on-exec",
        "runtime/test_vhost_user_stream.py::test_y5_descriptors_are_the_receivers_and_no_other_programs",
    ),
    _row(
        "Y6", "a thread slices views of its own",
        "memory/test_region.py::test_y6_every_view_is_its_own",
        "memory/test_guest.py::test_y6_threads_with_views_of_their_own_slice_at_the_same_time",
    ),
    _row(
        "Y7", "nothing is probed on the data path",
        "runtime/test_system_calls.py::test_a_thousand_pings_take_the_seeds_calls_and_no_others",
    ),
    _row("Y8", "nothing forks", "test_layers.py::test_y8_nothing_forks"),
    _row(
        "Y9", "the switch interval is put back",
        "runtime/test_launcher.py::test_the_switch_interval_is_set_while_it_runs_and_put_back",
    ),
    _row(
        "Y10", "a thread's failure is acted on",
        "runtime/test_queue_thread.py::test_y10_the_failure_is_told_on_the_thread_that_had_it_as_its_last_act",
    ),
    _row(
        "Y11", "signals end it and the terminal is restored",
        "cli/test_signals.py::test_a_signal_ends_it_with_128_and_its_number",
    ),
)
"""Every Y row."""
