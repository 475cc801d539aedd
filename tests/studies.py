"""The study of a sweep, begun or as it was left: what the first lines of a sweep do."""

from pcd_ray.checkpoint import RunFolder
from pcd_ray.config import Config
from pcd_ray.tune.space import open_space
from pcd_ray.tune.study import OpenStudy, begin_study, find_study, new_study, story_of


def opened_study(config: Config, *, data_sha256: str = "a" * 64) -> OpenStudy:
    """Return it; ``data_sha256`` is the hash of the packed images."""
    space, folder = open_space(config), RunFolder.of(config)
    story = story_of(config, space, data_sha256=data_sha256)
    opened = find_study(config, folder, story) or new_study(config, folder)
    begin_study(opened, config, space, story)
    return opened
