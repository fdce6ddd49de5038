"""The page as a browser reads it: whole, and without anything of a stranger's but text."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.report import gather, survey
from assay.report.charts import histogram
from assay.report.run import run_section
from tests.report.small_report import Column, make_scores
from tests.report.test_neighbours import keep
from tests.small_scores import make_scores as make_two

pytest.importorskip("matplotlib")

EVIL = (
    "<script>alert(1)</script></style></title><img src=x onerror=alert(2)>\"'><b onmouseover='x'>&lt;i&gt;<!-- "
    "javascript:x \x1b[2J\x00\x07 \u202ereversed\u202c \u2066isolated =HYPERLINK('http://evil.example') </pre></div>"
)
_ATTRIBUTES = "class id href content name http-equiv charset lang scope tabindex src alt"
DRAWN = {"svg", "g", "path", "defs", "clippath", "use", "text", "rect"}
_OURS = "html head meta title style body header main section nav ol ul li h1 h2 h3 h4 p a dl div dt dd article span "
_OURS += "table thead tbody tr th td details summary pre code img strong"


class Reader(HTMLParser):
    """Elements with their attributes, the text, and whether all that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(path) -> Reader:
    page = path.read_text(encoding="utf-8")
    found = Reader(page)
    assert found.open == []
    assert {name for name, _ in found.elements} <= DRAWN | set(_OURS.split())
    for name, attributes in found.elements:
        if name in DRAWN:
            assert not [key for key, value in attributes.items() if key.startswith("on") or "://" in value]
            continue
        assert attributes.keys() <= set(_ATTRIBUTES.split()), name
        assert re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", attributes.get("src", "data:image/jpeg;base64,A"))
        assert re.fullmatch(r"#[a-z0-9-]+", attributes.get("href", "#a"))
        assert re.fullmatch(r"[a-z0-9-]+", attributes.get("id", "a"))
        assert re.fullmatch(r"[a-z0-9 ]*", attributes.get("class", ""))
    (policy,) = (its["content"] for its in found.of("meta") if "http-equiv" in its)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {its["href"][1:] for its in found.of("a")} <= set(ids)
    assert all(c.isprintable() or c in "\n\u2002" for c in page)
    assert not re.search(r"url\((?!#)|@import", page)
    return found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page of which everything that a stranger may choose is hostile."""
    root = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    texts = [EVIL, *("text " * 20 for _ in range(40)), "y" * 5000]
    count = len(texts)
    scores = {
        f"x{EVIL}": rng.normal(size=count),
        "$\\frac{a}{b}$": np.append(np.full(count - 1, 2.5), np.nan),
        "constant": np.ones(count),
        "nothing": np.full(count, np.nan),
        "heavy": np.exp(20 * rng.normal(size=count)),
    }
    scores[f"x{EVIL}"][0] = 9
    columns = [Column(name, "none" if name == "heavy" else "high", f"about {EVIL}") for name in scores]
    folder = make_scores(
        root,
        {"text": texts, "id": [f"{EVIL}{i}" for i in range(count)]},
        scores,
        columns=columns,
        quarantined=[(1, f"bad {EVIL} 17"), (2, f"bad {EVIL} 18"), (3, "empty")],
        recipe={"methods": [{"method": EVIL}], EVIL: [EVIL]},
        models={EVIL: f"sha256:{EVIL}"},
        name="a<b>&\u202e'.parquet",
    )
    assert main(["report", str(folder), "--out", str(root / "page.html")]) == 0
    return root / "page.html"


def test_a_strangers_text_is_text(hostile):
    page = read(hostile)
    assert not page.of("script")
    assert not page.of("b")
    assert page.text.count("<script>alert(1)</script></style></title><img src=x onerror=alert(2)>") > 20
    assert r"\x1b[2J\x00\x07 \u202ereversed\u202c \u2066isolated =HYPERLINK" in page.text
    assert len(page.of("svg")) == 3 - 1  # neither of what is constant nor of what is nothing


def test_the_page_says_what_was_counted(hostile):
    text = read(hostile).text
    assert "Of 42 rows 39 have scores and 3 are in quarantine" in text
    assert re.search(r"bad <script>.*? N2", text, re.DOTALL)
    assert "All 39 numbers are 1.0: this score tells no row from another." in text
    assert "There is no number to chart." in text
    assert "No number (NaN) for 1 row (2.56 %)" in text
    assert "Neither end is better" in text
    assert "… (5,000 characters)" in text
    assert "y" * 1300 not in text


def test_images_are_made_anew_and_labels_counted(tmp_path):
    image = pytest.importorskip("PIL.Image")
    written = io.BytesIO()
    image.fromarray(np.full((400, 800, 3), 99, np.uint8)).save(written, "JPEG", comment=b"a strangers words")
    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + size
    bomb += struct.pack(">I", zlib.crc32(b"IHDR" + size)) + b"\0\0\0\0IDAT"
    pictures = [written.getvalue(), bomb, b"<svg onload=alert(1)>", written.getvalue()]
    task = {"kind": "classification", "image_column": "image", "label_column": "label"}
    rows, scores = {"image": pictures, "label": [0, 1, 0, 1]}, {"x": np.arange(4), "e_prediction": [0, 1, 1, np.nan]}
    recipe = {"methods": [{"method": "ensemble", "name": "e"}]}
    folder = make_scores(tmp_path, rows, scores, task=task, recipe=recipe)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = read(tmp_path / "page.html")
    sources = {its["src"] for its in page.of("img")}
    assert len(page.of("img")) == 9  # of x the best, the worst and random ones, of e_prediction two, and the repeated
    assert "2 rows have the content of another one. Without the repeats there would be 1 row less (25 %)" in page.text
    assert "In 1 of 1 groups the same content has different labels: not all can be right." in page.text
    for source in sources:
        data = base64.b64decode(source.partition(",")[2])
        assert image.open(io.BytesIO(data)).size == (192, 96)
        assert b"strangers" not in data
    assert "image is 100,000 × 100,000 pixels" in page.text
    assert "image is no image that is read here" in page.text
    assert "all 4 rows, of which 3 have a label and a prediction (e_prediction). In 2 of them (66.7 %)" in page.text


@pytest.mark.parametrize("rows", [0, 1])
def test_hardly_a_row(tmp_path, rows):
    folder = make_scores(tmp_path, {"text": ["a"] * rows}, {"x": np.ones(rows), "y": np.zeros(rows)})
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = read(tmp_path / "page.html")
    assert f"Of {rows} rows {rows} have scores" in page.text


def test_where_the_page_may_go(tmp_path, capsys):
    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"x": [1, 2]})
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>\n<html>mine</html>")
    (tmp_path / "link.html").symlink_to(tmp_path / "notes.html")
    (tmp_path / "sub").symlink_to(folder)
    refused = {
        "notes.html": "is no report of assay",
        "link.html": "is no report of assay",
        "data/page.html": "must not lie in each other",
        "data/a.parquet": "must not lie in each other",
        "scores/page.html": "lies among the scores",
        "sub/page.html": "lies among the scores",
        "data": "is a folder",
        "new/": "is a folder",
    }
    for name, message in refused.items():
        assert main(["report", str(folder), "--out", f"{tmp_path}/{name}"]) == 2, name
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "notes.html").read_text().endswith("mine</html>")
    assert sorted(p.name for p in folder.iterdir()) == ["a.parquet", "manifest.json"]
    for _ in range(2):
        assert main(["report", str(folder), "--out", f"{tmp_path}/new/page.html", "--samples", "0"]) == 0
    read(tmp_path / "new/page.html")


def test_shards_that_are_left_out_are_named(tmp_path, capsys):
    folder = make_two(tmp_path, {"a": {"x": np.arange(3.0)}, "b": {"x": np.arange(4.0)}})
    os.utime(tmp_path / "data/b.parquet")
    assert main(["report", folder, "--out", str(tmp_path / "page.html")]) == 1
    error = capsys.readouterr().err
    assert error == "assay: 1 shards are not in it (b.parquet: the file has changed since it was scored)\n"
    page = read(tmp_path / "page.html")
    assert "1 of 2 shards are not on this page" in page.text
    assert "Of 3 rows 3 have scores" in page.text
    assert "its task is none of this version of assay" in page.text  # whose columns would be shown


def test_how_the_run_went(tmp_path):
    rows = {name: {"x": np.arange(100.0)} for name in "abcd"}
    folder = make_two(tmp_path, rows, without={"b": range(7), "c": [3]})

    def text(began, *times):
        for name, time in zip(("manifest.json", *(f"{name}.parquet" for name in "abcd")), (began, *times), strict=True):
            os.utime(f"{folder}/{name}", (time, time))
        return Reader(run_section(gather(open_scores(folder)))).text

    found = text(900, 1000, 1100, 1200, 1700)
    assert "400 rows in 13 min 20 s since the run began: 0.5 rows per second, all workers together." in found
    assert "The longest time between two tables was 8 min 20 s." in found
    assert "minutes since the run began" in found
    assert "8 rows of 400 (2 %) in quarantine" in found
    assert re.search(r"shards with most of them.*b\.parquet71007 %c\.parquet11001 %", found)
    found = text(99_999, 1000, 1100, 1200, 1700)  # a copy's
    assert "300 rows in 11 min 40 s since the first table was written: 0.43 rows per second" in found
    assert "do not tell how fast the run was" in text(99_999, 1000, 1000, 1000, 1000)


def test_the_course_of_many_tables_stays_small():
    written = [(float(i), 10) for i in range(100_000)]
    facts = SimpleNamespace(written=written, began=None, quarantined=0, warnings=[], rows=1, reasons=[])
    page = run_section(facts)
    assert len(page) < 60_000
    assert "999,990 rows in 1 d 3 h since the first table was written: 10 rows per second" in page


def test_methods_warnings_are_told(tmp_path, monkeypatch):
    folder = make_two(tmp_path, {"a": {"x": np.arange(3.0)}, "b": {"x": np.arange(3.0)}})
    monkeypatch.setattr("assay.report.facts.Tally.add", lambda self, footer: self.warnings.update(
        {"mimic.warning": f"agrees with the loss {EVIL}", "trak.left_out_layers": "wte, ln"}
    ))  # fmt: skip
    assert main(["report", folder, "--out", str(tmp_path / "page.html"), "--samples", "0"]) == 0
    text = read(tmp_path / "page.html").text
    assert "mimic: agrees with the loss <script>" in text
    assert "trak leaves out wte, ln2" in text  # in two shards


def test_kinds_of_rows(tmp_path):
    rng = np.random.default_rng(0)
    source = rng.choice(["web", "book", EVIL[:150]], 300, p=[0.5, 0.45, 0.05]).tolist()
    x = rng.normal(size=300) + 3 * (np.array(source) == "book")
    source[0] = None
    folder = make_scores(
        tmp_path, {"text": ["t"] * 300, "source": source, "id": range(300)}, {"x": x, "c": np.ones(300)}
    )
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--samples", "0"]) == 0
    text = read(tmp_path / "page.html").text
    values = x.astype(np.float32)
    found = [100 * (values[i] > np.delete(values, i)).mean() for i in range(300) if source[i] == "book"]
    assert f"book{len(found)}{np.mean(found):.0f}" in text
    assert "(no value)1–" in text
    assert "Computed on all 300 rows." in text
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--group", "id", "--samples", "0"]) == 0
    assert "By id" in read(tmp_path / "page.html").text


def test_no_more_scores_than_can_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("assay.report.surveying.MOST_SCORES", 3)
    scores = {f"s{i}": np.arange(5.0) * (i + 1) for i in range(16)}
    folder = make_scores(tmp_path, {"text": list("abcde")}, scores)
    arguments = ["report", str(folder), "--out", str(tmp_path / "page.html"), "--samples", "0"]
    assert main(arguments) == 0
    page = read(tmp_path / "page.html")
    assert len(page.of("svg")) == 3
    assert "This page shows 3 of 16 scores. Not on it: s3, s4" in page.text
    assert "s14 and 1 more; assay report --by SCORE chooses which are." in page.text
    assert main([*arguments, "--by", "s15", "--by", "s2"]) == 0
    page = read(tmp_path / "page.html")
    assert len(page.of("svg")) == 2
    assert page.text.index("1  s15") < page.text.index("2  s2")
    assert main([*arguments, "--by", "nothing"]) == 2
    assert re.search("--by nothing: .* has no such score; it has s0, s1", capsys.readouterr().err)
    with pytest.raises(CorpusError, match="4 scores are asked for; expected at most 3"):
        survey(open_scores(str(folder)), only=["s1", "s2", "s3", "s4"])


def test_a_row_that_several_pairs_name(tmp_path):
    folder = make_two(tmp_path, {"a": {"x": np.arange(4.0)}})
    keep(folder, "trak", np.ones((4, 3), np.float32))
    assert main(["report", folder, "--out", str(tmp_path / "page.html"), "--samples", "0"]) == 0
    text = read(tmp_path / "page.html").text
    assert "Near by the features of trak" in text
    assert "0.99 or nearer4100 %" in text


def test_predictions_without_labels_say_why(tmp_path):
    recipe = {"methods": [{"method": "ensemble", "name": "e"}]}
    task = {"kind": "classification", "text_column": "text", "label_column": "label"}
    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"e_prediction": [0, 1]}, task=task, recipe=recipe)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), "--samples", "0"]) == 0
    text = read(tmp_path / "page.html").text
    assert "predictions cannot be compared with labels: a.parquet has no column label any more" in text


def test_without_its_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"x": [1, 2]})
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert "matplotlib is not installed; it comes with `pip install 'assay[report]'`" in capsys.readouterr().err


def test_settings_of_matplotlib_are_ours(tmp_path):
    import matplotlib

    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"x": [1, 2]})
    (its,) = survey(open_scores(str(folder))).distributions
    drawn = histogram(its, 1)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "savefig.facecolor": "red"}):
        assert histogram(its, 1) == drawn
    assert "url(#chart-1-" in drawn
    assert not re.search(r"#[0-9a-f]{6}\b", drawn), "a colour that is not the page's"


def test_misuse_is_one_line(tmp_path, capsys):
    folder = make_scores(tmp_path, {"text": ["a", "b"]}, {"x": [1, 2]})
    for arguments in (["--samples", "-1"], ["--samples", "101"], ["--seed", "-1"]):
        assert main(["report", str(folder), "--out", str(tmp_path / "page.html"), *arguments]) == 2
        assert f"{arguments[0]} {arguments[1]}: expected" in capsys.readouterr().err
    (tmp_path / "data/a.parquet").unlink()
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert not (tmp_path / "page.html").exists()
