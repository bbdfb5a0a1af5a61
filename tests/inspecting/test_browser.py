"""The page in a browser: an address selects what it names, clicks and keys do what they say, and nothing hostile runs."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from inspected import HOSTILE, VOCABULARY, Page, build, page_of, ragged
from pkmem.inspecting import content

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser on this machine")


def shown(page: Path, address: str = "") -> str:
    """The page as the browser has it once its script has run, without the data and the script."""
    run = [str(BROWSER), *OPTIONS, "--virtual-time-budget=20000", "--dump-dom", f"{page.as_uri()}#{address}"]
    done = subprocess.run(run, check=True, timeout=120, capture_output=True)
    assert b'data-ready="yes"' in done.stdout
    return re.sub("<(script|style).*?</(script|style)>", "", done.stdout.decode(), flags=re.DOTALL)


def percent(share: float) -> str:
    """As JavaScript rounds it: halves up."""
    return f"{Decimal(100 * share).quantize(Decimal('0.1'), ROUND_HALF_UP)} %"


def texts_of(dom: str, element: str) -> str:
    """The texts inside an element of the page, without tags."""
    inside = dom.split(f'id="{element}"')[1].split("</section>")[0].split("</header>")[0].split(">", 1)[1]
    return " ".join(unescape(re.sub("<[^>]*>", " ", inside)).split())


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two memories, compared with those of another model."""
    out = tmp_path_factory.mktemp("page") / "x.html"
    torch.manual_seed(0)
    model, other = build(memory_layers=[0, 1]), build(memory_layers=[0, 1])
    return page_of(out, model, ragged(32, 5, 32), compared=other)


def test_an_address_selects_memory_slot_token_and_text(example: Path) -> None:
    page = Page(example)
    reads, top1 = page["memory_1.reads"], page["memory_1.top1"]
    slot = int(reads.sum(0).argmax())
    token = int(page["tokens"][33])
    dom = shown(example, f"memory=1&slot={slot}&at=33&token={token}")
    assert texts_of(dom, "trouble") == ""
    said = texts_of(dom, "slot")
    assert f"Slot {slot} ({slot // 8}, {slot % 8}) of memory_1" in said
    assert f"{reads[:, slot].sum()} reads, {top1[:, slot].sum()} as a head's best" in said
    for head in (0, 1):
        assert f"head {head} {reads[head, slot]} (best {top1[head, slot]})" in said
    place = page["memory_1.slots"].tolist().index(slot)
    assert said.count("open text") == (page["memory_1.contextAt"][place] < page.facts["numTokens"]).sum()
    word = page["vocabulary"][token]
    assert f"Slots that {word} reads in memory_1" in texts_of(dom, "token")
    best = int(page["memory_1.readSlots"][33, 0])
    assert f"{word} reads in memory_1" in texts_of(dom, "reads")
    assert f"slot weight heads {best} ({best // 8}, {best % 8})" in texts_of(dom, "reads")
    assert 'id="text-count">of 3<' in dom
    assert dom.count('class="chosen"') + dom.count('class="reader chosen"') >= 1


def test_figures_stand_beside_those_of_the_compared_model(example: Path) -> None:
    facts = Page(example).facts["memories"][0]
    said = texts_of(shown(example, "show=change&head=1"), "figures")
    for figures in (*facts["figures"], *facts["compared"]):
        assert percent(figures["usage"]) in said
        assert f"{figures['kl']:.3f}" in said
    assert said.count("compared") == 3


def test_an_address_of_nothing_selects_nothing(example: Path) -> None:
    dom = shown(example, "memory=9&slot=64&head=7&show=x&token=99999&at=5000&text=77&%00")
    assert texts_of(dom, "trouble") == ""
    assert "Choose a slot on the map" in texts_of(dom, "slot")


@pytest.mark.parametrize("show", ["reads", "top1", "dead", "compared", "change"])
def test_every_map_has_a_legend(example: Path, show: str) -> None:
    dom = shown(example, f"show={show}&slot=3")
    reads = Page(example)["memory_0.reads"].sum(0)
    assert texts_of(dom, "trouble") == ""
    legend = texts_of(dom, "swatches")
    if show in ("reads", "dead"):
        assert f"never read: {(reads == 0).sum()} slots ({percent((reads == 0).mean())})" in legend
    if show == "reads":
        assert f">{reads.max()}</span>" in dom  # the last number of the scale
    if show == "change":
        assert "Read here alone" in legend


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"keys": "flat"}, "Slot 5 of memory_0"),
        ({"experts": True}, "an expert of one neuron: this is its output weight"),
        ({"gate": True}, "The output gate scales and mixes a value"),
    ],
    ids=str,
)
def test_kinds_of_memories_are_told_apart(memory: dict, said: str, tmp_path: Path) -> None:
    page = page_of(tmp_path / "x.html", build(memory), ragged(32, 32))
    slot = 5 if "keys" in memory else int(Page(page)["memory_0.slots"][0])
    assert said in texts_of(shown(page, f"slot={slot}"), "slot")


def test_a_page_of_nothing_is_shown(tmp_path: Path) -> None:
    dom = shown(page_of(tmp_path / "x.html", build(), []), "slot=3")
    assert texts_of(dom, "trouble") == ""
    assert "Dead: no token of the texts reads it." in texts_of(dom, "slot")


def test_nothing_hostile_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(content, "token_texts", lambda _: [HOSTILE[i % len(HOSTILE)] for i in range(VOCABULARY)])
    folder = tmp_path / "<img src=x onerror=\"document.title='owned'\">"
    folder.mkdir()
    name, data = "".join(HOSTILE), "</script>".join(HOSTILE)
    page = page_of(folder / "x.html", build(), ragged(32, 32), compared=build(), name=name, data=data)
    slot = int(Page(page)["memory_0.slots"][0])
    dom = shown(page, f"slot={slot}&at=3&token=0&%3Cimg%20src=x%20onerror=alert(1)%3E")
    assert "<title>owned" not in dom
    assert "<img" not in dom
    assert "onerror=" in texts_of(dom, "text")  # as text
    assert "\\u202e" in texts_of(dom, "text")  # made visible


# With a driver: clicks and keys


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser that is driven, and waits until it is ready."""
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver on this machine")
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def open_it(page: Path, address: str = "", width: int = 1280) -> Any:
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        browser.get("about:blank")
        browser.get(f"{page.as_uri()}#{address}")
        browser.wait = WebDriverWait(browser, 60)
        browser.wait.until(lambda b: b.execute_script("return document.body.dataset.ready"))
        return browser

    yield open_it
    browser.quit()


def text_of(browser: Any, element: str) -> str:
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", element)


def test_a_click_chooses_the_slot_under_it_and_keys_go_on_from_there(example: Path, open_page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    for width in (1280, 390):
        browser = open_page(example, width=width)
        box = browser.find_element("id", "map")
        size = box.size["width"]
        # slot (2, 5) of 8 x 8, counted from the middle of the element
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        ActionChains(browser).move_to_element_with_offset(
            box, int(size * 1.5 / 8), int(-size * 1.5 / 8)
        ).click().perform()
        browser.wait.until(lambda b: "Slot 21 (2, 5) of memory_0" in text_of(b, "slot"))
        assert text_of(browser, "under").startswith("Slot 21 (2, 5): ")
        box.send_keys(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
        browser.wait.until(lambda b: "Slot 28 (3, 4) of memory_0" in text_of(b, "slot"))
        assert "slot=28" in browser.current_url
        box.send_keys("+", Keys.ARROW_UP)
        browser.wait.until(lambda b: "Slot 20 (2, 4) of memory_0" in text_of(b, "slot"))
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.get_log("browser") == []


def test_texts_and_tokens_are_searched_and_lead_to_slots(example: Path, open_page) -> None:
    page = Page(example)
    browser = open_page(example)
    token = int(page["tokens"][0])
    word = page["vocabulary"][token]
    browser.find_element("id", "token-search").send_keys(word)
    times = (page["tokens"] == token).sum()
    browser.wait.until(lambda b: f"{word} ×{times}" in text_of(b, "token-matches"))
    browser.find_element("css selector", "#token-matches button").click()
    browser.wait.until(lambda b: f"Slots that {word} reads in memory_0" in text_of(b, "token"))
    place = page["types"].tolist().index(token)
    best = int(page["memory_0.byWeightSlots"][place, 0])
    browser.find_element("css selector", "#token a").click()
    browser.wait.until(lambda b: text_of(b, "slot").startswith(f"Slot {best} ({best // 8}, {best % 8})"))
    text = "".join(page["vocabulary"][i] for i in page["tokens"][32:37])  # the second text
    browser.find_element("id", "text-search").send_keys(text)
    browser.wait.until(lambda b: "1 found" in text_of(b, "text-matches"))
    browser.find_element("css selector", "#text-matches button").click()
    browser.wait.until(lambda b: "reads in memory_0" in text_of(b, "reads"))
    assert "at=32" in browser.current_url
    assert browser.find_element("id", "text-number").get_attribute("value") == "2"
    assert browser.get_log("browser") == []


def test_the_map_is_drawn_in_colours_of_the_counts(example: Path, open_page) -> None:
    reads = Page(example)["memory_1.reads"][0]
    browser = open_page(example, "memory=1&head=0")
    colours = browser.execute_script(
        "const image = view.picture.getContext('2d').getImageData(0, 0, 8, 8).data;"
        "return Array.from({length: 64}, (_, i) => [...image.slice(4 * i, 4 * i + 3)].join())"
    )
    by_count: dict[int, set[str]] = {}
    for count, colour in zip(reads.tolist(), colours, strict=True):
        by_count.setdefault(count, set()).add(colour)
    assert all(len(colours) == 1 for colours in by_count.values())
    assert by_count[int(reads.max())] == {"253,231,37"}
    drawn = "const c = document.getElementById('map'); return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert browser.execute_script(drawn) > 2
