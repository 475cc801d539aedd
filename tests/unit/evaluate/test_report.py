import base64
import re
from html.parser import HTMLParser

import pytest

from pcd_ray.evaluate.report import Figure, Table, render_report

SCORES = Table(
    "Scores", ("", "untrained", "student", "teacher"), [("mIoU %", "12.5", "37.4", "50.0")]
)
CLASSES = Table(
    "By class", ("", "untrained", "student"), [("sky", "81.2", "n/a"), ("road", "9.9", "65.1")]
)


class _Page(HTMLParser):
    """Collects addresses and text, and checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _report(
    *, title: str = "A run", lead: str = "Lead.", notes: tuple[str, ...] = ("One seed.",)
) -> str:
    return render_report(
        title=title,
        lead=lead,
        tables=[SCORES, CLASSES],
        figures=[Figure(b"first", "curves"), Figure(b"second", "maps")],
        notes=notes,
        config_yaml="loss:\n  temperature: 0.2\n",
    )


def test_the_page_needs_nothing_but_itself() -> None:
    html = _report()
    page = _Page(html)
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import|<script|<link", html)
    assert page.open == []


def test_pictures_are_inside_byte_for_byte_and_in_order() -> None:
    data = [address.partition(",")[2] for address in _Page(_report()).addresses]
    assert [base64.b64decode(part) for part in data] == [b"first", b"second"]


def test_every_number_name_and_caption_is_on_the_page() -> None:
    text = _Page(_report()).text
    for table in (SCORES, CLASSES):
        for cell in (table.caption, *table.header, *(cell for row in table.rows for cell in row)):
            assert cell in text
    for word in ("A run", "Lead.", "One seed.", "curves", "maps", "temperature: 0.2"):
        assert word in text


def test_bars_are_as_long_as_their_numbers() -> None:
    widths = re.findall(r"width:([\d.]+)%\"", _report())
    assert widths == ["25.0", "74.8", "100.0"]


def test_the_untrained_are_grey_and_the_others_differ() -> None:
    rows = ("PCD", "untrained", "image", "mse", "teacher")
    table = Table("Side by side", ("", *rows), [("mIoU", "4", "1", "2", "3", "5")])
    hues = re.findall(
        r"bar c(\d)",
        render_report(title="T", lead="L", tables=[table], figures=[], notes=[], config_yaml=""),
    )
    assert hues == ["1", "0", "2", "3", "4"]


def test_words_and_nan_have_no_bar() -> None:
    table = Table("Scores", ("", "a", "b", "c"), [("mIoU %", "n/a", "nan", "5.0%")])
    html = render_report(title="", lead="", tables=[table], figures=[], notes=[], config_yaml="")
    assert re.findall(r"width:([\d.]+)%\"", html) == ["0.0", "0.0", "100.0"]


def test_markup_in_any_text_is_shown_not_obeyed() -> None:
    evil = "<script>alert('1')</script> & \"quoted\""
    row = [(evil, evil)]
    html = render_report(
        title=evil,
        lead=evil,
        tables=[Table(evil, (evil, evil), row), Table(evil, (evil, evil), row)],
        figures=[Figure(b"png", evil)],
        notes=[evil],
        config_yaml=evil,
    )
    page = _Page(html)
    assert "script" not in page.tags
    assert page.open == []
    # title twice, lead, each table's caption, header and row (a card leaves out the corner of the
    # header), figure's caption, note, configuration
    assert page.text.count(evil) == 2 + 1 + 4 + 5 + 1 + 1 + 1


def test_parts_that_are_not_given_are_left_out() -> None:
    html = render_report(title="A", lead="B", tables=[], figures=[], notes=[], config_yaml="")
    tags = _Page(html).tags
    assert not {"section", "figure", "details", "table"} & set(tags)


def test_a_row_of_another_length_than_the_header_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'Scores': row \['mIoU', '1'\] has 2 cells, the header 3"
    ):
        Table("Scores", ("", "a", "b"), [("mIoU", "1")])
