"""The report as files: a page that stands alone, the same bytes each time, and one line for what cannot be."""

import dataclasses
import html.parser
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from hetmoe import cli
from hetmoe.errors import InputError
from hetmoe.report.build import build_report
from hetmoe.report.facts import failure_facts, progress, provenance_facts
from hetmoe.sweep.store import Failure

HOSTILE = "<script>alert('x')</script>\"&$x_1$"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Elements with their attributes; nesting is checked."""

    def __init__(self, text) -> None:
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def files(synthetic):
    """An unfinished sweep of a model with a hostile name and rules with hostile names."""
    record = synthetic.make_record(
        name=HOSTILE,
        rules=("_" + HOSTILE, "random"),
        fractions=(0.25,),
        scales=(0.0, 5.0),
        seeds=2,
        layers=2,
        experts=4,
    )
    provenance = {"command": ["hetmoe", HOSTILE], HOSTILE: HOSTILE}
    results = [dataclasses.replace(r, provenance=provenance) for r in record.results[:-1]]
    return build_report(dataclasses.replace(record, results=results))


@pytest.fixture(scope="module")
def page(files):
    return Page(files["index.html"].decode())


def test_the_page_stands_alone(files, page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            # Names of namespaces are never fetched; base64 may hold slashes.
            if name.startswith("xmlns") or (value or "").startswith("data:image/png;base64,"):
                continue
            assert "//" not in (value or ""), (tag, name, value)
    style = files["index.html"].decode()
    assert "@import" not in style and not re.search(r"url\((?!#)", style)


def test_ids_are_unique_and_links_resolve(files, page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [v for _, a in page.elements for n, v in a.items() if n in ("href", "xlink:href")]
    links += [f"#{m}" for _, a in page.elements for v in a.values() for m in re.findall(r"url\(#([^)]+)\)", v or "")]
    assert len(links) > 20
    for link in links:
        assert link.startswith("data:") or (link[1:] in ids if link.startswith("#") else link in files), link


def test_figures_are_described_and_headings_in_order(page) -> None:
    pictures = [a for tag, a in page.elements if tag == "svg"]
    assert len(pictures) == 5 and all(len(a["aria-label"]) > 50 and a["role"] == "img" for a in pictures)
    assert sum(tag == "figcaption" for tag, _ in page.elements) == 5
    tables = [tag for tag, _ in page.elements if tag in ("table", "caption")]
    assert tables.count("caption") > 5
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_names_are_shown_as_they_are_and_an_unfinished_sweep_says_so(page) -> None:
    text = "".join(page.text)
    assert text.count(HOSTILE) > 5
    assert "unfinished: 13 of 14 points" in text


def test_files(files) -> None:
    names = {name.rsplit(".", 1)[0] for name in files if name.endswith(".svg")}
    assert names == {n.rsplit(".", 1)[0] for n in files if n.endswith(".png")} and len(names) == 5
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in files)
    for name in names:
        with Image.open(io.BytesIO(files[f"{name}.png"])) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).min() < 30


def test_the_same_sweep_gives_the_same_bytes(synthetic) -> None:
    record = synthetic.make_record(rules=("router_norm",), fractions=(0.5,), scales=(1.0,), seeds=2, accuracy=False)
    shuffled = dataclasses.replace(record, results=record.results[::-1])
    assert build_report(record) == build_report(shuffled)


def test_progress_and_provenance(synthetic) -> None:
    record = synthetic.make_record(scales=(1.0,), seeds=7)
    assert progress(record) == f"complete: all {record.points} points of the grid are done"
    facts = dict(provenance_facts(record))
    assert facts["command"] == "hetmoe sweep rules.toml" and facts["versions jax"] == "0.10.2"
    assert facts["ended_utc"] == "2026-11-22T10:00:30+00:00 to 2026-11-22T10:06:30+00:00"
    assert facts["code: digest"] == "feedbeef"
    assert facts["key_words"] == "0, 7; 1, 7; 2, 7; 3, 7; 4, 7 and 2 more"


def test_failed_points_are_counted_and_listed(synthetic) -> None:
    record = synthetic.make_record(rules=(), scales=(1.0,), seeds=3)
    points = [r.point for r in record.results if r.point.placement == "all_analog"]
    failures = [Failure(point=point, error=HOSTILE) for point in points]
    left = [r for r in record.results if r.point not in points]
    record = dataclasses.replace(record, results=left, failures=failures)
    files = build_report(record)
    page = Page(files["index.html"].decode())
    text = "".join(page.text)
    assert f"complete: all {record.points} points of the grid are done; 3 points failed" in text
    assert "all_analog on pcm, c = 1, 8 bits, seeds 0, 1, 2" in text and HOSTILE in text
    assert ("p", {"class": "status unfinished"}) in page.elements
    rows = files["failed.csv"].decode().splitlines()
    assert len(rows) == 4 and rows[1].startswith("pcm,programmed,8,1.0,all_analog,,0,")
    many = [Failure(point=dataclasses.replace(points[0], bits=b), error="x") for b in range(25)]
    facts = failure_facts(dataclasses.replace(record, failures=many))
    assert len(facts) == 21 and facts[-1] == ("and 5 more", "see failed.csv")
    with pytest.raises(InputError, match=r"gave a number \(25 of 7 failed\): all_analog on pcm.*: x"):
        build_report(dataclasses.replace(record, results=[], failures=many))


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["hetmoe", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def stored(monkeypatch, record) -> None:
    monkeypatch.setattr("hetmoe.commands.report.read_sweep", lambda _: record)


def test_command_writes_beside_the_store_or_elsewhere(run, synthetic, tmp_path, monkeypatch) -> None:
    record = synthetic.make_record(rules=(), scales=(1.0,), seeds=1)
    stored(monkeypatch, record)
    monkeypatch.setattr("hetmoe.commands.report.build_report", lambda _: {"index.html": b"page", "means.csv": b"1"})
    for arguments, folder in (((tmp_path,), tmp_path / "report"), ((tmp_path, "-o", tmp_path / "o"), tmp_path / "o")):
        code, out, err = run(*arguments)
        assert code == 0, err
        assert sorted(p.name for p in folder.iterdir()) == ["index.html", "means.csv"]
        assert "complete: all 3 points" in out and "index.html" in out


def test_bad_input_is_one_line(run, synthetic, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    record = synthetic.make_record(scales=(1.0,))
    code, _, err = run(tmp_path / "absent")
    assert code == 2 and len(err.strip().splitlines()) == 1 and "absent" in err
    stored(monkeypatch, record)
    for arguments in ((tmp_path, "-o", tmp_path / "file"), (tmp_path, "-o", tmp_path / "file" / "deeper")):
        code, _, err = run(*arguments)
        assert code == 2 and len(err.strip().splitlines()) == 1 and "file" in err and "not a directory" in err
    stored(monkeypatch, dataclasses.replace(record, results=[], points=33))
    code, _, err = run(tmp_path)
    assert code == 2 and "no finished point yet (0 of 33)" in err and len(err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
