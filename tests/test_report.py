"""Reports: what is compared with what, the Pareto front, and the four files."""

import csv
import itertools
import json
import re

import pytest

import zoo.report
from zoo.errors import ZooError
from zoo.report import table, write_report
from zoo.report.colors import INK, method_colors, method_marks
from zoo.report.compare import compare
from zoo.results.rows import append_row, new_row, wilson_interval

HOSTILE = "</script><script>alert(1)</script>|*a*_b_`c`"
CLOCK = itertools.count()


def row(method="tome", gmacs=2.0, hits=350, r=8, **more):
    """A row as `eval.py` makes it, one second younger than the one before."""
    second = next(CLOCK)
    known = {
        "created": f"2026-01-01T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}+00:00",
        "command": "python eval.py",
        "method": method,
        "reducer": None if method == "none" else {"name": method},
        "schedule": None if method == "none" else {"name": "constant_r", "r": r},
        "backbone": "vit_digits",
        "img_size": 16,
        "gmacs": {"total": gmacs, "linear": gmacs, "attention": 0.0, "reducer": 0.0},
        "gmacs_dense": 4.0,
        "tokens": [[65, 60], [60, 30]],
        "trained": False,
        "device": "cpu",
        "dtype": "float32",
        "dirty": False,
    }
    if hits is not None:
        known |= {"dataset": "digits", "split": "test", "n_images": 360}
        known |= {"top1": hits / 3.6, "ci95": wilson_interval(hits, 360), "weights": "vit_digits"}
    return new_row(**known | more)


def dense(**more):
    return row(**{"method": "none", "gmacs": 4.0, "hits": 354} | more)


def payload(html):
    text = re.search(r'<script type="application/json" id="payload">(.*?)</script>', html, re.S)[1]
    return json.loads(text)


def without_scripts(html):
    return re.sub(r"<script.*?</script>", "", html, flags=re.S)


# ------------------------------------------------------------------------------ comparing


def test_differences_are_against_the_dense_model_of_the_same_backbone():
    rows = [
        dense(hits=354),
        row(gmacs=1.0, hits=345),
        dense(backbone="other", hits=300, gmacs=2.0, gmacs_dense=None),
        row(backbone="other", gmacs=1.0, hits=303, gmacs_dense=None),
    ]
    entries = {(e.backbone, e.dense): e for e in compare(rows).entries}
    tome, other = entries["vit_digits", False], entries["other", False]
    assert tome.delta == pytest.approx(-2.5) and tome.saved == pytest.approx(75)
    assert other.delta == pytest.approx(5 / 6) and other.saved == pytest.approx(50)
    assert entries["other", True].delta is None and entries["other", True].saved is None
    labels = [view.label for view in compare(rows).views]
    assert labels[2] == "all backbones · digits (test)" and len(labels) == 3


def test_latest_row_of_a_configuration_counts():
    old, new = row(hits=340), row(hits=342)
    for order in ([old, new], [new, old]):
        comparison = compare([dense(), *order])
        [entry] = [e for e in comparison.entries if not e.dense]
        assert entry.row["run_id"] == new["run_id"]
        assert [r["run_id"] for r, _ in comparison.others] == [old["run_id"]]


def test_a_failed_run_hides_nothing_and_a_copy_is_no_run():
    good = row()
    comparison = compare([good, row(status="failed", error="x", hits=None), dict(good)])
    assert len(comparison.entries) == 1 and len(comparison.failed) == 1
    assert len(comparison.rows) == 2 and not comparison.others


def test_budgets_arguments_training_and_weights_make_different_entries():
    rows = [
        row(r=8),
        row(r=13),
        row(trained=True),
        row(weights="mine.safetensors"),
        row("heuristic", reducer={"name": "heuristic", "pattern": "l1"}),
        row("heuristic", reducer={"name": "heuristic", "pattern": "l2"}),
        row(img_size=24),
        row(recipe={"plugins": [{"name": "clca"}]}),
    ]
    labels = [entry.label for entry in compare(rows).entries]
    assert len(set(labels)) == len(rows)
    assert {"heuristic (l1) r=8", "heuristic (l2) r=8", "tome (trained) r=8"} <= set(labels)
    assert {"tome r=13", "tome +clca r=8", "tome r=8 24 px"} <= set(labels)
    assert any("mine.safetensors" in label for label in labels)


def test_dense_runs_of_a_sweep_over_budgets_are_one_entry():
    rows = [dense(schedule={"name": "target_gmacs", "fraction": f}) for f in (0.3, 0.5)]
    assert len(compare(rows).entries) == 1


def test_measurements_of_separate_runs_complete_each_other():
    rows = [
        row(hits=350, gmacs=2.0, imgs_per_s=None),
        row(hits=None, gmacs=2.0, imgs_per_s=100.0, imgs_per_s_dense=80.0),
        row(hits=None, gmacs=2.0, imgs_per_s=9.0, device="H100"),
        row(hits=None, gmacs=3.0, imgs_per_s=7.0, device="other head"),
    ]
    [entry] = compare(rows).entries
    assert entry.top1 == pytest.approx(350 / 3.6)
    assert entry.speeds["cpu, float32"].speedup == pytest.approx(1.25)
    assert entry.speeds["cpu, float32"].efficiency == pytest.approx(1.25 * 2.0 / 4.0)
    assert entry.speeds["H100, float32"].rate == 9.0
    assert entry.speeds["H100, float32"].efficiency is None  # nothing to compare with
    assert set(entry.speeds) == {"cpu, float32", "H100, float32"}  # other GMACs, other model


def test_fronts_of_accuracy_against_gmacs_and_against_throughput():
    rows = [
        dense(imgs_per_s=100.0),
        row(r=1, gmacs=3.0, hits=352, imgs_per_s=90.0),  # slower than dense
        row(r=2, gmacs=2.0, hits=352, imgs_per_s=150.0),
        row(r=3, gmacs=1.0, hits=300, imgs_per_s=200.0),
    ]
    [view] = compare(rows).views
    assert [entry.budget for entry in view.front] == ["r=3", "r=2", ""]
    [front] = view.speed_fronts.values()
    assert [entry.budget for entry in front] == ["r=3", "r=2", ""]
    assert view.reference.dense
    assert view.entries[0].dense  # first in every table


def test_notes_warn_about_what_cannot_be_compared():
    rows = [row(batch=8, imgs_per_s=5), row("evit", batch=16, imgs_per_s=5)]
    [view] = compare([*rows, row("topk", dirty=True)]).views
    notes = " ".join(view.notes)
    assert view.settings == ["cpu, float32, batch 16", "cpu, float32, batch 8"]
    assert "No accuracy of the dense vit_digits" in notes
    assert "1 row comes from a checkout with uncommitted changes" in notes
    notes = " ".join(compare([dense()]).views[0].notes)
    assert "a 95 % interval, here of up to 2.8 points: [96.41, 99.23]" in notes


def test_fifty_methods_are_told_apart_by_colour_and_shape():
    names = [f"m{i:02}" for i in range(50)]
    marks = method_marks([*names, "none"])
    assert marks["none"].colors == INK == method_colors(["none"])["none"]
    for ground in (0, 1):
        assert len({mark[ground] for mark in marks.values()}) == 52  # and the controls'
    assert all(re.fullmatch("#[0-9a-f]{6}", c) for mark in marks.values() for c in mark.colors)

    def far(one, other):
        channels = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (one, other)]
        return sum(abs(a - b) for a, b in zip(*channels, strict=True)) > 50

    # Whoever has the same shape has another hue.
    for one, other in itertools.combinations([marks[name] for name in names], 2):
        assert one.shape != other.shape or (far(one[0], other[0]) and far(one[1], other[1]))
    assert "square" not in {marks[name].shape for name in names}  # of dense models and controls


# ------------------------------------------------------------------------------ the files


@pytest.fixture(scope="module")
def rows():
    return [
        dense(imgs_per_s=100.0),
        row(r=8, gmacs=3.0, hits=352, imgs_per_s=120.0, imgs_per_s_dense=100.0),
        row(r=16, gmacs=1.5, hits=330, imgs_per_s=180.0, imgs_per_s_dense=100.0),
        row("evit", r=16, gmacs=1.6, hits=320, trained=True),
        row(HOSTILE, gmacs=2.0, hits=300, notes="=cmd()"),
        row("topk", hits=None, status="failed", error="cannot <b>reach</b> | that"),
        row(r=8, gmacs=3.0, hits=351),
        row(hits=None, backbone="deit_small", gmacs=2.7, gmacs_dense=4.6),
    ]


@pytest.fixture(scope="module")
def paths(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for one in rows:
        append_row(folder / "results" / "rows.jsonl", one)
    return write_report(folder / "results", folder / "out" / "deep", title=f"T {HOSTILE}")


def test_report_writes_four_files_and_nothing_else(paths):
    assert [path.name for path in paths] == ["report.html", "report.csv", "report.md", "report.png"]
    assert sorted(paths.html.parent.iterdir()) == sorted(paths)


def test_csv_keeps_every_row_in_flat_columns(paths, rows):
    with paths.csv.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["run_id"] for line in found] == [one["run_id"] for one in rows]
    columns = {"gmacs", "gmacs_linear", "gmacs_reducer", "ci95_low", "ci95_high", "version_torch"}
    columns |= {"budget", "gmacs_saved_percent", "top1_delta", "speedup", "efficiency"}
    columns |= {"current", "pareto"}
    assert columns <= set(found[0])
    assert not {"ci95", "versions"} & set(found[0]) and not any("{" in key for key in found[0])
    tome = found[2]
    assert (tome["gmacs"], tome["budget"], tome["speedup"]) == ("1.5", "r=16", "1.8")
    assert float(tome["efficiency"]) == pytest.approx(1.8 * 1.5 / 4.0)
    assert float(tome["gmacs_saved_percent"]) == pytest.approx(62.5)
    assert float(tome["top1_delta"]) == pytest.approx(-24 / 3.6)
    assert json.loads(tome["tokens"]) == [[65, 60], [60, 30]]
    assert [line["current"] for line in found] == ["true", "false"] + ["true"] * 3 + [
        "false",
        "true",
        "true",
    ]
    pareto = [line["budget"] for line in found if line["pareto"] == "true"]
    assert pareto == ["", "r=16", "r=8"]
    assert found[5]["error"] == "cannot <b>reach</b> | that" and found[5]["budget"] == "r=8"
    assert found[4]["notes"] == "'=cmd()"  # a spreadsheet must not run it


def test_csv_keeps_unknown_fields(tmp_path):
    paths = write_report([{**row(), "from_the_future": [1, 2]}], tmp_path)
    with paths.csv.open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["from_the_future"] == "[1, 2]"


def test_markdown_has_dense_first_and_pareto_bold(paths):
    text = paths.markdown.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].startswith(
        "| Method | Budget | Input | Tokens | GMACs | Reducer | −GMACs | Top"
    )
    assert lines[2].startswith("| **dense** |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:7]}) == 1
    bold = [line.split("|")[2].strip() for line in lines if line.startswith("| **tome**")]
    assert bold == ["**r=8**", "**r=16**"]
    assert "**62.5 %**" in text and "**−6.67**" in text
    assert "the reducer's own products" in text and "python 3" in text
    assert "FAILED: cannot &lt;b&gt;reach&lt;/b&gt; \\| that" in text
    assert "<script" not in text and "\\*a\\*\\_b\\_\\`c\\`" in text


def test_page_loads_nothing(paths):
    html = paths.html.read_text(encoding="utf-8")
    page = without_scripts(html)
    # What a reader may click on is no part of the page.
    page = re.sub(r'<a (class="\w+" )?href="https?://', "<a ", page)
    assert not re.search(r"""(src|href|srcset|action|data)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"@import|url\(", page)
    assert not re.search(r"<(link|img|iframe|object|embed)\b", page)
    assert not re.search(r"<script[^>]*\bsrc\b", html[: html.index("plotly.js v")])
    assert "default-src 'none'" in page
    assert "Plotly" in html and "{{" not in page
    assert html.count("plotly.js v") >= 1 and len(html) > 1_000_000


def test_page_escapes_what_rows_say(paths):
    html = paths.html.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in html
    assert "<b>reach" not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html
    data = payload(html)  # that it can be cut out shows that no row ended the element
    assert HOSTILE in data["colors"]
    assert any(HOSTILE[:30] in e["hover"][0] for e in data["entries"].values())


def test_page_shows_every_row(paths, rows):
    html = paths.html.read_text(encoding="utf-8")
    ids = [int(number) for number in re.findall(r'<tr data-row="(\d+)"', html)]
    failed = html[html.index("1 failed run") :]
    assert sorted(ids) == [0, 1, 2, 3, 4, 6, 7]  # row 5 failed
    assert "cannot &lt;b&gt;reach&lt;/b&gt; | that" in failed and "python eval.py" in failed
    assert "vit_digits + topk r=8" in failed
    data = payload(html)
    details = {name: text for name, text, _ in data["rows"]["2"]}
    assert details["run_id"] == rows[2]["run_id"] and details["device"] == "cpu"
    assert [v["empty"]["gmacs"] for v in data["views"]][0] is None
    hover = data["entries"]["2"]["hover"]
    assert hover[0] == "tome r=16" and "1.500 GMACs (saves 62.5 %), reducer 0.0 %" in hover


def test_page_knows_fronts_reference_and_findings(paths):
    data = payload(paths.html.read_text(encoding="utf-8"))
    view = data["views"][0]
    fronts = [data["entries"][str(number)]["hover"][0] for number in view["front"]]
    assert fronts == ["tome r=16", "tome r=8", "dense"]
    assert data["entries"][str(view["reference"])]["dense"]
    tiles = {name: (value, text) for name, value, text in view["tiles"]["cpu, float32"]}
    assert tiles["Dense model, top-1"] == ("98.33 %", "4.000 GMACs · 100 img/s")
    assert tiles["Fewest GMACs within 1 point of dense"][0] == "−25 %"


def test_page_says_why_a_plot_is_empty(tmp_path):
    page = write_report([row(hits=None, gmacs=2.0), dense(hits=None)], tmp_path).html
    [view] = payload(page.read_text(encoding="utf-8"))["views"]
    assert view["front"] == [] and "measured costs only" in view["empty"]["gmacs"]
    tiles = [tile[:2] for tile in view["tiles"][""]]
    assert tiles[:2] == [["Dense model", "4.000 GMACs"], ["Fewest GMACs", "−50 %"]]
    page = write_report([row(), dense()], tmp_path).html
    [view] = payload(page.read_text(encoding="utf-8"))["views"]
    assert view["empty"]["gmacs"] is None and "No throughput" in view["empty"]["speed"]


def test_only_failed_runs_still_make_a_report(tmp_path):
    paths = write_report([row(status="failed", error="boom", hits=None)], tmp_path)
    assert "boom" in paths.html.read_text(encoding="utf-8")
    assert "boom" in paths.markdown.read_text(encoding="utf-8")
    assert "boom" in paths.csv.read_text(encoding="utf-8")


def test_picture_is_a_picture(paths, rows):
    np, image = pytest.importorskip("numpy"), pytest.importorskip("matplotlib.image")
    pixels = (image.imread(paths.png)[..., :3] * 255).round().astype(int)
    assert pixels.shape[0] > 700 and pixels.shape[1] > 1200
    for method in ("tome", "evit"):  # each method's dots are there, in its colour
        names = {one["method"] for one in rows if one["status"] == "ok"}
        color = method_colors(names)[method][0]
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=-1) <= 2).sum() > 100, method
    assert (pixels == 255).all(axis=-1).mean() > 0.5


@pytest.mark.parametrize("methods", [10, 40])
def test_labels_of_the_picture_do_not_overlap(methods):
    from zoo.report.png import draw

    # Every method is on the front, their points half a label's height from each other.
    crowd = [
        row(
            f"method_{i}_$\\frac$" + i * "x",
            r=r,
            gmacs=2 + i / 99 - r / 99,
            hits=min(330 + i - r, 353),
        )
        for i in range(methods)
        for r in (8, 13, 16)
    ]
    figure = draw(compare([dense(), *crowd]), "title " * 30)
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) >= 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame, legend = axes.get_window_extent(renderer), axes.get_legend().get_window_extent(renderer)
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and b.y1 <= frame.y1 for b in boxes)
    assert legend.x0 >= frame.x1 and legend.x1 <= figure.bbox.x1 and legend.y0 >= 0


def test_console_table(rows):
    text = table(rows)
    lines = text.splitlines()
    assert lines[0] == "vit_digits · digits (test)"
    assert re.search(r"^\* dense +4\.000 +98\.33 +96\.41 – 99\.23 +100$", lines[3])
    assert re.search(
        r"^\* tome +r=16 +1\.500 +62\.5 % +91\.67 +88\.35 – 94\.10 +−6\.67 +180 +×1\.80$",
        text,
        re.M,
    )
    assert re.search(r"^  evit \(trained\) +r=16 ", text, re.M)
    assert "1 failed run:" in text and "FAILED: cannot <b>reach</b> | that" in text
    assert "deit_small · costs only" in text


# --------------------------------------------------------------------------------- errors


def test_nothing_to_report(tmp_path):
    with pytest.raises(ZooError, match="found none"):
        write_report(tmp_path, tmp_path / "out")
    with pytest.raises(ZooError, match="at least one row, found none"):
        write_report([], tmp_path / "out")
    (tmp_path / "rows.jsonl").write_text("{oops\n")
    with pytest.raises(ZooError, match=r"at least one row, found none in "):
        write_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write the report"):
        write_report([row()], tmp_path / "file" / "out")


def test_missing_packages_are_named_before_anything_is_written(tmp_path, monkeypatch):
    find = zoo.report.importlib.util.find_spec
    monkeypatch.setattr(
        zoo.report.importlib.util,
        "find_spec",
        lambda name: None if name == "plotly" else find(name),
    )
    with pytest.raises(ZooError, match=r"needs plotly; .*pip install 'tokenzoo\[report\]'"):
        write_report([row()], tmp_path / "out")
    assert not (tmp_path / "out").exists()
