"""What may differ between a stored run and the one that resumes it."""

from pcd_ray.config.schema import Config, option_names, option_value

MAY_CHANGE_ON_RESUME = (
    "run",
    "data.sources",
    "data.shards",
    "data.max_bad_fraction",
    "data.max_pixels",
    "data.max_decode_s",
    "data.shard_mib",
    "data.images_per_task",
    "data.prefetch_batches",
    "data.cpus_per_task",
    "data.node_labels",
    "loss.implementation",
    "teacher.weights",
    "teacher.cache.path",
    "teacher_2.weights",
    "teacher_2.cache.path",
    "train.num_workers",
    "train.accumulation_steps",
    "train.device",
    "train.cpus_per_worker",
    "train.threads_per_worker",
    "train.node_labels",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_minutes",
    "train.keep_last",
    "train.keep_best",
    "train.keep_best_by",
    "train.max_failures",
    "train.max_preemptions",
    "train.start_timeout_s",
    "train.resize_check_s",
    "eval",
    "export",
    "tune",
    "scale",
)
"""Options that a resumed run may set anew. ``data.shards`` and teachers' ``weights`` are places:
what lies there is compared by content hash instead. ``run.seed`` matters and is compared."""


def changed_options(old: Config, new: Config) -> list[str]:
    """Return a line for each option that matters and differs, ``name: old -> new``."""
    lines, one_sided = [], set()
    for section in ("teacher_2",):  # not every run has it
        given = [getattr(config, section) is not None for config in (old, new)]
        if given[0] != given[1]:
            words = ["given" if each else "none" for each in given]
            lines.append(f"{section}: {words[0]} -> {words[1]}")
            one_sided.add(section)
    for name in option_names():
        if name.partition(".")[0] in one_sided:
            continue
        harmless = name.startswith(tuple(f"{key}." for key in MAY_CHANGE_ON_RESUME))
        if (harmless or name in MAY_CHANGE_ON_RESUME) and name != "run.seed":
            continue
        before, after = option_value(old, name), option_value(new, name)
        if before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
