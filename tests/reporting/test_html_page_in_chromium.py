"""The page in a real browser, with a user's mouse and keyboard; skipped where there is no Chromium."""

from __future__ import annotations

import json
import re

import pytest

from tests.reporting.chromium import PROGRAM, chromium
from tests.reporting.made_up_pages import write_methods
from tests.reporting.test_html_page import NASTY, PNG

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium on PATH")

TASKS = ["homo", "lumo", "gap", "mu"]
MANY = [f"attribute_{k:02d}" for k in range(40)]
LOSS = ".chart[data-quantity=loss] svg.axes"


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind; in `small`, the loss of the first task is no number at step 200."""
    root = tmp_path_factory.mktemp("pages")

    def loss(k, step):
        return float("nan") if k == 0 and step == 200 else (1 + k) * (10 / step)

    for folder in ("small", "nasty"):
        (root / folder / "method-0/seed-0").mkdir(parents=True)
        (root / folder / "method-0/seed-0/gallery.png").write_bytes(PNG)
    return {
        "small": write_methods(root / "small", ["ls", "si", "bilb"], [0, 1], TASKS, loss=loss),
        "one": write_methods(root / "one", ["ls"], [0], TASKS),
        "many": write_methods(root / "many", [f"m{i}" for i in range(12)], range(5), MANY),
        "nasty": write_methods(root / "nasty", NASTY, [0], [*NASTY, "x" * 200]),
    }


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


def label(browser, selector=LOSS):
    return browser.run(f"document.querySelector({json.dumps(selector)}).getAttribute('aria-label')")


def steps_shown(browser, selector=LOSS):
    return [float(step) for step in re.search(r"steps (\S+) to (\S+)", label(browser, selector)).groups()]


def place(box, x, y):
    return box["x"] + box["width"] * x, box["y"] + box["height"] * y


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["small", "one", "many", "nasty"])
def test_a_page_opens_without_complaint_loads_nothing_and_fits(browser, pages, name, scheme, width):
    browser.open(pages[name], width, 844, scheme)
    assert browser.complaints == []
    assert [request for request in browser.requests if not request.startswith("data:")] == [pages[name].as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(node => !node.closest('.scroll, .legend, svg')
        && node.getBoundingClientRect().right > innerWidth + 0.5).map(node => node.outerHTML.slice(0, 80))"""
    assert browser.run(outside) == []


def test_names_never_become_markup(browser, pages):
    browser.open(pages["nasty"])
    assert browser.run("document.scripts.length") == 2
    assert browser.run("document.images.length") == 1, "the gallery alone"
    assert texts(browser, ".legend span") == [*NASTY, "x" * 200]
    browser.run(
        "(s => { s.value = s.length - 1; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))"
    )
    assert texts(browser, ".legend span") == NASTY
    box = browser.box(LOSS)
    browser.mouse("mouseMoved", *place(box, 0.5, 0.5))
    assert set(texts(browser, ".tip:not([hidden]) span")) <= {f"{name}, seed 0" for name in NASTY}
    assert browser.run("document.scripts.length + document.images.length") == 3 and browser.complaints == []


def test_even_markup_that_got_into_the_page_could_do_nothing(browser, pages, tmp_path):
    text = pages["one"].read_text(encoding="utf-8")
    planted = (
        '<img src="x" onerror="document.title = 1"><script>document.title = 2</script><img src="http://localhost:9/x">'
    )
    (tmp_path / "planted.html").write_text(text.replace("<main>", f"<main>{planted}"), encoding="utf-8")
    browser.open(tmp_path / "planted.html")
    assert browser.run("document.title").startswith("small: ")
    refused = "".join(browser.complaints)
    assert refused.count("Content Security Policy") >= 3, refused


def rows(browser, column):
    found = f"[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[{column}].textContent)"
    return browser.run(found)


def test_a_click_on_a_heading_sorts_by_numbers_and_a_third_one_restores_the_order(browser, pages):
    browser.open(pages["many"])
    first = rows(browser, 0)
    assert first[0].startswith("attribute_00") and first[-1].startswith("MR"), "metrics go down"
    heading = "document.querySelector('table thead').rows[0].cells[2]"
    browser.run(f"{heading}.id = 'heading'")
    seen = []
    for _ in range(3):
        box = browser.box("#heading button")
        browser.mouse("mousePressed", *place(box, 0.5, 0.5), button="left", buttons=1, clickCount=1)
        browser.mouse("mouseReleased", *place(box, 0.5, 0.5), button="left", clickCount=1)
        seen.append((browser.run(f"{heading}.ariaSort"), rows(browser, 2)))
    values = [float(text.split()[0]) for text in seen[0][1]]
    assert seen[0][0] == "ascending" and values == sorted(values)
    assert values[0] < 99 < 100 < values[-1], "as texts, 100 would come before 99"
    assert seen[1][0] == "descending" and [float(text.split()[0]) for text in seen[1][1]] == values[::-1]
    assert seen[2][0] == "none" and rows(browser, 0) == first


def test_a_heading_is_reached_and_pressed_by_the_keyboard(browser, pages):
    browser.open(pages["small"])
    names = rows(browser, 0)
    browser.run("document.querySelector('.scroll').focus()")
    browser.key("Tab")
    assert browser.run("document.activeElement.textContent") == "method"
    browser.key("Enter")
    assert browser.run("document.activeElement.closest('th').ariaSort") == "ascending"
    assert rows(browser, 0) == sorted(names) != names


def test_cells_without_a_value_come_last_in_either_direction(browser, pages, tmp_path):
    text = pages["one"].read_text(encoding="utf-8")
    cells = "".join(f"<tr><td>{text}</td></tr>" for text in ("2.5 ± 0.1", "-", "10.0~", "", "-3.0", "1.0e+05 (mu)"))
    table = f"<table><thead><tr><th>x</th></tr></thead><tbody>{cells}</tbody></table>"
    (tmp_path / "copy.html").write_text(text.replace("<main>", f"<main>{table}"), encoding="utf-8")
    browser.open(tmp_path / "copy.html")
    press = "document.querySelector('table button').click()"
    browser.run(press)
    assert rows(browser, 0) == ["-3.0", "2.5 ± 0.1", "10.0~", "1.0e+05 (mu)", "-", ""]
    browser.run(press)
    assert rows(browser, 0) == ["1.0e+05 (mu)", "10.0~", "2.5 ± 0.1", "-3.0", "-", ""]


def test_a_drag_zooms_all_charts_and_a_double_click_shows_all_again(browser, pages):
    browser.open(pages["small"])
    ticks = texts(browser, f"{LOSS} text.step")
    assert steps_shown(browser) == [10, 400]
    box = browser.box(LOSS)
    browser.drag(place(box, 0.5, 0.4), place(box, 0.75, 0.42))
    low, high = steps_shown(browser)
    # of 559 pixels, 54 to the left and 20 to the right of the axes
    inside = [10 + 390 * (share * box["width"] - 54) / (box["width"] - 74) for share in (0.5, 0.75)]
    assert [low, high] == pytest.approx(inside, abs=2)
    assert texts(browser, f"{LOSS} text.step") != ticks
    assert steps_shown(browser, ".chart[data-quantity=weight] svg.axes") == [low, high]
    browser.double_click(*place(box, 0.5, 0.5))
    assert steps_shown(browser) == [10, 400] and texts(browser, f"{LOSS} text.step") == ticks
    assert browser.complaints == []


def test_a_tall_drag_zooms_the_values_too(browser, pages):
    browser.open(pages["small"])
    heights = f"{LOSS} text:not(.step)"
    box = browser.box(LOSS)
    browser.drag(place(box, 0.2, 0.5), place(box, 0.9, 0.56))
    flat = texts(browser, heights)
    browser.key("0")
    browser.drag(place(box, 0.2, 0.3), place(box, 0.9, 0.6))
    tall = [float(text) for text in texts(browser, heights) if text != "step"]
    assert [float(text) for text in flat if text != "step"] != tall
    assert max(tall) < 2


def test_the_keyboard_zooms_and_moves(browser, pages):
    browser.open(pages["small"])
    browser.run(f"document.querySelector('{LOSS}').focus()")
    for key, shown in (
        ("+", [108, 303]),
        ("ArrowRight", [156, 351]),
        ("-", [10, 400]),
        ("+", [108, 303]),
        ("0", [10, 400]),
    ):
        browser.key(key)
        assert steps_shown(browser) == pytest.approx(shown, abs=1), key


def test_hovering_says_the_values_and_a_gap_is_no_number(browser, pages):
    browser.open(pages["small"])
    browser.box(LOSS)
    at = browser.run(f"""(() => {{
        const ticks = [...document.querySelectorAll('{LOSS} text.step')], box = ticks.find(t => t.textContent === '200')
            .getBoundingClientRect();
        return [box.x + box.width / 2, document.querySelector('{LOSS}').getBoundingClientRect().y + 60];
    }})()""")
    browser.mouse("mouseMoved", *at)
    (said,) = texts(browser, ".tip:not([hidden])")
    # 10 / 200 times 4, 3, 2
    assert said == "step 200mu0.2gap0.15lumo0.1homono number"
    path = browser.run(f"document.querySelector('{LOSS} .line path').getAttribute('d')")
    assert path.count("M") == 2 and path.count("L") == 37, "39 numbers in two pieces"
    inside = browser.run("""(() => { const t = document.querySelector('.tip:not([hidden])').getBoundingClientRect(),
        c = document.querySelector('.chart').getBoundingClientRect();
        return t.top >= c.top && t.top < c.bottom && t.left >= c.left && t.right <= c.right; })()""")
    assert inside is True
    browser.mouse("mouseMoved", 5, 5)
    assert texts(browser, ".tip:not([hidden])") == []


def test_the_legend_hides_a_task_in_all_charts(browser, pages):
    browser.open(pages["small"])
    drawn = f"document.querySelectorAll('{LOSS} .line').length"
    assert browser.run(drawn) == 4
    browser.run("document.querySelector('.legend button').click()")
    assert browser.run("document.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    assert browser.run(drawn) == 3
    assert browser.run("document.querySelectorAll('.chart[data-quantity=weight] .line').length") == 3
    browser.run("[...document.querySelectorAll('.controls button')].find(b => b.textContent === 'none').click()")
    assert browser.run(drawn) == 0
    browser.run("[...document.querySelectorAll('.controls button')].find(b => b.textContent === 'all').click()")
    assert browser.run(drawn) == 4 and browser.complaints == []


def test_runs_at_a_task_have_a_line_a_run_and_an_entry_a_method(browser, pages):
    browser.open(pages["small"])
    assert texts(browser, "option") == [
        *(f"{name}, seed {seed}" for name in ("ls", "si", "bilb") for seed in (0, 1)), *TASKS
    ]  # fmt: skip
    assert browser.run("document.querySelector('select').value") == "2", "not the reference"
    browser.run("(s => { s.value = 7; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))")
    assert texts(browser, ".legend button") == ["ls", "si", "bilb"]
    assert browser.run(f"document.querySelectorAll('{LOSS} .line').length") == 6
    browser.open(pages["one"])
    assert len(texts(browser, "optgroup")) == 1


def test_forty_tasks_stay_readable(browser, pages):
    browser.open(pages["many"])
    assert browser.run(f"document.querySelectorAll('{LOSS} .line').length") == 40
    styles = browser.run("""[...document.querySelectorAll('.legend .swatch')].slice(0, 28).map(
        node => node.classList[1] + node.firstChild.getAttribute('stroke-dasharray'))""")
    assert len(set(styles)) == 28
    box = browser.box(LOSS)
    browser.mouse("mouseMoved", *place(box, 0.5, 0.5))
    assert len(texts(browser, ".tip:not([hidden]) div")) == 8
    assert texts(browser, ".tip:not([hidden])")[0].endswith("and 32 more")
    assert len(texts(browser, f"{LOSS} .near")) == 1, "one line stands out"
    browser.run(
        "(f => { f.value = '_07'; f.dispatchEvent(new Event('input')); })(document.querySelector('input[type=search]'))"
    )
    assert texts(browser, ".legend button") == ["attribute_07"]
    assert browser.run(f"document.querySelectorAll('{LOSS} .line').length") == 1


CONTRAST = """(selector => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = node => {
        const colour = numbers(getComputedStyle(node).backgroundColor);
        return colour.length === 4 && colour[3] === 0 ? behind(node.parentElement) : colour;
    };
    return [...document.querySelectorAll(selector)].map(node => {
        const style = getComputedStyle(node), line = node.closest('svg');
        const a = light(numbers(line ? style.stroke : style.color));
        const b = light(behind(line ? line.parentElement : node));
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(browser, pages, scheme):
    browser.open(pages["many"], scheme=scheme)
    dark = browser.run("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark is (scheme == "dark")
    words = browser.run(f"{CONTRAST}('h1, h2, p, td, th, li, a, .verdict, button, select')")
    assert min(words) >= 4.5
    assert min(browser.run(f"{CONTRAST}('.swatch .line')")) >= 3
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) is dark


def test_print_is_light_and_unfolded(browser, pages):
    browser.open(pages["small"], scheme="dark")
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.print().startswith(b"%PDF")
    browser.call("Emulation.setEmulatedMedia", media="")
