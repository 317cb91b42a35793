"""The page that says where weights and prompts come from: it makes what the config reads, and messages lead to it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fopd_jax.config.schema import Model, Run
from fopd_jax.exits import GUIDE
from fopd_jax.stages.pipeline import make_pipeline
from fopd_jax.tasks.prompts import read_prompts
from tests.configs import load, pipeline

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / GUIDE).read_text()


def test_the_page_makes_what_the_config_reads():
    config = load("sd35m_opd")
    assert f"--dst {config.model.path}" in PAGE
    for name, task in config.tasks.items():
        assert f"--local-dir {task.teacher}\n" in PAGE
        folder = str(Path(task.prompts).parent)
        assert re.search(rf"mkdir .*\b{folder}\b", PAGE)
        assert folder == f"data/{name}" == str(Path(task.test).parent)


def test_the_pages_line_of_python_reads_geneval(tmp_path: Path):
    source = re.search(r"python -c '(.*?)' \\", PAGE)
    assert source
    rows = [{"tag": "counting", "prompt": text} for text in ("a photo of two cats", "a photo of a dog")]
    lines = "\n".join(json.dumps(row) for row in (*rows, rows[0]))
    done = subprocess.run([sys.executable, "-c", source[1]], input=lines, capture_output=True, text=True, check=True)
    (tmp_path / "train.txt").write_text(done.stdout)
    assert read_prompts(tmp_path / "train.txt", "prompts") == ("a photo of two cats", "a photo of a dog")


def test_what_is_not_there_is_named_with_what_makes_it(tmp_path: Path):
    with pytest.raises(
        ValueError, match=rf"model.path: weights/none: no such .* tools/convert_sd35_weights.py .* {GUIDE}"
    ):
        make_pipeline(Model(path="weights/none"), Run(), dict)
    with pytest.raises(
        ValueError, match=r"none.safetensors: no such file or folder; configs/miniature_pretrain.py makes"
    ):
        make_pipeline(Model(preset="miniature", path="none.safetensors"), Run(), dict)
    with pytest.raises(ValueError, match=rf"tasks.a.prompts: cannot read 'none.txt' .*, see {GUIDE}"):
        read_prompts(Path("none.txt"), "tasks.a.prompts")
    from fopd_jax.stages.pipeline import load_policy

    with pytest.raises(
        ValueError, match=r"teachers/none: no such file or folder; configs/miniature_teacher.py makes one"
    ):
        load_policy("teachers/none", pipeline(load()))
