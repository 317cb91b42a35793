"""The page in a headless Chromium, from a file: at once, without a request, by keyboard, in both themes, on a phone.

Chromium and its driver are Debian's packages `chromium` and `chromium-driver`; the tests skip where either is absent.
With FOPD_JAX_SCREENSHOTS=FOLDER the pictures that are looked at are kept there.
"""

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fopd_jax.reporting.content import Sources, gather
from fopd_jax.reporting.page import render
from fopd_jax.reporting.serving import Fresh, bind
from tests.reporting import made

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

LOADED_S = 2.0
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs, and four models with 200 images each."""
    folder = tmp_path_factory.mktemp("browser")
    made.make_runs(folder / "runs", steps=400)
    made.make_evaluation(folder / "eval", prompts=200, runs=folder / "runs")
    return folder


@pytest.fixture(scope="module")
def page(folders: Path) -> Path:
    runs = tuple(("", folders / "runs" / name) for name in made.ENDS)
    (folders / "page.html").write_text(render(gather(Sources(runs, (folders / "eval",)))), encoding="utf-8")
    return folders / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    resize(browser, width=1360, height=900, deviceScaleFactor=1, mobile=False)
    prefer(browser, "light")
    for log in ("browser", "performance"):
        browser.get_log(log)  # what came before
    browser.get(page.as_uri())
    browser.execute_script("localStorage.clear(); document.documentElement.style.scrollBehavior = 'auto'")
    return browser


def resize(browser: Any, **metrics: Any) -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(browser: Any, theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def until(holds: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


def all_of(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser: Any, selector: str) -> list[str]:
    """Texts as they stand in the page, shown or not."""
    return browser.execute_script(
        f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)"
    )


def show_everything(browser: Any) -> None:
    """Scroll through the page, so that every chart is drawn."""
    top = 0
    while top < browser.execute_script("return document.documentElement.scrollHeight"):
        scroll(browser, f"{{top: {top}, behavior: 'instant'}}")
        top += 600
    scroll(browser, "{top: 0, behavior: 'instant'}")


def scroll(browser: Any, where: str) -> None:
    browser.execute_async_script(
        f"scrollTo({where}); requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0], 30)))"
    )


def requests_of(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]


def errors_of(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_it_opens_at_once_without_a_request_or_an_error(opened: Any, page: Path):
    opened.get_log("performance")
    began = time.monotonic()
    opened.get(page.as_uri())
    assert all_of(opened, "#scores table")
    assert time.monotonic() - began < LOADED_S
    timing = opened.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < timing < 1000 * LOADED_S
    show_everything(opened)
    asked = [url for url in requests_of(opened) if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    assert errors_of(opened) == []
    drawn = opened.execute_script(
        "return [...document.querySelectorAll('canvas')].map(c => Boolean(Chart.getChart(c)))"
    )
    assert len(drawn) > 10
    assert all(drawn)
    names = ["Scores", "Gallery", "Seesaw", "Runs", "Training curves", "Gap to the teachers", "Cost", "Configs"]
    assert texts(opened, "#nav a") == names


def test_tables_are_sorted_and_walked_by_keyboard(opened: Any):
    table = "#scores .card:first-child table"
    head = all_of(opened, f"{table} thead button")[1]
    head.send_keys(Keys.ENTER)

    def column() -> list[float]:
        return [float(text) for text in texts(opened, f"{table} tbody td:nth-child(2) .value")]

    assert column() == sorted(column(), reverse=True)
    focused = opened.switch_to.active_element
    assert focused.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    focused.send_keys(Keys.ENTER)
    assert column() == sorted(column())
    cell = all_of(opened, f"{table} tbody th")[0]
    opened.execute_script("arguments[0].focus()", cell)
    cell.send_keys(Keys.ARROW_RIGHT)
    opened.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    tip = all_of(opened, "#tip")[0]
    assert tip.is_displayed()
    assert "95 % interval" in tip.text
    assert "guidance 4.5" in tip.text
    assert "200 images" in tip.text


def test_best_values_are_bold_and_starred(opened: Any):
    best = all_of(opened, "#scores td.best .value")
    assert len(best) == 6
    weight, mark = opened.execute_script(
        "return [getComputedStyle(arguments[0]).fontWeight, getComputedStyle(arguments[0], '::before').content]",
        best[0],
    )
    assert int(weight) >= 700
    assert mark == '"★"'


def test_the_gallery_is_filtered_and_enlarged_by_keyboard(opened: Any):
    opened.find_element(By.TAG_NAME, "body").send_keys("/")
    opened.switch_to.active_element.send_keys("red circle")
    prompts = texts(opened, "#gallery article > h3")
    assert prompts
    assert all("red" in prompt and "circle" in prompt for prompt in prompts)
    gaps = [float(text) for text in texts(opened, "#gallery .gap")]
    assert gaps == sorted(gaps)
    picture = all_of(opened, "#gallery figure button")[0]
    picture.send_keys(Keys.ENTER)
    assert all_of(opened, "#viewer[open]")
    assert texts(opened, "#viewer h3")[0] in prompts[0]
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert texts(opened, "#viewer h3")[0] in prompts[1]
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not all_of(opened, "#viewer[open]")
    assert errors_of(opened) == []


def test_where_the_student_loses_can_be_found(opened: Any, page: Path):
    opened.execute_script("window.scrollTo(0, document.getElementById('gallery').offsetTop)")
    selects = {
        label.text.split("\n")[0]: label.find_element(By.TAG_NAME, "select")
        for label in all_of(opened, "#gallery .controls label")[:-1]
        if label.is_displayed()
    }
    selects["Model"].send_keys("opd")
    selects["against"].send_keys("teacher")
    selects["Only"].send_keys("losses")
    status = texts(opened, "#gallery [role=status]")[0]
    content = json.loads(opened.execute_script("return document.getElementById('data').textContent"))
    rows = [row["models"] for row in content["galleries"][0]["rows"]]
    lost = [row for row in rows if row["opd"]["scores"]["geneval"] < row["teacher-composition"]["scores"]["geneval"]]
    assert (
        status
        == f"{len(lost)} rows of 200; of them opd scores lower than teacher-composition on {len(lost)}, higher on 0."
    )
    assert all(float(text) < 0 for text in texts(opened, "#gallery .gap"))


def test_a_run_that_is_hidden_is_hidden_everywhere(opened: Any):
    key = next(button for button in all_of(opened, "#legend button") if button.text == "grpo-mix")
    key.send_keys(Keys.SPACE)
    assert key.get_attribute("aria-pressed") == "false"
    for place in ("#scores tbody th", "#runs h3", "#cost tbody th", "#gallery figcaption .who", "#configs thead th"):
        shown = texts(opened, place)
        assert shown
        if place != "#runs h3":
            assert not any("grpo-mix" in text for text in shown), place
    key.send_keys(Keys.SPACE)
    assert any("grpo-mix" in text for text in texts(opened, "#cost tbody th"))


def test_themes_follow_the_system_until_one_is_chosen(opened: Any):
    def ground() -> str:
        return opened.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = ground()
    prefer(opened, "dark")
    dark = ground()
    assert dark != light
    button = all_of(opened, "#theme")[0]
    button.send_keys(Keys.ENTER)
    assert (button.text, ground()) == ("☀ Light", light)
    button.send_keys(Keys.ENTER)
    prefer(opened, "light")
    assert (button.text, ground()) == ("☾ Dark", dark)
    opened.refresh()
    assert ground() == dark
    opened.find_element(By.TAG_NAME, "body").send_keys("t")
    assert ground() == light
    assert errors_of(opened) == []


@pytest.mark.parametrize(
    ("name", "theme", "size", "place"),
    [
        ("light", "light", (1360, 1500), ""),
        ("dark", "dark", (1360, 1500), "seesaw"),
        ("phone", "light", None, "gallery"),
    ],
)
def test_screenshots(
    opened: Any, page: Path, tmp_path: Path, name: str, theme: str, size: tuple[int, int] | None, place: str
):
    """What stands on them is looked at by people; here, that nothing is cut off and that charts have colour."""
    prefer(opened, theme)
    if size is None:
        resize(opened, **PHONE)
    else:
        resize(opened, width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
    opened.get(page.as_uri())
    show_everything(opened)
    wide, shown = opened.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= shown
    for _ in range(3):  # what comes into view moves what is below it
        scroll(opened, f"{{top: (document.getElementById('{place}')?.offsetTop ?? 0) - 96, behavior: 'instant'}}")
    picture = Image.open(io.BytesIO(opened.get_screenshot_as_png())).convert("RGB")
    colours = picture.getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 200
    folder = Path(os.environ.get("FOPD_JAX_SCREENSHOTS", tmp_path))
    picture.save(folder / f"report_{name}.png", optimize=True)
    assert (folder / f"report_{name}.png").stat().st_size <= 200_000


def test_any_part_alone_is_a_page(opened: Any, folders: Path, tmp_path: Path):
    """Runs alone, one that has written nothing but its results, models alone, and names that look like markup."""
    only = tmp_path / "only"
    only.mkdir()
    made.write(only / "results.json", {"models": {"base": {"a": 1.0}, "student": {"a": 2.0, "b": None}}})
    begun = tmp_path / "<img src=x onerror=alert(1)>"
    begun.mkdir()
    made.write(begun / "config.json", {"stage": "</script><b>", "tasks": "{{ 1 }}"})
    made.lines(
        begun / "metrics.jsonl", [{"step": 1, "train/loss": float("nan"), "eval/<i>": 1.0, "train/gap/a/t00": 1.0}]
    )
    odd = (("", begun), ("", only))
    for shown in (Sources(odd), Sources(odd[:1]), Sources(odd[1:]), Sources((), (folders / "eval",))):
        (tmp_path / "page.html").write_text(render(gather(shown)), encoding="utf-8")
        opened.get((tmp_path / "page.html").as_uri())
        show_everything(opened)
        for name in ("steps", "Radar"):
            for button in [each for each in all_of(opened, ".segments button") if each.text == name]:
                button.send_keys(Keys.ENTER)
        assert all_of(opened, "main section")
        assert not all_of(opened, "main b, main i, main section img[src='x']")
        assert errors_of(opened) == []


def test_a_served_page_follows_its_run(browser: Any, tmp_path: Path):
    run = made.make_run(tmp_path / "sft", "sft")
    with bind(0, Fresh(Sources((("", run),)), every=0.2)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            resize(browser, width=1360, height=900, deviceScaleFactor=1, mobile=False)
            errors_of(browser)
            browser.get(f"http://127.0.0.1:{server.server_port}/")
            until(lambda: texts(browser, "#live") == ["live"])
            assert "30 / 40" in texts(browser, "#runs dl")[0]
            browser.execute_script("window.kept = true; document.querySelector('#runs summary').click()")
            browser.execute_script("document.querySelector('#runs summary').focus()")
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write('{"step": 33, "train/loss": 0.5}\n')
            until(lambda: "33 / 40" in texts(browser, "#runs dl")[0])
            assert browser.execute_script("return window.kept")
            assert all_of(browser, "#runs details[open]")
            assert browser.switch_to.active_element.tag_name == "summary"
            assert errors_of(browser) == []
        finally:
            server.shutdown()
            thread.join(10)
    until(lambda: texts(browser, "#live") == ["not connected"])
