"""The page of a comparison says every number and how it came about, without the network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from judged import drawn_network
from tiny import tiny_config

from pcd_ray.evaluate.comparison import compare
from pcd_ray.evaluate.eval_report import Page, write_eval_report
from pcd_ray.evaluate.scores import Scores
from pcd_ray.evaluate.students import Row

PNG = b"\x89PNG\r\n\x1a\n"


def page_of(
    tmp_path: Path,
    measured: dict[str, list[list[Scores]]],
    failures: dict[str, str],
    **page: Any,
) -> str:
    uri = str(tmp_path / "report.html")
    network = replace(drawn_network(), source="somewhere <b>", licence="CC-BY-NC-4.0")
    about = {
        "title": "Semantic segmentation, linear probe",
        "sets": {"eval.segmentation": "scenes"},
        "facts": {"crop_px": 513, "base_lrs": [0.1, 1.0], "flip": True},
        "notes": ["no pixel of val has class tree"],
        "fine_tuned": False,
    }
    write_eval_report(
        uri,
        Page(**(about | page)),
        table=compare(measured),
        measured=measured,
        rows=[
            Row(label, (network,) * len(each), ("",) * len(each))
            for label, each in measured.items()
        ],
        failures=failures,
        looks={"pca_maps.png": PNG},
        config=tiny_config(),
    )
    return Path(uri).read_text()


def test_every_number_is_there(tmp_path: Path) -> None:
    trainings = [
        [Scores(values={"miou": value}, classes={"miou": {"road": 81.5, "sign": None, "car": 7.2}})]
        for value in (40.1, 42.1)
    ]
    one = Scores(
        values={"miou": 30.3, "odd_metric": 3.3},
        intervals={"miou": (28.3, 33.3)},
        test_images={"miou": 1234},
        classes={"miou": {"road": 71.5, "sign": None, "car": None}},
        pictures={"segmentation.png": PNG},
        about={"seconds": 12.0, "base_lr": 0.3, "notes": ["the rate is at the edge"]},
    )
    page = page_of(tmp_path, {"PCD": [*trainings, []], "untrained": [[one]]}, {})
    half = 12.706  # t(1) x 1: the standard error of two values that are 2 apart
    for text in (f"41.1 +- {half:.1f}", "30.3 [28.3, 33.3]", "3.3", "81.5", "71.5", "7.2"):
        assert f">{text}<" in page, text
    for text in ("2 trainings, 1 of 3 trainings missing", "1,234 test images", "2 of 3"):
        assert f">{text}<" in page, text
    assert ">sign<" not in page, "no network has it"
    assert "somewhere &lt;b&gt;" in page
    assert ">CC-BY-NC-4.0<" in page
    assert "untrained. Validation images, their labels, and what is predicted." in page
    assert page.count("data:image/png") == 2
    assert "bootstrap" in page
    assert "http" not in page.replace("http-equiv", "")


def test_how_it_was_measured_is_told(tmp_path: Path) -> None:
    one = Scores(
        values={"miou": 30.3}, about={"base_lr": 0.3, "notes": ["the rate is at the edge"]}
    )
    page = page_of(tmp_path, {"A": [[one]], "B": [[one]]}, {})
    for cell in ("crop px", "513", "base lrs", "0.1, 1", "flip", "yes", "base lr", "0.3"):
        assert f"<td>{cell}</td>" in page, cell
    assert "<li>No pixel of val has class tree.</li>" in page
    assert page.count("<li>A: the rate is at the edge.</li>") == 1
    assert "frozen backbone alone" in page
    tuned = page_of(tmp_path, {"A": [[one]]}, {}, fine_tuned=True, title="FCN")
    assert "fine-tuned as a whole" in tuned
    assert "frozen backbone alone" not in tuned
    assert "<h1>FCN: A</h1>" in tuned


def test_what_failed_is_told(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"PCD": [[]]}, {"PCD (a), seed 0": "features: infinite"})
    assert "nothing judged" in page
    assert "Not judged or drawn: PCD (a), seed 0 (features: infinite)." in page
    assert ">0 of 1<" in page
