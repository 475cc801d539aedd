"""The page of a comparison says every number, and asks the network for nothing."""

from pathlib import Path

from tiny import tiny_config

from pcd_ray.evaluate.comparison import compare
from pcd_ray.evaluate.eval_report import write_eval_report
from pcd_ray.evaluate.scores import Scores

PNG = b"\x89PNG\r\n\x1a\n"


def page_of(tmp_path: Path, rows: dict[str, list[Scores]], failures: dict[str, str]) -> str:
    uri = str(tmp_path / "report.html")
    write_eval_report(
        uri,
        title="Semantic segmentation",
        table=compare({label: scores for label, scores in rows.items() if scores}),
        rows=rows,
        sources=dict.fromkeys(rows, "somewhere <b>"),
        failures=failures,
        looks={"pca_maps.png": PNG},
        sets={"eval.segmentation": "scenes"},
        config=tiny_config(),
    )
    return Path(uri).read_text()


def test_every_number_is_there(tmp_path: Path) -> None:
    seeds = [
        Scores(values={"miou": value}, classes={"miou": {"road": 81.5, "sign": None, "car": 7.2}})
        for value in (40.1, 42.1)
    ]
    one = Scores(
        values={"miou": 30.3, "odd_metric": 3.3},
        intervals={"miou": (28.3, 33.3)},
        classes={"miou": {"road": 71.5, "sign": None, "car": None}},
        pictures={"masks.png": PNG},
        about={"seconds": 12.0},
    )
    page = page_of(tmp_path, {"PCD": seeds, "untrained": [one]}, {})
    half = 12.706  # t(1) x 1: the standard error of two values that are 2 apart
    for text in (f"41.1 +- {half:.1f}", "30.3 +- 2.5", "3.3", "81.5", "71.5", "7.2"):
        assert f">{text}<" in page, text
    assert ">sign<" not in page, "no network has it"
    assert "somewhere &lt;b&gt;" in page
    assert "untrained: masks" in page
    assert "over seeds" in page
    assert page.count("data:image/png") == 2
    assert "bootstrap" in page
    assert "http" not in page.replace("http-equiv", "")


def test_what_failed_is_told(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"PCD": []}, {"PCD, seed 0": "features: infinite"})
    assert "nothing judged" in page
    assert "Not judged: PCD, seed 0 (features: infinite)." in page
