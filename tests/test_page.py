"""The page in a browser: what it shows is what it says. And the tables and pictures of a notebook."""

import base64
import hashlib
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fisherop import Eigendistortion, certify, noise, plot, spaces, stimuli, webpage
from fisherop.pictures import levels_of
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = torch.as_tensor(matrix_with_singular_values(np.r_[np.geomspace(3, 0.05, 40), np.zeros(8)], 60, 48))
LABEL = "<script>alert('x')</script> & </section>"


def synthesized(shape=(1, 1, 6, 8), dtype=torch.float64, low=0.1, high=0.9, k=2, **options):
    n = int(np.prod(shape))
    image = torch.as_tensor(np.random.default_rng(0).uniform(low, high, shape), dtype=dtype)
    matrix = MATRIX[:, :n].to(dtype)
    ed = Eigendistortion(image, lambda x: torch.exp(matrix @ x.flatten() / 3), **options)
    return ed.synthesize("exact", k=k, tol=1e-5, progress=False)


def pictures(tensor):
    """(height, width, channels)."""
    return torch.movedim(tensor.reshape(-1, *tensor.shape[-2:]), 0, -1)


class Checked(html.parser.HTMLParser):
    """Every element is closed where it must be, every id is there once, and nothing is fetched."""

    VOID = frozenset(["meta", "link", "input", "img", "br"])

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.targets, self.kinds = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open and len(set(self.ids)) == len(self.ids)
        assert all(target.startswith("data:") for target in self.targets)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.targets += [found[name] for name in ("src", "href", "action", "srcset") if name in found]
        self.kinds += [found.get("type", "")] if tag == "script" else []
        assert not any(name.startswith("on") for name in found)
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def blocks(text):
    """The facts of each entry, its numbers, and those of its distortions."""
    for section in re.findall(r'<section class="entry">.*?\n</section>', text, re.DOTALL):
        found = re.findall(r'<script type="[^"]*" class="([a-z]+)">(.*?)</script>', section)
        (facts,) = (json.loads(block) for name, block in found if name == "facts")
        numbers = [
            np.frombuffer(base64.b64decode(block), "<f4" if facts["single"] else "<f8")
            for name, block in found
            if name != "facts"
        ]
        yield facts, numbers[0], numbers[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (1, 1, 6, 8), (1, 3, 4, 4), (3, 2, 5), (1, 48)])
def test_the_file_holds_the_bits(tmp_path, shape, dtype):
    ed = synthesized(shape, dtype)
    path = plot.page(ed, tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    page = Checked(text)
    assert page.kinds == ["application/json"] + 5 * ["application/octet-stream"] + [""]
    ((facts, image, changes),) = blocks(text)
    assert (facts["height"], facts["width"]) == shape[-2:] and (facts["low"], facts["high"]) == (0, 1)
    for numbers, tensor in zip(
        [image, *changes], [ed.image, *ed.operator.to_tensors(ed.result.eigenvectors)], strict=True
    ):
        assert np.array_equal(numbers, pictures(tensor).numpy().flatten())
    thresholds = [np.inf if one["threshold"] is None else one["threshold"] for one in facts["distortions"]]
    assert np.array_equal(thresholds, ed.detection_thresholds()[0])
    assert [one["eigenindex"] for one in facts["distortions"]] == ed.result.eigenindex.tolist()
    np.testing.assert_allclose([one["norm"] for one in facts["distortions"]], 1, rtol=1e-5)
    for first, *rest in (line.split(None, 4) for line in str(ed.result).splitlines()[3:7]):
        assert f'<tr><th scope="row">{first}</th><td>' + "</td><td>".join(rest) + "</td>" in text
    for name, words in (note.split(": ", 1) for note in str(ed.result).splitlines()[8:]):
        assert f"<dt>{name}</dt><dd>{html.escape(words)}</dd>" in text


def test_nothing_but_the_pages_own_script_and_style_may_run(tmp_path):
    text = plot.page([(LABEL, synthesized())], tmp_path / "page.html", title=LABEL).read_text(encoding="utf-8")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    Checked(text)
    assert LABEL not in text and next(blocks(text))[0]["label"] == LABEL and "{{" not in text.split("<script>")[0]


def test_indices_labels_and_ranges(tmp_path):
    ed, other = synthesized(), synthesized((1, 3, 4, 4), low=-3, high=5)
    sources = iter([ed, ("mine", other), ed])  # of which only one need be in memory
    text = plot.page(sources, tmp_path / "page.html", indices=[-1, 0, 3]).read_text(encoding="utf-8")
    found = [facts for facts, _, _ in blocks(text)]
    assert [facts["label"] for facts in found] == ["function", "mine", "function (2)"]
    assert [[one["eigenindex"] for one in facts["distortions"]] for facts in found] == 3 * [[47, 0]]
    assert (found[1]["low"], found[1]["high"]) == (float(other.image.min()), float(other.image.max()))
    assert text.count("<caption>2 of the 4 pairs that were found</caption>") == 3
    text = plot.page(other, tmp_path / "page.html", indices=1, vrange=(-4, 6)).read_text(encoding="utf-8")
    ((facts, _, changes),) = blocks(text)
    assert (facts["low"], facts["high"], len(changes)) == (-4, 6, 1)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (3, {}, TypeError, "source must be an Eigendistortion, or several, .*, got 3"),
        ("text", {}, TypeError, "source must be an Eigendistortion, or several, .*, got 'text'"),
        ([], {}, ValueError, r"source must be an Eigendistortion, or several, .*, got \[\]"),
        ([None], {}, TypeError, r"what source holds must be an Eigendistortion, or \(label, .*, got None"),
        ([(3, "ed")], {}, TypeError, "a label in source must be a text, got 3"),
        (["ed", ("second", "fresh")], {}, ValueError, r"no eigendistortions of 'second' to show: call synthesize\(\)"),
        ("flat", {}, ValueError, r"the image must be grey .* or colour .*, got shape \(48,\)"),
        ("level", {}, ValueError, "what is to be shown is 7 throughout: pass vrange"),
        ("ed", {"indices": 4}, IndexError, "indices must be a position among the 4 eigendistortions found"),
        ("ed", {"indices": []}, ValueError, "indices must be an integer, .* not empty"),
        ("ed", {"vrange": (1, 0)}, ValueError, "vrange must be two ascending numbers"),
        ("ed", {"vrange": (0, np.nan)}, ValueError, "vrange must be .* finite"),
        ("ed", {"title": 3}, TypeError, "title must be a text, got 3"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_the_old_page(tmp_path, source, options, error, message):
    ed = synthesized()
    level = Eigendistortion(torch.full((6, 8), 7.0), torch.sin).synthesize(progress=False, tol=1e-5)
    named = {"ed": ed, "fresh": Eigendistortion(ed.image, ed.model), "flat": synthesized((48,)), "level": level}
    if isinstance(source, list):
        source = [
            tuple(named.get(x, x) for x in one) if isinstance(one, tuple) else named.get(one, one) for one in source
        ]
    elif isinstance(source, str):
        source = named.get(source, source)
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(error, match=message):
        plot.page(source, tmp_path / "page.html", **options)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    plot.page(level, tmp_path / "page.html", vrange=(6, 8))


def test_paths_and_sizes_that_are_refused(tmp_path, monkeypatch):
    ed = synthesized()
    with pytest.raises(IsADirectoryError, match="path must be a file's, and this is a folder"):
        plot.page(ed, tmp_path)
    with pytest.raises(FileNotFoundError, match="path must lie in a folder that exists"):
        plot.page(ed, tmp_path / "none" / "page.html")
    monkeypatch.setattr(webpage, "_MOST", 5 * 48 * 8 * 4 / 3)
    plot.page(ed, tmp_path / "page.html")
    with pytest.raises(ValueError, match=r"the page would take more than 0 MB, .*: choose a few `indices`"):
        plot.page([ed, ed], tmp_path / "other.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


# In a browser


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, service = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not service:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # there is no network
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    """Afterwards: nothing was complained of, and nothing was asked for but the page."""
    driver.get_log("browser"), driver.get_log("performance")
    yield driver
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked and all(url.startswith(("file:", "data:")) and not url.startswith("file:////") for url in asked)
    assert len({url for url in asked if url.startswith("file:")}) == 1


def element(driver, name):
    return driver.find_element("id", name)


def state(driver):
    """What the page shows and what it says, at one moment: the pixels (height, width, 4), and the rest by its name."""
    script = """
        const c = document.getElementById("picture");
        const said = {screen: document.getElementById("screen").textContent, ...c.dataset};
        for (const name of ["rms", "threshold"]) said[name] = document.getElementById(name).valueAsNumber;
        return [c.height, c.width, Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data), said];"""
    height, width, data, said = driver.execute_script(script)
    return np.array(data).reshape(height, width, 4), said


def move(driver, name, value):
    """As the mouse or a keyboard does."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
    driver.execute_script(script, element(driver, name), str(value))


def choose(driver, name, index):
    element(driver, name).find_elements("tag name", "option")[index].click()


def pick(driver, group, value):
    driver.find_element("css selector", f"[name={group}][value={value}]").click()


def value(driver, name):
    return float(element(driver, name).get_property("value"))


def levels(image, vrange):
    found = pictures(levels_of(image, *vrange, 255, None)).numpy()
    return np.broadcast_to(found, (*found.shape[:2], 3))


def assert_shows(driver, image, vrange):
    pixels, said = state(driver)
    assert (pixels[..., 3] == 255).all()
    assert np.array_equal(pixels[..., :3], levels(image, vrange))
    return said


def assert_true(driver, ed, index, vrange, unit):
    """The pixels are those of the amplitude that the page says, in either unit, and so is the clipped share."""
    amplitude = float(element(driver, "picture").get_attribute("data-amplitude"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* % of the elements are clipped")
        (wanted,) = stimuli.series(ed, index, [amplitude], gamut=vrange, clip=True)
    said = assert_shows(driver, wanted.image, vrange)
    assert int(said["clipped"]) == round(wanted.clipped * ed.image.numel())
    (meant,) = stimuli.series(ed, index, [said[unit]], unit=unit, gamut=(-1e9, 1e9))
    np.testing.assert_allclose(amplitude, meant.amplitude, rtol=100 * torch.finfo(ed.image.dtype).eps)
    np.testing.assert_allclose(said["rms"], amplitude / ed.image.numel() ** 0.5, rtol=1e-3)
    on_screen = re.match(r"RMS (\S+);|no value|the image itself", said["screen"])[1]
    change = (levels(wanted.image, vrange) - levels(ed.image, vrange)) / 255 * (vrange[1] - vrange[0])
    np.testing.assert_allclose(float(on_screen or 0), np.sqrt((change**2).mean()), rtol=5e-3)
    return np.abs(change).max()


@pytest.mark.parametrize(
    ("shape", "dtype", "low", "high", "vrange"),
    [
        ((1, 1, 6, 8), torch.float64, 0.0, 1.0, (0, 1)),
        ((1, 3, 4, 4), torch.float32, 0.1, 0.9, (0, 1)),
        ((6, 8), torch.float32, -3.0, 5.0, None),
        ((3, 2, 5), torch.float64, 100.0, 140.0, (0, 255)),
    ],
)
def test_the_slider_moves_pixels_by_what_it_says(browser, tmp_path, shape, dtype, low, high, vrange):
    ed = synthesized(shape, dtype, low, high)
    browser.get(plot.page(ed, tmp_path / "page.html", vrange=vrange).as_uri())
    vrange = vrange or (float(ed.image.min()), float(ed.image.max()))
    np.testing.assert_allclose(value(browser, "rms"), 0.05 * (vrange[1] - vrange[0]), rtol=0.005)
    between = vrange[0] + (np.arange(-1, 256) + 0.5)[:, None] / 255 * (vrange[1] - vrange[0]) * (
        1 + np.linspace(-1e-7, 1e-7, 21)
    )  # two levels, where the image's precision decides
    rounded = torch.as_tensor(between).clamp(*vrange).to(dtype)
    got = browser.execute_script("return arguments[0].map(level)", between.flatten().tolist())
    assert got == levels_of(rounded, *vrange, 255, None).flatten().tolist()
    for index in range(len(ed.result.eigenvalues)):
        choose(browser, "distortion", index)
        assert element(browser, "distortion").get_property("selectedIndex") == index
        is_seen = np.isfinite(ed.detection_thresholds()[0][index])
        for unit in ["rms", "threshold"][: 1 + is_seen]:
            pick(browser, "unit", unit)
            changes = []
            for position in (-500, -77, 0, 1, 250, 500):
                move(browser, "slider", position)
                changes.append(assert_true(browser, ed, index, vrange, unit))
                rms = position / 500 * 0.25 * (vrange[1] - vrange[0])
                np.testing.assert_allclose(value(browser, "rms"), rms, rtol=0.006)
            assert changes[2] == 0 and min(changes[0], changes[1], changes[4], changes[5]) > 0
        assert not is_seen or value(browser, "threshold")
        pick(browser, "unit", "rms")


def test_fields_keys_and_the_logarithmic_slider(browser, tmp_path):
    ed = synthesized((1, 1, 6, 8))
    browser.get(plot.page(ed, tmp_path / "page.html").as_uri())
    for unit, amount in (("threshold", 1.25), ("rms", -0.0123), ("threshold", -2e3), ("rms", 0)):
        field = element(browser, unit)
        field.clear()
        field.send_keys(str(amount))
        assert (
            value(browser, unit) == amount
            and browser.find_element("css selector", f"[name=unit][value={unit}]").is_selected()
        )
        assert_true(browser, ed, 0, (0, 1), unit)
    move(browser, "rms", "")
    assert element(browser, "rms").get_property("validationMessage") == "A number, please."
    element(browser, "logarithmic").click()
    for position, rms in ((500, 0.25), (375, 0.025), (-250, -0.0025), (1, 2.5e-5), (0, 0)):
        move(browser, "slider", position)
        np.testing.assert_allclose(value(browser, "rms"), rms, rtol=0.02)
        assert_true(browser, ed, 0, (0, 1), "rms")
    move(browser, "slider", 375)
    slider = element(browser, "slider")
    slider.send_keys(browser_keys().ARROW_RIGHT)
    assert slider.get_property("value") == "376" and value(browser, "rms") > 0.025
    assert_true(browser, ed, 0, (0, 1), "rms")
    before = value(browser, "rms")
    element(browser, "flip").click()
    assert value(browser, "rms") == -before and slider.get_property("value") == "-376"
    assert_true(browser, ed, 0, (0, 1), "rms")
    body = browser.find_element("tag name", "body")
    body.send_keys("n")
    assert_true(browser, ed, 1, (0, 1), "rms")
    body.send_keys("pp")
    assert_true(browser, ed, 0, (0, 1), "rms")


def browser_keys():
    from selenium.webdriver.common.keys import Keys

    return Keys


def test_infinite_thresholds_are_told_and_rms_goes_on(browser, tmp_path):
    ed = synthesized()
    assert np.isinf(ed.detection_thresholds()[0][-1])
    browser.get(plot.page(ed, tmp_path / "page.html").as_uri())
    pick(browser, "unit", "threshold")
    rms = value(browser, "rms")
    choose(browser, "distortion", 3)
    field = element(browser, "threshold")
    assert not field.is_enabled() and field.get_property("value") == ""
    assert field.get_attribute("placeholder") == "infinite"
    np.testing.assert_allclose(value(browser, "rms"), rms, rtol=0.005)
    assert_true(browser, ed, 3, (0, 1), "rms")
    assert "∞" in browser.find_element("css selector", "tr[aria-current]").text
    choose(browser, "distortion", 1)
    assert field.is_enabled()
    np.testing.assert_allclose(
        value(browser, "threshold"), value(browser, "rms") / ed.detection_thresholds()[1][1], rtol=1e-3
    )


def test_blinking_and_views(browser, tmp_path):
    ed = synthesized((1, 3, 4, 4))
    browser.get(plot.page(ed, tmp_path / "page.html").as_uri())
    (wanted,) = stimuli.series(ed, 0, [value(browser, "rms")], unit="rms", clip=True)
    frames = {"sum": levels(wanted.image, (0, 1)), "image": levels(ed.image, (0, 1))}
    assert not np.array_equal(frames["sum"], frames["image"])
    body, button = browser.find_element("tag name", "body"), element(browser, "blink")
    move(browser, "period", 200)
    for start, stop in ((button.click, lambda: body.send_keys("b")), (lambda: body.send_keys("b"), button.click)):
        start()
        assert button.get_attribute("aria-pressed") == "true"
        turns = []
        for _ in range(500):
            pixels, said = state(browser)
            view = said["view"]
            assert np.array_equal(pixels[..., :3], frames[view])
            turns += [view] if turns[-1:] != [view] else []
            if len(turns) == 4:
                break
            time.sleep(0.02)
        assert len(turns) == 4 and set(turns) == set(frames)
        stop()
        assert button.get_attribute("aria-pressed") == "false"
        assert_shows(browser, wanted.image, (0, 1))
    pick(browser, "view", "image")
    assert_shows(browser, ed.image, (0, 1))
    change = ed.operator.to_tensors(ed.result.eigenvectors)[0]
    for sign in (1, -1):
        body.send_keys("3")
        alone = 0.5 + 0.5 * sign * change / change.abs().max()
        assert np.abs(state(browser)[0][..., :3] - levels(alone, (0, 1))).max() <= 1
        body.send_keys("1")
        element(browser, "flip").click()
    assert "distortion 0" in element(browser, "shown").text


def test_several_entries_labels_that_are_markup_and_the_table(browser, tmp_path):
    eds = [synthesized(), synthesized((1, 3, 4, 4), torch.float32)]
    browser.get(plot.page([eds[0], (LABEL, eds[1])], tmp_path / "page.html", title=LABEL).as_uri())
    assert browser.title == LABEL and browser.find_element("tag name", "h1").text == LABEL
    for number, ed in enumerate(eds):
        choose(browser, "entry", number)
        choose(browser, "distortion", 1)
        assert_true(browser, ed, 1, (0, 1), "rms")
        (table,) = [t for t in browser.find_elements("tag name", "table") if t.is_displayed()]
        rows = [row.text for row in table.find_elements("css selector", "tbody tr")]
        columns = ed.result._columns()
        cells = zip(*columns.values(), strict=True)
        for row, texts, rms in zip(rows, cells, ed.detection_thresholds()[1], strict=True):
            assert row.startswith(" ".join(texts)) and row.endswith("∞" if np.isinf(rms) else f"{rms:.3e}")
        assert browser.find_element("css selector", ".entry:not([hidden]) tr[aria-current]").text == rows[1]
        text = browser.find_element("tag name", "main").text
        assert ed.result.ground in text and ed.result._head in text
    assert [h.text for h in browser.find_elements("tag name", "h2") if h.is_displayed()] == [LABEL]
    assert len(browser.find_elements("css selector", "script:not([type])")) == 1


@pytest.mark.parametrize(("width", "shape"), [(390, (40, 700)), (390, (60, 60)), (1280, (700, 40))])
def test_it_fits_the_window(browser, tmp_path, width, shape):
    image = torch.as_tensor(np.random.default_rng(0).random(shape), dtype=torch.float32)
    ed = Eigendistortion(image, lambda x: x[:9, :5].sin()).synthesize("golub_kahan", progress=False, tol=1e-5)
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(plot.page([("a" * 80, ed)], tmp_path / "page.html", title="b" * 90).as_uri())
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        box = browser.execute_script("return document.querySelector('canvas').getBoundingClientRect().toJSON()")
        dots = 2 * box["width"] / shape[1]
        np.testing.assert_allclose(box["height"] / box["width"], shape[0] / shape[1], rtol=1e-3)
        assert box["left"] >= 0 and box["right"] <= width
        assert dots < 1 or abs(dots - round(dots)) < 1e-3
        assert_shows(browser, stimuli.series(ed, 0, [0.05], unit="rms", clip=True)[0].image, (0, 1))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name_and_the_keyboard_reaches_it(browser, tmp_path):
    browser.get(plot.page([synthesized(), synthesized()], tmp_path / "page.html").as_uri())
    controls = browser.find_elements("css selector", "select, input, button")
    assert len(controls) >= 14 and all(one.accessible_name for one in controls)
    assert element(browser, "picture").accessible_name == "image + 0.346 × distortion 0"
    assert "RMS 0.05, " in element(browser, "slider").get_attribute("aria-valuetext")
    tab, reached = browser_keys().TAB, set()
    for _ in range(20):
        browser.switch_to.active_element.send_keys(tab)
        reached.add(browser.execute_script("return document.activeElement.id || document.activeElement.name"))
    assert reached >= {"entry", "distortion", "slider", "threshold", "rms", "unit", "logarithmic", "flip", "view"}
    assert reached >= {"blink", "period"}


# In a notebook


def images_in(text):
    for data in re.findall(r'<img src="data:image/png;base64,([^"]*)"', text):
        yield np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("shape", [(6, 8), (1, 3, 4, 4)])
def test_a_notebook_shows_pictures_and_the_table(shape):
    ed = synthesized(shape, noise=noise.Gaussian(4.0), subspace=spaces.zero_mean())
    text = ed._repr_html_()
    Checked(text)
    shown = list(images_in(text))
    scale = 0.05 * 48**0.5
    changes = ed.operator.to_tensors(ed.result.eigenvectors)
    expected = [ed.image, *(ed.image + s * scale * changes[i] for i in (0, -1) for s in (1, -1))]
    for pixels, image in zip(shown, expected, strict=True):
        assert np.array_equal(pixels.reshape(pictures(image).shape), pictures(levels_of(image, 0, 1, 255, None)))
    rms = ed.detection_thresholds()[1][0]
    assert ed.result._html(range(4)) not in text and f"<td>{rms:.3e}</td></tr>" in text
    assert all(word in text for word in (ed.result.ground, ed.result._head, "− distortion 46, RMS 0.05"))


def test_the_threshold_of_what_is_null_to_tol_is_a_lower_bound(tmp_path):
    image = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).reshape(2, 3)
    scales = torch.tensor([2, 1, 1, 1, 1, 1e-5], dtype=torch.float64).reshape(2, 3)
    ed = Eigendistortion(image, lambda x: scales * x).synthesize(progress=False)
    rms = ed.detection_thresholds()[1]
    for text in (ed._repr_html_(), plot.page(ed, tmp_path / "page.html").read_text(encoding="utf-8")):
        assert f"<td>5.000e-01</td><td>{rms[0]:.3e}</td></tr>" in text
        assert f"<td>null to tol</td><td>≥ 1.000e+05</td><td>≥ {rms[1]:.3e}</td></tr>" in text


def test_a_notebook_before_a_synthesis_and_of_what_is_no_picture():
    text = Eigendistortion(torch.rand(6), torch.sin)._repr_html_()
    assert "Nothing has been found yet: call synthesize()." in text and "<table>" not in text
    ed = synthesized((48,))
    text = ed._repr_html_()
    assert "No picture: the image must be grey" in text and text.endswith("</dl>") and "<table>" in text
    Checked(text)
    level = Eigendistortion(torch.full((6, 8), 7.0), torch.sin).synthesize(progress=False, tol=1e-5)
    assert "No picture: what is to be shown is 7 throughout" in level._repr_html_()


def test_a_notebook_shows_large_images_small():
    image = torch.as_tensor(np.random.default_rng(0).random((3, 300, 520)), dtype=torch.float32)
    ed = Eigendistortion(image, lambda x: x[:, :3, :5].sin()).synthesize(progress=False, tol=1e-5)
    first, *_ = shown = list(images_in(ed._repr_html_()))
    assert len(shown) == 5 and first.shape == (100, 173, 3) and "each pixel is the mean of 3 × 3" in ed._repr_html_()
    mean = image[:, :3, 3:6].mean((1, 2)).numpy() * 255
    np.testing.assert_allclose(first[0, 1], mean, atol=0.51)


def test_tables_of_a_notebook_are_cut_and_hold_no_markup():
    matrix = np.diag(np.linspace(2, 1, 80))
    ed = Eigendistortion(torch.rand(80, dtype=torch.float64), linear_model(matrix)).synthesize("exact", progress=False)
    text = ed.result._repr_html_()
    Checked(text)
    assert "<caption>50 of the 80 pairs that were found</caption>" in text and text.count("<tr>") == 51
    assert '<th scope="row">24</th>' in text and '<th scope="row">25</th>' not in text
    result = certify(ed.operator, ed.result.eigenvectors[:, :1], [0], method=LABEL, details={LABEL: LABEL}, rng=0)
    assert LABEL not in result._repr_html_() and LABEL in str(result)
    Checked(result._repr_html_())


def test_a_notebook_needs_no_matplotlib():
    code = (
        "import sys, torch; from fisherop import Eigendistortion; "
        "ed = Eigendistortion(torch.rand(6, 8), torch.sin).synthesize(progress=False, tol=1e-5); "
        "assert '<img' in ed._repr_html_(); print([m for m in sys.modules if m.startswith('matplotlib')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
