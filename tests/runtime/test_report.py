"""The report: HTML that parses and is self-contained, text escaped, PNG that decodes to the same pixels; what the page opens with."""

from __future__ import annotations

import base64
import io
import re
import struct
import types
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from rgdiff.domains.drawing import Logo, Plane, bars, cloud
from rgdiff.recipes import pages
from rgdiff.recipes.typing import Outcome
from rgdiff.runtime.report import (
    Boxes,
    Card,
    Grid,
    Histogram,
    Plot,
    Report,
    Series,
    Whole,
    plot_rows,
    png,
    render,
    write_report,
)

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
    plane = Plane(cloud(np.zeros((3, 2)), (-1, 1, -1, 1)), (-1, 1, -1, 1), np.zeros((3, 2)), EVIL, EVIL)
    return Report(
        title=EVIL, command="rgdiff " + EVIL, date="2025-01-02", warnings=[EVIL],
        versions={"jax": "1.2.3", "none": None},
        table={"prior": {"reward_mean": -0.123456, "network_calls": 64},
               EVIL: {"reward_mean": 0.5, EVIL: EVIL, "kl": float("nan"), "over_optimised": EVIL}},
        cards=[Card(EVIL, [[Grid(EVIL, images(9), [EVIL, "worst", *"abcdefg"], EVIL)], [Grid("b", images(4, 3))]],
                    [[Grid(EVIL, ["ACGT", EVIL], [EVIL])], [Grid("v", bars(np.eye(3), 1.0), [EVIL])]], EVIL),
               Card("sets", [[Whole(EVIL, plane, {EVIL: [0.0, 0.0], "away": [9.0, 0.0]})],
                             [Whole(EVIL, Logo("ACGT", np.full((3, 4), 0.25)))], [Whole("f", images(1, 3)[0])]])],
        words=[(EVIL, EVIL + " is here.")],
        plots=[Plot(EVIL, [Series(EVIL, x, x**2, x**2 - 1, x**2 + 1),
                           Series("$x_1", x, x)]), Boxes(EVIL, {EVIL: x, "none": [np.nan]}, EVIL, {EVIL: 3.0})],
        more=[Plot("none", [])], links={EVIL: "0/report.html"},
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
                assert value and (value.startswith(("data:image/png;base64,", "#")) or value == "0/report.html")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    drawn = [i for i in ids if re.match(r"[pmC]?[0-9a-f]{8,}", i or "")]
    assert drawn and len(drawn) == len(set(drawn))  # clip paths of two plots do not meet
    for link in (value for _, attributes in page.tags if (value := attributes.get("href") or "").startswith("#")):
        assert link[1:] in ids
    for word in (
        "2025-01-02",
        "jax 1.2.3",
        "resolved config",
        '"seed": 3',
        "rgdiff <script>",
        "−0.1235",
        "–",
        "nats",
        "per sample",
    ):
        assert word in page.text
    assert "none None" not in page.text


def test_pictures_in_the_page_are_the_pictures():
    batch = images(5, 3)
    page = Page(render(Report("t", cards=[Card("c", [[Grid("g", batch, columns=5)]])])))
    found = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(found) == 5
    for attributes, image in zip(found, batch, strict=True):
        assert (decode(base64.b64decode((attributes["src"] or "").split(",")[1])) == image).all()
        assert int(attributes["width"] or 0) % 8 == 0 and attributes["width"] == attributes["height"]


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8), (96, 96)), ((28, 28), (112, 112)), ((32, 96), (96, 288)), ((1000, 500), (256, 128))]
)
def test_a_sample_has_at_least_96_pixels_and_whole_ones(shape, size):
    page = Page(render(Report("t", cards=[Card("c", [[Grid("g", np.zeros((1, *shape, 1), np.uint8))]])])))
    (found,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (int(found["height"] or 0), int(found["width"] or 0)) == size


def tables_of(page_text: str) -> list[list[list[str]]]:
    """Every table's cells, tags left out."""
    out = []
    for body in re.findall(r"<div class=scroll><table>(.*?)</table>", page_text):
        rows = re.findall(r"<tr>(.*?)</tr>", body)
        out.append([[re.sub("<.*?>", " ", c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows])
    return out


def test_the_table_has_readable_names_units_and_dashes_for_what_is_missing():
    table = {
        "a": {"reward_mean": 1.23456, "network_calls": 123456, "my_own": True, "frechet": 12345.6},
        "b": {"kl": np.float32(1e-7), "reward_mean": None, "my_own": False},
    }
    page = render(Report("t", table=table))
    assert tables_of(page) == [
        [["", "reward"], ["a", "1.235"], ["b", "–"]],
        [["", "Fréchet distance", "path KL nats "], ["a", "12,346", "–"], ["b", "–", "1e−07"]],
        [["", "network calls per sample "], ["a", "123,456"], ["b", "–"]],
        [["", "my own"], ["a", "yes"], ["b", "no"]],
    ]
    for column in (
        "reward",
        "Fréchet distance",
        "path KL",
        "network calls",
    ):  # what it means: on the heading, and below
        assert re.search(rf'<th title="[^"]{{20,}}">{column}<', page) and f"<dt>{column}</dt>" in page


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
    assert not {"table", "figure", "h2", "details", "nav", "pre", "section"} & {tag for tag, _ in page.tags}


def one_grid(drawn, labels=()) -> Report:
    return Report("t", cards=[Card("c", [[Grid("g", drawn, labels)]])])


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (one_grid(images(2).astype(np.float32)), "float32 .*expected uint8"),
        (one_grid(images(2)[0]), r"\(8, 8, 1\), expected uint8 \[N, H, W, C\]"),
        (one_grid(images(2, 2)), "C in"),
        (one_grid(images(2), ["a", "b", "c"]), "3 labels for 2 samples"),
        (
            Report("t", cards=[Card("c", [[Whole("l", Logo("ACGT", np.ones((3, 2))))]])]),
            r"expected frequencies \[L, 4\]",
        ),
        (Report("t", plots=[Plot("p", [Series("s", [1, 2], [1])])]), "has 2 x and 1 y"),
    ],
)
def test_wrong_shapes_are_refused(report, message):
    with pytest.raises(ValueError, match=message):
        render(report)


def test_one_curve_has_a_legend_where_the_title_does_not_name_it():
    for name, shown in (("draft", True), ("loss", False)):
        page = render(Report("r", plots=[Plot("prior: training loss", [Series(name, [1, 2], [1, 2])], "step", "loss")]))
        assert ("<ul class=legend>" in page) == shown


@pytest.mark.parametrize("length", [8, 200])
def test_every_line_of_a_logo_names_its_axes(length):
    logo = Logo("ACGT", np.tile([0.7, 0.1, 0.1, 0.1], (length, 1)))
    page = render(Report("t", cards=[Card("c", [[Whole("l", logo)]])]))
    lines = page.count('role="img"')
    assert (lines > 1) == (length > 100)
    assert page.count(">bits</text>") == page.count(">position</text>") == lines


def test_histograms_of_several_samples_and_laws():
    """The legend has every name once, NaN is left out, and a law that does not fit is refused."""
    values = {"one": np.array([0.5, 0.5, 1.5, np.nan]), "two": np.array([1.5, 1.5])}
    laws = {"law": (np.array([0.5, 1.5]), np.array([0.25, 0.75])), "other": (np.array([0.5]), np.array([1.0]))}
    page = render(Report("r", plots=[Histogram("h", values, laws, "x0", np.array([0.0, 1.0, 2.0]))]))
    for name in ("one", "two", "law", "other"):
        assert page.count(f"</svg>{name}</li>") == 1
    assert page.count(">x0</text>") == 1
    with pytest.raises(ValueError, match="2 exact values with 1 probabilities"):
        render(Report("r", plots=[Histogram("h", values, {"law": ([0.5, 1.5], [1.0])})]))


def test_a_long_tail_does_not_hide_a_narrow_law():
    """Bins are over what most samples have, and the outer ones hold the rest: shares sum to 1."""
    from rgdiff.runtime.report.figures import _edges

    narrow = np.random.default_rng(0).normal(size=999)
    edges = _edges([np.append(narrow, -1e6)], 40)
    assert -6 < edges[0] and edges[-1] < 6 and len(edges) == 41
    np.testing.assert_array_equal(_edges([narrow], np.array([0.0, 1.0])), [0.0, 1.0])


@pytest.mark.parametrize(
    ("scores", "places"),
    [
        ([3.0, 1.0, 2.0], {"best": 0, "median": 2, "worst": 1}),
        ([np.nan, 1.0, 5.0, 4.0, -np.inf, 2.0], {"best": 2, "median": 5, "worst": 1}),
        ([1.0, 2.0], {"best": 1, "worst": 0}),
        ([np.nan, 2.0], {"the only one": 1}),
        ([np.nan], {}),
        (None, {}),
    ],
)
def test_best_median_and_worst(scores, places):
    assert pages.best_median_worst(scores) == places


def test_places_on_a_plane_are_where_the_points_are():
    """The middle of the plane is the middle of its frame, up is up, and what lies outside has no mark."""
    points = np.array([[0.0, 0.0], [3.0, 1.0], [30.0, 0.0]])
    extent = (-4.0, 4.0, -2.0, 2.0)
    marks = dict(zip(("best", "median", "worst"), points, strict=True))
    page = render(Report("t", cards=[Card("c", [[Whole("w", Plane(cloud(points, extent), extent, points), marks)]])]))
    places = re.findall(r"<circle cx=([\d.]+) cy=([\d.]+)", page)
    assert places == [("150.0", "150.0"), ("262.5", "75.0")] and ">worst<" not in page
    picture = cloud(points[1:2], extent, pixels=80)[..., 0]
    dark = np.argwhere(picture == 0)  # (2 - 1) / 4 of the height down, (3 + 4) / 8 of the width, 3 pixels wide
    assert dark.mean(0).tolist() == [19, 70] and np.ptp(dark, 0).tolist() == [2, 2] and len(dark) == 9
    many = np.repeat(points[1:2], 500, 0)
    assert np.argwhere(cloud(many, extent, pixels=80)[..., 0] == 0).tolist() == [[19, 70]]


def test_bars_are_as_high_as_the_coordinates():
    (text,) = bars(np.array([[0.5, -1.0, 7.0]]), 2.0)
    assert "M0 1v-0.250h.9v0.250z" in text and "M1 1v0.500h.9v-0.500z" in text and "M2 1v-1.000" in text
    assert 'viewBox="0 0 128 2"' in bars(np.ones((1, 1000)), 1.0)[0]


class FakeJudge:
    """A domain's judge that draws each kind of thing."""

    pictured = True

    def __init__(self, kind: str):
        self.kind = kind

    def references(self, task):
        return {"real": np.zeros((30, 8, 8, 1))} if self.kind != "parts" else {}

    def scores(self, x0, task):
        return (x0["a"] if self.kind == "parts" else x0).mean((1, 2, 3))

    def show_each(self, x0):
        kinds = {
            "pictures": lambda: np.clip(x0 + 128, 0, 255).astype(np.uint8),
            "prompts": lambda: np.tile(np.arange(len(x0), dtype=np.uint8)[:, None, None, None], (1, 600, 300, 3)),
            "letters": lambda: ["ACGT" * 50 for _ in x0],
            "svg": lambda: bars(x0, 3.0),
            "parts": lambda: bars(x0["b"], 3.0),
        }
        return kinds.get(self.kind, lambda: None)()

    def show_all(self, samples, task):
        if self.kind == "letters":
            return {key: Logo("ACGT", np.full((200, 4), 0.25)) for key in samples}
        if self.kind == "plane":
            extent = (-3.0, 3.0, -3.0, 3.0)
            points = {key: x0.reshape(len(x0), -1)[:, :2] for key, x0 in samples.items()}
            return {key: Plane(cloud(x, extent), extent, x, "x", "y") for key, x in points.items()}
        return {}

    def show_exact(self, outcome, task, prior):
        return {}

    def rows_of(self, count, task, prior):
        return {"a <cat>": range(0, count, 2), "a dog": range(1, count, 2)} if self.kind == "prompts" else {}

    def reward_law(self, outcome, task, prior):
        return None

    def histograms(self, outcomes, task, prior):
        return []

    def curves(self, rows):
        return {}

    def notes(self, task):
        return ["A note."]


def written(tmp_path, kind: str, methods: int, count: int, name: str = "method") -> str:
    """Write the page of a run that never was."""
    rng = np.random.default_rng(0)
    outcomes, rows = {}, {}
    for i, key in enumerate(["prior", *(f"{name}_{i}" for i in range(methods))]):
        x0 = rng.normal(size=(count, 8, 8, 1)).astype(np.float32)
        x0 = {"a": x0, "b": x0[..., 0]} if kind == "parts" else x0
        curves = {"reward, by step of tuning": (range(5), range(5)), "log Z": (range(5), range(5))} if i else {}
        outcomes[key] = Outcome(x0, 10, 1.0 * i, 2.0, 3.0, curves=curves)
        rows[key] = {
            "reward_mean": 1.0 * i,
            "reward_se": 0.01,
            "heldout_reward_mean": 0.5 * i,
            "kl": 1.0 * i,
            "network_calls": 10,
        }
    (tmp_path / "config.yaml").write_text("a: 1\n")
    folder = types.SimpleNamespace(path=tmp_path, versions={"jax": "1.0"})
    run = types.SimpleNamespace(folder=folder, log=types.SimpleNamespace(rows=[]))
    pages.write_pages(run, {"title": "T"}, ["a=1"], "steer", FakeJudge(kind), None, None, outcomes, rows, [])  # type: ignore[arg-type]
    return (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("kind", ["pictures", "letters", "svg", "parts", "plane", "nothing"])
@pytest.mark.first(3)
def test_the_page_opens_with_samples_then_words_then_figures(tmp_path, kind):
    text = written(tmp_path, kind, 2, 12)
    page = Page(text)
    assert "<code>rgdiff run steer a=1</code>" in text[: text.index("</header>")]  # what was chosen
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == (["Figures", "In words"] if kind == "nothing" else ["Samples", "In words", "Figures"])
    if kind != "nothing":
        cards = re.findall(r"<article class=card><h3>(.*?)</h3>(.*?)</article>", text)
        assert [title for title, _ in cards] == ["prior", "method_0", "method_1"]
        for title, body in cards[1:]:  # the prior beside the method, and of both the best, the median and the worst
            assert body.index("<b>prior</b>") < body.index(f"<b>{title}</b>")
            assert all(len(re.findall(rf">{name}\b", body)) == 2 for name in ("best", "median", "worst"))
    main = (
        text[: text.index("<details>")]
        if kind == "nothing"
        else text[text.index("id=figures") : text.index("<details>")]
    )
    assert main.count("<figure class=plot>") + main.count("<figure class=boxes>") <= pages.FIGURES
    for drawn in re.findall(r"<figure class=plot>.*?</figure>", text, re.DOTALL):
        assert len(re.findall(r'<g id="text_', drawn)) >= 2  # axes and their labels
    assert page.text.count("raised the mean reward") == 2
    for raw in ("reward_mean", "heldout_reward", "network_calls"):
        assert raw not in page.text


def test_prompts_are_rows_methods_columns_and_samples_stand_within_a_cell(tmp_path):
    """Large pictures are made small, and a cell's number is the mean of all its samples."""
    text = written(tmp_path, "prompts", 2, 12)
    Page(text)
    table = re.search(r'<article class="card compared">.*?</article>', text, re.DOTALL)[0]
    assert text.index(table) < text.index("<article class=card>")  # the page opens with it
    assert re.findall(r"<th>(.*?)</th>", table) == ["", "prior", "method_0", "method_1", "a &lt;cat&gt;", "a dog"]
    assert table.count("<td>") == 6 and table.count("<img") == 24 and 'alt="a dog: method_1"' in table
    scores = FakeJudge("prompts").scores(np.random.default_rng(0).normal(size=(12, 8, 8, 1)).astype(np.float32), None)
    said = float(re.findall(r"<span>(.*?)</span>", table)[1 * 3 + 0].replace("−", "-"))
    assert abs(said - scores[1::2].mean()) < 0.01
    first = base64.b64decode(re.findall(r"base64,([^\"]+)", table)[0])
    assert struct.unpack(">II", first[16:24]) == (60, 120)  # of 300 x 600, means of 5 x 5
    assert (
        pages.compared(
            FakeJudge("pictures"), None, None, {"prior": Outcome(np.zeros((4, 8, 8, 1)), 1, 0.0, 0.0, 0.0)}, {}
        )
        is None
    )


def test_thirty_methods_with_long_names_and_many_samples(tmp_path):
    text = written(tmp_path, "pictures", 30, 2000, "a_name_that_is_much_too_long_for_any_line_of_any_table" * 2)
    Page(text)
    assert text.count("<article") == 31 and len(text) < 1.5e6
    assert text.count("<figure class=boxes>") == 1 and text.count("<tr><th><span title=") == 30  # not thirty histograms


@pytest.mark.parametrize(
    ("title", "labels"),
    [
        ("reward, by step of tuning", ("step of tuning", "reward")),
        ("path KL to the prior, by queries", ("reward queries", "path KL to the prior, nats")),
        ("standard deviation of the noise by move, after training", ("move", "standard deviation of the noise")),
        ("energy of data while training", ("training iteration", "energy of data")),
        ("log Z", (pages.STEPS, "log Z so far, nats")),
        (
            "held-out variance of the reward explained, by t",
            pages.AXES["held-out variance of the reward explained, by t"],
        ),
        ("anything", ("step", "anything")),
    ],
)
def test_axes_are_labelled(title, labels):
    assert pages.axes(title) == labels
