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
