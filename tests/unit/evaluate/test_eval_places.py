"""Where pages and parts lie."""

from pathlib import Path

from tiny import tiny_config

from pcd_ray.evaluate.eval_places import out_folder, page_name, parts_folder


def test_pages_lie_in_the_first_run_or_beside_all_runs(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)})
    assert out_folder("untrained", config) == f"{tmp_path}/eval"
    step = tmp_path / "mine" / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    for spec in (str(tmp_path / "mine"), str(step)):
        assert out_folder(spec, config) == f"{tmp_path}/mine/eval"
    named = tiny_config(eval={"out": f"{tmp_path}/else"})
    assert out_folder(f"{tmp_path}/mine", named) == f"{tmp_path}/else"


def test_parts_lie_in_one_place_whichever_run_comes_first(tmp_path: Path) -> None:
    config = tiny_config(run={"root": str(tmp_path)})
    elsewhere = tiny_config(run={"root": "runs"})  # seen from another folder
    for name in ("one", "other"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    found = {parts_folder(f"{tmp_path}/{name}", elsewhere) for name in ("one", "other")}
    assert found == {parts_folder("untrained", config)} == {f"{tmp_path}/eval/parts"}
    named = tiny_config(eval={"out": f"{tmp_path}/else"})
    assert parts_folder(f"{tmp_path}/one", named) == f"{tmp_path}/else/parts"


def test_a_page_is_of_one_protocol_and_says_of_which_set() -> None:
    probe = page_name("segment", "probe", {"eval.segmentation": "data/cam vid/"}, "0123456789")
    assert probe == "segment-probe-cam_vid-01234567"
    assert page_name("segment", "fcn", {"eval.segmentation": "data/camvid"}, "0123456789") != probe
    halves = {"eval.knn_train": "photos/train", "eval.knn_test": "photos/val"}
    assert page_name("knn", "", halves, "0123456789") == "knn-photos-01234567"
