"""The report in a real browser: filters, hovers, fronts, both themes, narrow and wide."""

import time

import pytest

from tests import browser
from tests.test_report import dense, row
from zoo.report import write_report

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(
    PROGRAM is None,
    reason="no Chromium found; install one (apt install chromium) or set CHROMIUM to its path",
)

DRAWN = "document.querySelectorAll('#plot-gmacs .points path').length > 0"
SHOWN = "[...document.querySelectorAll('#results tbody tr')].filter((r) => !r.hidden)"


@pytest.fixture(scope="module")
def page():
    with browser.browser(PROGRAM) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    fidelity = {"agreement": 97.5, "kl": 0.05, "cosine": 0.9, "n_images": 360}
    rows = [
        dense(imgs_per_s=100.0),
        dense(img_size=12, gmacs=2.2, gmacs_dense=2.2, hits=340),
        row("tome", r=8, gmacs=3.0, hits=352, imgs_per_s=120.0, fidelity=fidelity),
        row("tome", r=16, gmacs=1.5, hits=330, imgs_per_s=180.0, fidelity=fidelity),
        row("evit", r=16, gmacs=1.4, hits=345, trained=True, task=["train"]),
        row("topk", r=16, gmacs=1.0, hits=100, imgs_per_s=200.0),
        row("topk", r=90, hits=None, status="failed", error="at most <b>50</b> tokens"),
        dense(backbone="vit_small", gmacs=1.2, gmacs_dense=1.2, hits=335),
    ]
    return write_report(rows, tmp_path_factory.mktemp("browser")).html


@pytest.fixture
def opened(page, report):
    page.open(report, 1400, 900)
    page.wait(DRAWN)
    yield page
    assert page.complaints() == []


def methods(page):
    """Names in the rows of the table that are to be seen."""
    return page.evaluate(f"{SHOWN}.map((r) => r.cells[0].innerText.trim())")


def choose(page, name, value):
    page.evaluate(
        f"(() => {{ const s = document.getElementById('{name}'); s.value = '{value}'; "
        "s.dispatchEvent(new Event('change')); return s.value; })()"
    )


def drawn(page):
    """Methods of the curves in the first plot."""
    script = "document.getElementById('plot-gmacs').data.map((t) => t.meta).filter(Boolean)"
    return set(page.evaluate(script))


def front(page):
    script = "document.getElementById('plot-gmacs').data[{}].x"
    return page.evaluate(script.format(0)), page.evaluate(script.format(1))


def test_a_click_on_a_chip_filters_plot_and_table(opened):
    before = methods(opened)
    assert before.count("tome") == 2 and drawn(opened) >= {"tome", "topk", "none"}
    opened.click("[...document.querySelectorAll('.chip')].find((c) => c.value === 'tome')")
    opened.wait(f"{SHOWN}.length === {len(before) - 2}")
    assert "tome" not in methods(opened) and "tome" not in drawn(opened)
    opened.click("document.querySelector('.chip.text')")  # show all
    opened.wait(f"{SHOWN}.length === {len(before)}")


def test_method_and_backbone_can_be_selected(opened):
    choose(opened, "method", "topk")
    # What it has to be compared with stays: the dense model and its controls.
    assert methods(opened) == ["dense", "lower resolution", "smaller model", "topk", "topk"]
    choose(opened, "method", "*")
    texts = opened.evaluate("[...document.getElementById('view').options].map((o) => o.text)")
    assert texts[-1] == "all backbones · digits (test)" and len(texts) == 3
    choose(opened, "view", str(texts.index("vit_small · digits (test)")))
    assert methods(opened) == ["dense"]


def test_hovering_over_a_point_tells_its_row(opened):
    box = opened.evaluate(
        """(() => {
          const p = document.getElementById('plot-gmacs'), layout = p._fullLayout;
          p.scrollIntoView({block: 'center'});
          const box = p.getBoundingClientRect(), curve = p.data.find((d) => d.meta === 'tome');
          const at = (axis, value) => axis._offset + axis.l2p(value);
          return [box.x + at(layout.xaxis, curve.x[1]), box.y + at(layout.yaxis, curve.y[1])];
        })()"""
    )
    opened.move(box[0] - 3, box[1])
    opened.move(*box)
    opened.wait("document.querySelector('#plot-gmacs .hovertext')")
    text = opened.evaluate("document.querySelector('#plot-gmacs .hovertext').textContent")
    assert text.startswith("tome r=8") and "3.000 GMACs (saves 25.0 %)" in text
    assert "97.5 % of answers" in text and "120 img/s (×1.20, efficiency 90 %)" in text


def test_fronts_with_and_without_training(opened):
    everything, shelf = front(opened)
    assert everything == [1.0, 1.2, 1.4, 3.0, 4.0]
    assert shelf == [1.0, 1.2, 2.2, 3.0, 4.0]  # without the trained model the small input wins
    choose(opened, "weights", "untrained")
    assert front(opened) == (shelf, [])
    assert "evit (trained)" not in methods(opened)
    choose(opened, "weights", "trained")
    assert "tome" not in drawn(opened) and "evit" in drawn(opened)


def test_front_of_the_page_is_that_of_the_tables(opened):
    same = opened.evaluate(
        """(() => {
          const data = JSON.parse(document.getElementById('payload').textContent);
          const front = data.views[0].front.map((id) => data.entries[id].gmacs);
          return String(front) === String(document.getElementById('plot-gmacs').data[0].x);
        })()"""
    )
    assert same


def test_controls_and_failures_have_their_places(opened):
    assert drawn(opened) >= {"lower resolution", "smaller model"}
    names = methods(opened)
    assert names[:3] == ["dense", "lower resolution", "smaller model"]
    texts = opened.evaluate(f"{SHOWN}.map((r) => r.innerText)")
    assert any("FAILED: at most <b>50</b> tokens" in text for text in texts)


def test_fidelity_can_be_plotted_instead_of_accuracy(opened):
    choose(opened, "metric", "agreement")
    heading = opened.evaluate("document.getElementById('title-gmacs').textContent")
    assert heading == "Agreement with dense against GMACs"
    assert drawn(opened) == {"tome", "none"}  # the others have not measured it
    choose(opened, "metric", "top1")


def test_a_click_on_a_heading_sorts_and_a_name_opens_the_row(opened):
    head = "[...document.querySelectorAll('th button')].find((b) => b.textContent === 'Top-1 %')"
    opened.click(head)
    values = opened.evaluate(f"{SHOWN}.map((r) => r.cells[10]?.dataset.v).filter(Boolean)")
    assert len(values) > 4 and values == sorted(values, key=float, reverse=True)
    opened.click("document.querySelector('#results tbody tr button')")
    assert "run_id" in opened.evaluate("document.querySelector('tr.detail').innerText")


def search(page, text):
    page.evaluate(
        f"(() => {{ const s = document.getElementById('search'); s.value = '{text}'; "
        "s.dispatchEvent(new Event('input')); })()"
    )


def test_a_search_filters_table_and_plot(opened):
    before = methods(opened)
    search(opened, "TOME r=16")
    assert methods(opened) == ["tome"]
    assert drawn(opened) == {"none", "lower resolution", "smaller model", "tome"}
    search(opened, "vision transformers")  # a word of a paper's title
    assert 0 < len(methods(opened)) < len(before)
    search(opened, "no such thing")
    assert methods(opened) == []
    search(opened, "")
    assert methods(opened) == before


def test_the_rows_are_one_click_away_as_csv(opened, report, tmp_path):
    folder = tmp_path / "downloads"
    opened.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    opened.click("document.getElementById('csv')")
    path = folder / "report.csv"
    for _ in range(200):
        if path.is_file() and path.stat().st_size:
            break
        time.sleep(0.05)
    assert path.read_text(encoding="utf-8") == report.with_name("report.csv").read_text(
        encoding="utf-8"
    )


def test_names_are_links_and_marks_have_shapes(opened):
    links = opened.evaluate(
        f"Object.fromEntries({SHOWN}.map((r) => [r.cells[0].innerText.trim(), "
        "[...r.cells[0].querySelectorAll('a')].map((a) => a.href)]))"
    )
    assert links["dense"] == []
    assert links["tome"][:2] == [
        "https://arxiv.org/abs/2210.09461",
        "https://github.com/facebookresearch/ToMe",
    ]
    assert links["tome"][2].endswith("docs/methods/tome.md")
    shapes = opened.evaluate("[...document.querySelectorAll('.chip i')].map((i) => i.className)")
    assert shapes[:3] == ["square", "square hollow", "square hollow"] and "circle" in shapes


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_sticks_out_and_themes_differ(page, report, width, dark, tmp_path):
    page.open(report, width, 900, dark=dark)
    page.wait(DRAWN)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "[...document.querySelectorAll('.plot, .chip, .tile, select')]"
        ".filter((n) => n.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == dark
    page.screenshot(tmp_path / "page.png", whole=False)
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert page.complaints() == []


def test_speed_ups_are_over_dense_or_over_the_untouched_model(page, tmp_path):
    speeds = {"batch": 1, "imgs_per_s_dense": 100.0, "imgs_per_s_timm": 80.0}
    rows = [
        dense(imgs_per_s=100.0, **speeds),
        row("tome", r=8, gmacs=2.0, imgs_per_s=160.0, engine="torch", **speeds),
        row("tome", r=8, gmacs=2.0, hits=None, weights="vit_digits", imgs_per_s=180.0,
            engine="onnxruntime", task=["throughput"], **speeds),
    ]  # fmt: skip
    page.open(write_report(rows, tmp_path).html, 1400, 900)
    page.wait(DRAWN)
    cells = "[...document.querySelectorAll('#engines td')].map((c) => c.innerText.split('\\n'))"
    assert page.evaluate(cells) == [["tome r=8"], ["80 %", "×1.60"], ["90 %", "×1.80"]]
    heads = "[...document.querySelectorAll('#engines th')].map((c) => c.innerText)"
    assert page.evaluate(heads)[1:] == [
        "cpu, float32, batch 1",
        "cpu, float32, onnxruntime, batch 1",
    ]
    own = f"{SHOWN}.map((r) => r.querySelector('.efficiency').innerText)"
    assert page.evaluate(own) == ["", "80 %"]
    choose(page, "against", "timm")
    assert page.evaluate(cells)[1:] == [["100 %", "×2.00"], ["112 %", "×2.25"]]
    assert page.evaluate(own) == ["", "100 %"]
    choose(page, "setting", "cpu, float32, onnxruntime, batch 1")
    assert page.evaluate(own) == ["", "112 %"]
    assert page.complaints() == []


def test_what_was_skipped_is_not_counted_as_failed(page, tmp_path):
    rows = [
        dense(),
        row("tome", r=8, gmacs=3.0, hits=352),
        row("topk", r=90, hits=None, status="failed", error="at most 50 tokens"),
        *(
            row(name, hits=None, status="skipped", error="needs training")
            for name in ("dtem", "avit")
        ),
    ]
    page.open(write_report(rows, tmp_path).html, 1400, 900)
    page.wait(DRAWN)
    text = page.evaluate("document.getElementById('count').textContent")
    assert text.startswith("2 of 2 and 1 failed and 2 skipped;")
    assert page.complaints() == []
