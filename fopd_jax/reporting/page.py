"""The page itself: template, style and programs of `assets/` with the numbers and pictures in it, in one file.

It asks nothing of any machine, and its own policy forbids it: a browser runs the two programs whose hashes stand in the
page, and nothing that a prompt or a name might smuggle in. Numbers and pictures are JSON that no program contains.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fopd_jax.exits import need
from fopd_jax.reporting.content import Content
from fopd_jax.reporting.entities import GROUND

ASSETS = Path(__file__).parent / "assets"
LIBRARY = "chart.umd.min.js"
PROGRAMS = ("base.js", "tables.js", "charts.js", "sections.js", "training.js", "cost.js", "gallery.js", "main.js")
"""Ours, in this order, as one."""


def render(content: Content, live: float = 0.0) -> str:
    """The HTML; `live`: seconds between two looks for new numbers at the server that it came from, 0: it has none.

    Raises:
      ValueError: jinja2 is not installed.
    """
    need("report", "report", "jinja2")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    scripts = {"library": _library(), "program": "\n".join(_asset(name) for name in PROGRAMS)}
    style = _asset("style.css")
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        data=content.data, title=content.data["title"], ground=GROUND, live=live, style=style, **scripts,
        policy=_policy(list(scripts.values()), style, bool(live)),
        numbers=to_json(content.data), pictures=to_json(content.pictures),
        licence=_asset("chart.LICENSE.txt"),
    )  # fmt: skip


def to_json(value: Any) -> str:
    """JSON that ends no element of HTML, whatever texts it holds; what is no finite number is null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text.encode("utf-8", "backslashreplace").decode()  # halves of pairs, which no file can hold


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").strip()


def _library() -> str:
    """Without the line that has browsers look for its sources."""
    text = _asset(LIBRARY)
    return text.partition("\n//# sourceMappingURL")[0]


def _policy(scripts: list[str], style: str, live: bool) -> str:
    def sha(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    own, asked = (" 'self'", "'self'") if live else ("", "'none'")
    return (
        f"default-src 'none'; script-src {' '.join(map(sha, scripts))}; style-src {sha(style)}; "
        f"img-src data:{own}; connect-src {asked}; base-uri 'none'; form-action 'none'"
    )
