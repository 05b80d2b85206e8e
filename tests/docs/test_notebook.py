"""The notebook of the first hour runs from its first cell to its last, and shows what it made."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("notebook", ROOT / "scripts" / "notebook.py")
SCRIPT = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)
PAGE = json.loads(SCRIPT.NOTEBOOK.read_text(encoding="utf-8"))
CODE = [cell for cell in PAGE["cells"] if cell["cell_type"] == "code"]


def kinds(cells):
    """What each cell shows: text, pictures."""
    return [[output["output_type"] for output in cell["outputs"]] for cell in cells]


@pytest.mark.slow
def test_no_cell_raises_and_each_shows_what_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = copy.deepcopy(PAGE)
    SCRIPT.execute(again)
    assert kinds(cell for cell in again["cells"] if cell["cell_type"] == "code") == kinds(CODE), (
        "run: python scripts/notebook.py"
    )


def test_a_cell_that_raises_is_caught():
    broken = {"cells": [{"cell_type": "code", "id": "broken", "source": ["1 / 0"]}]}
    with pytest.raises(ZeroDivisionError):
        SCRIPT.execute(broken)


def test_the_page_is_whole_and_small():
    assert SCRIPT.NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert len({cell["id"] for cell in PAGE["cells"]}) == len(PAGE["cells"])
    shown = json.dumps([[output.get("text") for output in cell["outputs"]] for cell in CODE])
    assert "/tmp" not in shown and "/home" not in shown


def test_its_links_lead_somewhere():
    text = "".join(line for cell in PAGE["cells"] for line in cell["source"])
    links = re.findall(r"https://github.com/khanhllm/khanhllm/blob/main/([^)]+)", text)
    assert links and all((ROOT / link).exists() for link in links)


def test_each_step_is_explained():
    before = {after["id"]: cell["cell_type"] for cell, after in zip(PAGE["cells"], PAGE["cells"][1:], strict=False)}
    assert {before[cell["id"]] for cell in CODE} == {"markdown"}
