"""Random pipelines are written where nothing is, or where that is asked for."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fopd_jax.exits import BAD_INPUT


def test_what_is_there_is_not_replaced(
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    tool, made = load_script("tools/random_pipeline.py"), []
    monkeypatch.setattr(tool, "make_pipeline", lambda dst, *rest: made.append(dst))
    (tmp_path / "somebodys").write_text("weights")
    for dst, message in (
        (str(tmp_path), f"error: dst: {tmp_path} exists and is not an empty folder; choose another, or give --force"),
        (str(tmp_path / "somebodys"), f"error: dst: {tmp_path}/somebodys exists and is not an empty folder"),
        ("gs://bucket/pipeline", "error: dst: found 'gs://bucket/pipeline', expected a path on this machine"),
    ):
        monkeypatch.setattr("sys.argv", ["random_pipeline", f"--dst={dst}"])
        with pytest.raises(SystemExit) as stop:
            tool.main()
        assert stop.value.code == BAD_INPUT
        assert capsys.readouterr().err.startswith(message)
    assert made == []
    monkeypatch.setattr("sys.argv", ["random_pipeline", f"--dst={tmp_path}", "--force"])
    tool.main()
    monkeypatch.setattr("sys.argv", ["random_pipeline", f"--dst={tmp_path / 'new'}"])
    tool.main()
    assert made == [tmp_path, tmp_path / "new"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--components=nope"], "components: found 'nope', expected some of transformer, vae, text_encoder"),
        (["--components=vae,"], "components: found '', expected some of"),
        (["--components="], "components: found '', expected some of"),
        (["--t5-layers=-1"], "t5-layers: found -1, expected 1 to 3, as --size=tiny has"),
        (["--t5-layers=0"], "t5-layers: found 0, expected 1 to 3"),
        (["--size=medium", "--t5-layers=25"], "t5-layers: found 25, expected 1 to 24, as --size=medium has"),
        (["--t5-layers=two"], "argument --t5-layers: invalid int value: 'two' (--help lists what there is)"),
        (["--siz=tiny"], "unrecognized arguments: --siz=tiny (--help lists what there is)"),
        (["--dst=/proc/x"], "dst: /proc cannot be written"),
        (["--dst=LINK"], "dst: LINK exists and is not an empty folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_made(
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
):
    tool, link = load_script("tools/random_pipeline.py"), tmp_path / "link"
    link.symlink_to("nothing")
    monkeypatch.setattr(tool, "make_pipeline", lambda *rest: pytest.fail("nothing is to be made"))
    spelled = [each.replace("LINK", str(link)) for each in flags]
    monkeypatch.setattr("sys.argv", ["random_pipeline", f"--dst={tmp_path / 'new'}", *spelled])
    with pytest.raises(SystemExit) as stop:
        tool.main()
    error = capsys.readouterr().err
    assert stop.value.code == BAD_INPUT
    assert error.startswith(f"error: {message.replace('LINK', str(link))}")
    assert error.count("\n") == 1
