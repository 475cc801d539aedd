"""Notices that machines will be taken away, as clouds give them of spot machines."""

import time

import ray.train

_LOOK_EVERY_S = 2.0  # notices come half a minute or more ahead; a look costs some milliseconds


class PreemptionNotices:
    """What Ray has been told of this run's machines; every rank asks at the same steps.

    Ray Train lets workers go on until their machine is taken, or its time is up, and then starts
    the group anew elsewhere: what is stored in between is all that is kept.
    """

    def __init__(self) -> None:
        self._every_steps = 1
        self._known: list[str] = []

    def pace(self, step_s: float) -> None:
        """Look about every two seconds; ``step_s`` is the mean over ranks, the same on all."""
        self._every_steps = max(1, round(_LOOK_EVERY_S / step_s))

    def new(self, step: int) -> str:
        """Return what is to come, in words, once for each set of machines; empty: nothing new.

        A collective at the steps at which it looks.
        """
        if step % self._every_steps:
            return ""
        info = ray.train.get_preemption_info()
        if info is None or info.preempted_node_ids == self._known:
            return ""
        self._known = info.preempted_node_ids
        ranks = ", ".join(map(str, info.preempted_ranks))
        when = ""
        if info.deadline_ms is not None:
            when = f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        return f"the machine of worker {ranks} will be taken away{when}"
