"""The report: complete, self-contained, safe against its own contents, and all or nothing."""

import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from fewstep import ArtifactError, TimeGrid, methods, tabulate
from fewstep.evaluation import Estimate, Report, Row, compare
from fewstep.report import to_console, write_report
from fewstep.report.frontier import series
from fewstep.report.pictures import kind, strips
from fewstep.report.samples import samples_figure
from fewstep.report.style import png, style, svg
from fewstep.report.view import best_rows, facts, headline, row_of, summary

HOSTILE = "<script>alert(1)</script> & \"q\" 'a' $\\frac$ |pipe| [red]x[/red] \x1b[31m\nnew 漢字 https://evil.example/x.js"


def field(x, t):
    return x.cos() - x


def estimate(value: float) -> Estimate:
    return Estimate(value, 0.9 * value, 1.1 * value)


@pytest.fixture(scope="module")
def samplers():
    return {
        f"{name} ({n})": tabulate(method, TimeGrid.uniform(n if name != "midpoint" else n // 2)).named(name)
        for n in (2, 4)
        for name, method in (("euler", methods.euler), ("adams", methods.adams(2)), ("midpoint", methods.midpoint))
    }


@pytest.fixture(scope="module")
def report(samplers) -> Report:
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    groups = {"euler": "stock", "adams": "tuned", "midpoint": "method"}
    measured = compare(samplers, field, noise)
    rows = [
        Row(name, row.nfe, row.passes, groups[name], row.metrics)
        for row in measured.rows
        for name in [row.name.partition(" (")[0]]
    ]
    rows.append(Row("dopri5, tol 0.1", 14, 14, "adaptive", {"rmse": estimate(0.01), "psnr": estimate(40.0)}))
    cost = [{"stage": "search", "field calls": 12, "seconds": 0.5}, {"stage": "fit", "field calls": 3, "seconds": 0.25}]
    return Report("toy", tuple(rows), {**measured.facts, "model": "toy", "seed": 0, "cost": cost, "shares": [0.5, 0.25]})


@pytest.fixture(scope="module")
def pictures(samplers):
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return {name: sampler(field, noise) for name, sampler in samplers.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, report, samplers, pictures) -> Path:
    target = tmp_path_factory.mktemp("report") / "not" / "there"
    reference = next(iter(pictures.values()))
    assert (
        write_report(report, target, samplers=samplers, pictures=pictures, reference_picture=reference)
        == target / "report.html"
    )
    return target


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def loads(self) -> list[str]:
        """Whatever a browser would fetch."""
        names = ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background")
        return [value or "" for _, attrs in self.tags for key, value in attrs.items() if key in names]


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def assert_offline(page: Page, text: str) -> None:
    assert all(address.startswith(("data:", "#")) for address in page.loads())
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "@import" not in text
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base")]
    assert [tag for tag, _ in page.tags].count("script") == 1


def assert_png(path: Path) -> None:
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert 1100 <= width <= 1300
    assert 200 <= height <= 4000
    assert len(data) < 1_500_000
    pixels = image.imread(path)[..., :3]
    assert np.ptp(pixels) > 0.8, "a blank picture"
    assert (pixels.std(axis=(1, 2)) > 0.01).mean() > 0.3, "an almost blank picture"


def test_all_files_are_there(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["report.html", "report.json", "report.md", "frontier.png", "samples.png", "table.png"]
    )


def test_page_is_small_and_needs_nothing_else(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 400_000
    assert_offline(read(folder), text)


def test_page_ids_are_unique_and_resolve(folder):
    page = read(folder)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in page.loads() if address.startswith("#")} <= set(ids)


def test_page_says_what_was_measured(folder, report):
    text = read(folder).text
    assert headline(report) in text
    assert "the reference's own error is" in text
    assert 'Sampler.load("nfe-4")' in text
    for fact in ("toy", "0.5, 0.25", "field calls"):
        assert fact in text
    for row in report.rows:
        assert row.name in text


def test_pictures_are_drawn(folder):
    for name in ("frontier.png", "samples.png", "table.png"):
        assert_png(folder / name)


def test_json_is_the_report(folder, report):
    assert Report.from_dict(json.loads((folder / "report.json").read_text())) == Report(
        report.title, report.rows, json.loads(json.dumps(dict(report.facts)))
    )


def test_markdown_has_headline_table_facts_and_use(folder, report):
    text = (folder / "report.md").read_text()
    assert headline(report) in text
    for part in (
        "![frontier](frontier.png)",
        "![table](table.png)",
        "## How to use it",
        "## Facts",
        "### cost",
        "| seed | 0 |",
    ):
        assert part in text
    assert report.to_markdown() in text


def test_summary_is_made_from_the_rows_or_taken_from_the_facts(report):
    lines = summary(report)
    assert [line["nfe"] for line in lines] == [2, 4]
    best = best_rows(report, "rmse", "stock")[4]
    assert lines[1]["best_stock"] == "euler"
    assert lines[1]["ratio"] == lines[1]["tuned_rmse"] / best.metrics["rmse"].value
    given = Report("x", (), {"summary": [{"nfe": 3, "tuned": "t", "tuned_rmse": 1.0, "best_stock_rmse": 4.0, "ratio": 9.0}]})
    assert summary(given)[0]["ratio"] == 0.25


def test_headline_admits_a_loss():
    lines = [{"nfe": 4, "tuned_rmse": 1.0, "best_stock_rmse": 2.0}, {"nfe": 6, "tuned_rmse": 3.0, "best_stock_rmse": 2.0}]
    text = headline(Report("x", (), {"summary": lines}))
    assert "0.50 to 1.50 times" in text
    assert text.endswith("with 6 it is no better.")


def test_keys_find_their_rows(report, samplers):
    assert row_of(report, "euler (4)").nfe == row_of(report, "euler, 4 calls").nfe == 4
    assert row_of(report, "euler", samplers["euler (2)"]).nfe == 2
    assert row_of(report, "any name", samplers["euler (2)"]).name == "euler", "the sampler says which method it is"
    assert row_of(report, "euler") is None, "two budgets share the name"
    assert row_of(report, "dopri5, tol 0.1").nfe == 14
    assert row_of(report, "unknown") is None


def test_names_from_users_stay_text(tmp_path, samplers):
    rows = [Row(HOSTILE, 4, 4, group, {"rmse": estimate(0.1)}) for group in ("tuned", "stock", "other")]
    sampler = samplers["euler (4)"]
    hostile = Report(HOSTILE, tuple(rows), {HOSTILE: HOSTILE, "table": [{HOSTILE: HOSTILE}]})
    pictures = {HOSTILE + "2": torch.zeros(2, 1, 8, 8), HOSTILE: torch.rand(2, 1, 8, 8)}
    write_report(hostile, tmp_path, samplers={HOSTILE: sampler}, pictures=pictures)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_offline(page, text.replace("https://evil.example/x.js", ""))
    assert "<script>alert(1)</script>" in page.text, "escaped, and therefore visible"
    assert "\x1b" not in text
    markdown = (tmp_path / "report.md").read_text()
    assert not re.search(r"(?<!\\)<script", markdown)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| 4 |")}
    assert len(widths) == 2, "the headline's table and the full one; a name never adds a column"


def test_values_that_are_not_finite_survive(tmp_path):
    values = (math.nan, math.inf, -math.inf, 0.0, 0.1)
    rows = [Row(f"s{i}", 4, 4, "stock", {"rmse": Estimate(v, v, v), "psnr": Estimate(v, v, v)}) for i, v in enumerate(values)]
    write_report(Report("x", tuple(rows), {"reference error": math.nan, "numpy": np.float32(0.5)}), tmp_path)
    text = (tmp_path / "report.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["rows"][0]["metrics"]["rmse"]["value"] == "nan"
    back = Report.from_dict(data)
    assert math.isnan(back.rows[0].metrics["rmse"].value)
    assert back.rows[2].metrics["rmse"].high == -math.inf
    assert data["facts"] == {"reference error": "nan", "numpy": 0.5}


@pytest.mark.parametrize("rows", [0, 1])
def test_little_to_say_is_said(tmp_path, rows):
    row = Row("only", 3, 6, "other", {"rmse": estimate(0.2)}, {"label=1": 0.1, "label=2": 0.3})
    write_report(Report("small", (row,) * rows), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "report.md", "frontier.png"}
    assert ("only" in read(tmp_path).text) == bool(rows)


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path, report, samplers, pictures):
    small = Report("x", report.rows[:2])
    write_report(small, tmp_path, samplers=samplers, pictures=pictures)
    assert (tmp_path / "samples.png").exists()
    write_report(small, tmp_path)
    assert not (tmp_path / "samples.png").exists()
    assert not (tmp_path / "table.png").exists()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), "image"),
        ((3, 16, 24), "image"),
        ((4, 8, 8), "image"),
        ((28, 28), "image"),
        ((64,), "signal"),
        ((2, 64), "signal"),
        ((2,), "points"),
        ((1,), "points"),
        ((7, 3), "points"),
        ((2, 3, 4, 5), "points"),
    ],
)
def test_samples_are_drawn_by_their_shape(tmp_path, report, shape, expected):
    assert kind(shape) == expected
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(20, *shape, generator=generator)
    wild = reference.clone()
    wild[0] = math.nan
    wild[1] = 1e30
    with style():
        figure = samples_figure(strips(report, {}, {"a": reference + 0.1, "b": wild}, reference))
        (tmp_path / "samples.png").write_bytes(png(figure))
        assert "<svg" in svg(figure, "samples", "")
    assert_png(tmp_path / "samples.png")


def test_points_reach_the_page_as_a_drawing(tmp_path, report):
    points = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    write_report(report, tmp_path, pictures={"a": points}, reference_picture=points)
    assert "Samples from the same noise (first two coordinates)" in read(tmp_path).text


def test_large_pictures_keep_the_page_small(tmp_path, report):
    pictures = {f"s{i}": torch.rand(8, 3, 96, 96) * 2 - 1 for i in range(8)}
    page = write_report(report, tmp_path, pictures=pictures, reference_picture=pictures["s0"])
    assert page.stat().st_size < 400_000


def test_many_rows_keep_the_page_small(tmp_path, report):
    rows = tuple(
        Row(f"method{i}@some-grid", nfe, nfe, "method", {"rmse": estimate(0.1 + i), "psnr": estimate(9.0)}, {"label=1": 0.1})
        for nfe in (4, 6, 8, 10)
        for i in range(300)
    )
    page = write_report(Report("x", rows), tmp_path)
    assert page.stat().st_size < 400_000
    assert "The 200 worst rows are only in report.json" in read(tmp_path).text


@pytest.mark.parametrize(
    "pictures", [{"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}, {"a": torch.zeros(3)}, {"a": torch.zeros(0, 3)}]
)
def test_pictures_that_cannot_stand_together_are_refused(tmp_path, report, pictures):
    with pytest.raises(ValueError, match="pictures"):
        write_report(report, tmp_path / "new", pictures=pictures)
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_the_earlier_report_as_it_was(tmp_path, report, monkeypatch):
    write_report(Report("first", report.rows[:1]), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.report.html", lambda *_: (_ for _ in ()).throw(RuntimeError("drawing failed")))
        with pytest.raises(RuntimeError, match="drawing failed"):
            write_report(report, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(ArtifactError, match="No space left"):
            write_report(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_way_is_one_clear_line(tmp_path, report):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtifactError, match="taken"):
        write_report(report, tmp_path / "taken")


def test_settings_of_matplotlib_neither_matter_nor_change(tmp_path, report, folder):
    import matplotlib

    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):
        write_report(report, tmp_path)
        assert matplotlib.rcParams["font.size"] == 40
    assert (tmp_path / "frontier.png").read_bytes() == (folder / "frontier.png").read_bytes()


def test_lines_of_the_frontier(report):
    titles = {line.title: list(line.rows) for line in series(report, "rmse")}
    assert titles == {"tuned by fewstep": [2, 4], "best training-free method": [2, 4], "best stock scheduler": [2, 4]}
    corrected = Row("mended", 4, 4, "corrected", {"rmse": estimate(1e-4)})
    titles = [line.title for line in series(Report("x", (*report.rows, corrected)), "rmse")]
    assert titles[2:] == ["best stock scheduler, as shipped", "best stock, grids corrected"]


def test_facts_are_words():
    report = Report("x", (), {"a_b": True, "none": None, "empty": [], "by": {"x": 0.123456}, "n": 1234567})
    assert {fact.name: fact.text for fact in facts(report)} == {
        "a b": "yes", "none": "\N{EN DASH}", "empty": "none", "by": "x: 0.1235", "n": "1234567",
    }  # fmt: skip


def test_console_prints_plain_lines_into_a_pipe(report, capsys):
    to_console(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["NFE", "tuned", "RMSE"]
    assert lines[2].startswith("4 ")
    assert headline(report) in lines


def test_console_ranks_a_report_without_a_summary(capsys):
    rows = tuple(Row(f"{HOSTILE} {i}", 4, 4, "other", {"rmse": estimate(0.1 * (9 - i))}) for i in range(9))
    to_console(Report("x", rows))
    out = capsys.readouterr().out
    assert out.count("[red]") == 3
    assert "\x1b" not in out


def test_console_draws_a_table_on_a_terminal(report, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    to_console(report)
    assert "euler" in capsys.readouterr().out


def test_the_cost_of_tuning_is_told_as_a_share_of_training_where_that_is_known():
    from fewstep.report.view import costs

    facts = {"tuning passes": 12345, "measuring passes": 678}
    assert costs(Report("r", (), facts)) == "Tuning took 12,345 network passes, measuring 678 more."
    known = costs(Report("r", (), {**facts, "share of training": "0.100%"}))
    assert known == "Tuning took 12,345 network passes (0.100% of those that trained the model), measuring 678 more."
    assert costs(Report("r", (), {})) == ""
