"""The page: one file that holds what it shows, asks nothing of anybody, and lets no text become markup."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fopd_jax.evaluation.records import Cell, Record, Settings, write_cell
from fopd_jax.reporting.content import Sources, gather
from fopd_jax.reporting.page import ASSETS, LIBRARY, PROGRAMS, render, to_json
from tests.reporting import made

HOSTILE = (
    "</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>',
    "a 'quoted' \"sign\" & 🎨👩‍🎨 <!-- <![CDATA[",
    "line\u2028break\u2029 {{ 7*7 }} {% raw %} \\u003c", "\ud800 half a pair",
)  # fmt: skip


class Page(HTMLParser):
    """What a browser finds: elements, each with the text up to the next tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(("", {}))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def all(self, tag: str) -> list[tuple[dict[str, Any], str]]:
        return [(attrs, text) for (name, attrs), text in zip(self.elements, self.texts, strict=True) if name == tag]

    def json(self, name: str) -> Any:
        return next(json.loads(text) for attrs, text in self.all("script") if attrs.get("id") == name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made.make_runs(folder / "runs", steps=40)
    made.make_evaluation(folder / "eval", prompts=12, runs=folder / "runs", side=16)
    return folder


def sources(folder: Path, **more: Any) -> Sources:
    return Sources(tuple(("", path) for path in sorted((folder / "runs").iterdir())), (folder / "eval",), **more)


def test_all_numbers_and_pictures_are_in_one_block_each(folders: Path):
    content = gather(sources(folders, title="Mine & yours"))
    page = Page(render(content))
    data, pictures = page.json("data"), page.json("pictures")
    assert data["title"] == "Mine & yours"
    assert [run["name"] for run in data["runs"]] == ["grpo-mix", "opd", "opd-direct", "sft"]
    assert data["slots"]["opd"] == 1
    assert [table["suite"] for table in data["tables"]] == ["geneval", "Final reports of the runs"]
    assert data["skills"] == list(made.SKILLS)
    assert data["problems"] == []
    shown = {cell["image"] for row in data["galleries"][0]["rows"] for cell in row["models"].values()}
    assert shown == set(pictures)
    assert all(uri.startswith("data:image/webp;base64,") for uri in pictures.values())
    opd = data["runs"][1]
    assert opd["device_hours"] == pytest.approx(8 * opd["hours"])
    assert opd["hours"] * 3600 == pytest.approx(sum(opd["seconds"].values()))
    assert opd["final"] == made.ENDS["opd"]


def test_nothing_is_asked_of_anybody(folders: Path):
    page = Page(render(gather(sources(folders))))
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not page.all("iframe")
    (style,) = page.all("style")
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policy = next(attrs["content"] for attrs, _ in page.all("meta") if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    assert "sourceMappingURL" not in "".join(text for _, text in page.all("script"))


def test_the_policy_names_what_the_page_runs_and_nothing_else(folders: Path):
    page = Page(render(gather(sources(folders))))
    policy = next(attrs["content"] for attrs, _ in page.all("meta") if attrs.get("http-equiv"))
    named = set(re.findall(r"'sha256-([^']+)'", policy))
    run = [text for attrs, text in page.all("script") if attrs.get("type") != "application/json"]
    run += [text for _, text in page.all("style")]
    assert named == {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run}
    assert len(named) == 3


def test_hostile_texts_are_harmless(tmp_path: Path):
    run = made.make_run(tmp_path / "run", "opd")
    start = json.loads((run / "run.json").read_text(encoding="utf-8"))
    start["starts"][0]["command"] = list(HOSTILE)
    start["starts"][0]["config"]["name"] = HOSTILE[0]
    made.write(run / "run.json", start)
    made.lines(run / "metrics.jsonl", [{"step": 1, HOSTILE[0]: 1.0, f"eval/{HOSTILE[1]}": 2.0}])
    cell = tmp_path / "eval" / "m" / "s" / "t"
    cell.mkdir(parents=True)
    records = [
        Record(str(k), 0, text, "", {HOSTILE[0]: 1.0}, {"x": text}, {text[:4]: text})
        for k, text in enumerate(HOSTILE[:-1])
    ]
    write_cell(
        cell,
        Cell(HOSTILE[0], HOSTILE[1], HOSTILE[3], Settings("ode", 4, 1.0, 0.0, 8, 3.0, 1), records, {"a": HOSTILE[2]}),
    )
    page = Page(render(gather(Sources((("", run),), (tmp_path / "eval",), HOSTILE[0]))))
    assert len(page.all("script")) == 4
    assert not page.all("img")
    data = page.json("data")
    assert data["title"] == HOSTILE[0]
    assert page.all("title")[0][1] == HOSTILE[0]
    assert [row["prompt"] for row in data["galleries"][0]["rows"]] == list(HOSTILE[:-1])
    assert HOSTILE[0] in data["curves"]
    assert HOSTILE[4] in data["runs"][0]["about"]["command"]


@pytest.mark.parametrize("text", HOSTILE)
def test_json_for_html_comes_back_and_ends_no_element(text: str):
    written = to_json({"a": text, text: [1.5, math.nan, -math.inf, None, True]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"a": text, text: [1.5, None, None, None, True]}
    written.encode()


def test_it_is_small(folders: Path):
    text = render(gather(sources(folders)))
    own = sum((ASSETS / name).stat().st_size for name in ("style.css", *PROGRAMS))
    assert own < 90_000
    assert (ASSETS / LIBRARY).stat().st_size < 250_000
    assert len(text) < 700_000


def test_the_library_is_the_one_that_its_licence_names():
    licence = (ASSETS / "chart.LICENSE.txt").read_text(encoding="utf-8")
    library = (ASSETS / LIBRARY).read_bytes()
    assert hashlib.sha256(library).hexdigest() in licence
    assert re.search(rb"Chart\.js v([\d.]+)", library)[1].decode() in licence  # type: ignore[index]
    assert "MIT License" in licence
    assert b"</script" not in library


def test_without_javascript_the_tables_are_there(folders: Path):
    text = render(gather(sources(folders)))
    inside = text.partition("<noscript>")[2].partition("</noscript>")[0]
    page = Page(inside)
    assert len(page.all("table")) == 2
    assert {"opd", "base", "teacher-composition"} <= {text.strip() for _, text in page.all("th")}
    assert sum("★" in text for _, text in page.all("td")) == 6


def test_headings_have_an_order_and_controls_names(folders: Path):
    page = Page(render(gather(sources(folders))))
    assert len(page.all("h1")) == 1
    assert page.elements[0] == ("html", {"lang": "en"})
    assert any(attrs.get("name") == "viewport" for attrs, _ in page.all("meta"))
    assert all(attrs.get("aria-label") for attrs, text in page.all("button") if not text.strip())


def test_no_jinja2_is_one_clear_error(folders: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"report: needs jinja2: pip install 'fopd_jax\[report\]'"):
        render(gather(sources(folders)))
