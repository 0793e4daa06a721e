"""The report: HTML that parses and is self-contained, text escaped, PNG that decodes to the same pixels."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from rgdiff.runtime.report import Grid, Histogram, Plot, Report, Series, plot_rows, png, render, write_report

EVIL = '<script>alert("x")</script> & "q"'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Check that tags nest, and keep them and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def images(n: int, channels: int = 1, size: int = 8) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def full_report() -> Report:
    x = np.arange(20)
    return Report(
        title=EVIL, command="rgdiff " + EVIL, date="2025-01-02",
        versions={"jax": "1.2.3", "none": None},
        table={"prior": {"reward": -0.123456, "calls": 64},
               EVIL: {"reward": 0.5, EVIL: EVIL, "kl": float("nan")}},
        grids=[[Grid(EVIL, images(9), EVIL, rewards=[0.5, float("nan"), *range(7)]),
                Grid("b", images(4, 3))]],
        plots=[Plot(EVIL, [Series(EVIL, x, x**2, x**2 - 1, x**2 + 1),
                           Series("$x_1", x, x)]), Plot("none", [])],
        notes=[EVIL], config={"seed": 3, "name": EVIL},
    )  # fmt: skip


def decode(data: bytes) -> np.ndarray:
    """Decode a PNG of 8 bits without filters, by the specification, checking every CRC."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        chunks[kind] = body = data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        place += 12 + length
    width, height, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {0: 1, 2: 3, 6: 4}[color]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert depth == 8 and (rows[:, 0] == 0).all() and b"IEND" in chunks
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_decodes_to_the_same_pixels(channels):
    from matplotlib.image import imread

    image = np.random.default_rng(channels).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    assert (decode(png(image)) == image).all()
    seen = np.round(imread(io.BytesIO(png(image))) * 255).astype(np.uint8)  # Pillow's decoder, through matplotlib
    assert (seen.reshape(image.shape) == image).all()


def test_page_is_self_contained_and_parses(tmp_path):
    write_report(tmp_path / "report.html", full_report())
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", text))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value and value.startswith(("data:image/png;base64,", "#"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    drawn = [i for i in ids if re.match(r"[pmC]?[0-9a-f]{8,}", i or "")]
    assert drawn and len(drawn) == len(set(drawn))  # clip paths of two plots do not meet
    assert [tag for tag, _ in page.tags].count("svg") == 2 and "details" in dict(page.tags)
    for word in (
        "2025-01-02",
        "jax 1.2.3",
        "Resolved config",
        '"seed": 3',
        "rgdiff <script>",
        "−0.1235",
        "–",
    ):
        assert word in page.text
    assert "none None" not in page.text


def test_pictures_in_the_page_are_the_pictures():
    batch = images(5, 3)
    page = Page(render(Report("t", grids=[[Grid("g", batch, columns=5)]])))
    found = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(found) == 5
    for attributes, image in zip(found, batch, strict=True):
        assert (decode(base64.b64decode((attributes["src"] or "").split(",")[1])) == image).all()
        assert int(attributes["width"] or 0) % 8 == 0 and attributes["width"] == attributes["height"]


def cells(page_text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page_text)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_table_is_the_union_of_columns_with_dashes_for_what_is_missing():
    table = {
        "a": {"x": 1.23456, "n": 123456, "on": True},
        "b": {"y": np.float32(1e-7), "x": None, "on": False},
    }
    found = cells(render(Report("t", table=table)))
    assert found == [
        ["", "a", "b"],
        ["x", "1.235", "–"],
        ["n", "123456", "–"],
        ["on", "yes", "no"],
        ["y", "–", "1e−07"],
    ]


def test_plot_rows_skips_missing_and_other_phases():
    rows = [
        {"phase": "a", "step": 1, "r": 1.0},
        {"phase": "a", "step": 2, "r": None},
        {"phase": "b", "step": 3, "r": 3.0},
        {"phase": "a", "step": 4, "r": 4.0, "q": 0.0},
    ]
    plot = plot_rows(rows, ["r", "q", "absent"], title="t", phase="a")
    assert [(s.name, tuple(s.x), tuple(s.y)) for s in plot.series] == [
        ("r", (1, 4), (1.0, 4.0)),
        ("q", (4,), (0.0,)),
    ]
    assert tuple(plot_rows(rows, ["r"], title="t").series[0].x) == (1, 3, 4)
    assert "<svg" in render(Report("t", plots=[plot]))


def test_empty_report_has_no_empty_sections():
    page = Page(render(Report("t")))
    assert not {"table", "figure", "h2", "details", "footer", "pre"} & {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (Report("t", grids=[[Grid("g", images(2).astype(np.float32))]]), "float32 .*expected uint8"),
        (Report("t", grids=[[Grid("g", images(2)[0])]]), r"\(8, 8, 1\), expected uint8 \[N, H, W, C\]"),
        (Report("t", grids=[[Grid("g", images(2, 2))]]), "C in"),
        (Report("t", grids=[[Grid("g", images(2), rewards=[1.0])]]), "1 rewards for 2 images"),
        (Report("t", plots=[Plot("p", [Series("s", [1, 2], [1])])]), "has 2 x and 1 y"),
    ],
)
def test_wrong_shapes_are_refused(report, message):
    with pytest.raises(ValueError, match=message):
        render(report)


def test_histograms_of_several_samples_and_laws():
    """The legend has every name once, NaN is left out, and a law that does not fit is refused."""
    values = {"one": np.array([0.5, 0.5, 1.5, np.nan]), "two": np.array([1.5, 1.5])}
    laws = {"law": (np.array([0.5, 1.5]), np.array([0.25, 0.75])), "other": (np.array([0.5]), np.array([1.0]))}
    page = render(Report("r", plots=[Histogram("h", values, laws, "x0", np.array([0.0, 1.0, 2.0]))]))
    for name in ("one", "two", "law", "other", "x0"):
        assert page.count(f">{name}</text>") == 1
    with pytest.raises(ValueError, match="2 exact values with 1 probabilities"):
        render(Report("r", plots=[Histogram("h", values, {"law": ([0.5, 1.5], [1.0])})]))
