"""Ray Data's scheduling loop runs in the process that trains: it must not run hot."""

import time

from pcd_ray.data.ray_stream import _STEP_S, _Unhurried


def test_steps_of_the_scheduling_loop_are_kept_apart() -> None:
    pace = _Unhurried()
    pace.on_execution_step(None)
    started = time.monotonic()
    for _ in range(5):
        pace.on_execution_step(None)
    assert time.monotonic() - started >= 4.9 * _STEP_S


def test_a_loop_that_has_waited_already_waits_no_longer() -> None:
    pace = _Unhurried()
    pace._last_s = time.monotonic() - 1
    used = time.thread_time()
    started = time.monotonic()
    pace.on_execution_step(None)
    assert pace._last_s - started < _STEP_S
    assert time.thread_time() - used < _STEP_S
