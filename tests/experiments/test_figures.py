"""Every figure and picture of the READMEs in experiments/ matches the data in the same folder.

`figures.py` in the folder of a study computes `FIGURES`, texts of its README that contain figures, and `ELSEWHERE`,
texts of other pages. `GIVEN` are texts whose numbers are settings, dates and names. Together they cover every number of
the README outside code, links and the generated part.
"""

import re
import runpy
import shutil
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from gpt2.experiments.results import CLOSING, OPENING, Results, with_section
from gpt2.runtime.repository import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "experiments").glob("**/figures.py"))
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/results.csv"))
PICTURES = sorted(path for folder in FOLDERS for path in folder.glob("*.png"))
NAME = re.compile(r"\W*[A-Za-z]")  # such as bf16
ORDER = ["# ", "## Question", "## Answer", "![", "| ", "## Command", "## Cost", "## What it does not say"]


def of_folder(path: Path) -> str:
    return str(path.relative_to(ROOT / "experiments"))


@cache
def computed(folder: Path) -> dict:
    return runpy.run_path(str(folder / "figures.py"))


def prose(text: str) -> str:
    """A page in one line, without its generated part, blocks of code, and targets of links."""
    for pattern in (f"{re.escape(OPENING)}.*?{re.escape(CLOSING)}", r"^```.*?^```$", r"(?<=\])\([^)]*\)"):
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(text.split())


def problems(text: str, figures: list[str], given: list[str]) -> list[str]:
    """Texts that a page lacks, and numbers of the page that no text covers."""
    page = prose(text)
    lacking = [f"lacks: {each}" for each in [*figures, *given] if each not in page]
    for each in sorted([*figures, *given], key=len, reverse=True):
        page = page.replace(each, "...")
    words = re.findall(r"\S*\d\S*", re.sub("`[^`]*`", "", page))
    return lacking + [f"not computed: {word}" for word in words if not NAME.match(word)]


@pytest.mark.parametrize("folder", FOLDERS, ids=of_folder)
def test_every_figure_of_a_readme_is_computed(folder):
    figures = computed(folder)
    assert not problems((folder / "README.md").read_text(), figures["FIGURES"], figures["GIVEN"])
    for page, texts in figures.get("ELSEWHERE", {}).items():
        assert not [text for text in texts if text not in prose((ROOT / page).read_text())], page


def test_changed_figure_is_found():
    text = "A loss of 1.25 after\n400 steps, see [x](a_2.md) and `seed=3`.\n```\n17\n```\n"
    assert not problems(text, ["loss of 1.25"], ["400 steps"])
    assert problems(text, ["loss of 1.26"], ["400 steps"]) == ["lacks: loss of 1.26", "not computed: 1.25"]


def test_changed_data_are_found(tmp_path):
    """After a change in `results.csv`, the sentence, the generated part and the picture no longer match."""
    folder = shutil.copytree(ROOT / "experiments" / "depth_or_width", tmp_path / "depth_or_width")
    data, readme = (folder / "results.csv"), (folder / "README.md").read_text()
    data.write_text(data.read_text().replace(",1.79", ",1.78"))
    figures = runpy.run_path(str(folder / "figures.py"))
    assert "not computed: 1.790," in problems(readme, figures["FIGURES"], figures["GIVEN"])
    assert with_section(readme, Results(folder).section()) != readme
    assert Image.open(folder / "results.png").text["Source"] != sha256(data.read_bytes()).hexdigest()


@pytest.mark.parametrize("folder", STUDIES, ids=of_folder)
def test_generated_part_is_that_of_the_results(folder):
    results, text = Results(folder), (folder / "README.md").read_text()
    assert with_section(text, results.section()) == text, "python -m gpt2.main study FOLDER --redraw"


@pytest.mark.parametrize("folder", sorted({*FOLDERS} - {ROOT / "experiments"}), ids=of_folder)
def test_parts_of_a_readme_are_in_order(folder):
    text = (folder / "README.md").read_text()
    places = {part: text.find(part) for part in ORDER if part != "![" or "![" in text}
    assert list(places.values()) == sorted(places.values()), places
    assert places["# "] == 0


@pytest.mark.parametrize("path", PICTURES, ids=of_folder)
def test_picture_is_drawn_from_a_file_beside_it(path):
    files = {sha256(file.read_bytes()).hexdigest() for file in path.parent.iterdir() if file.is_file()}
    assert Image.open(path).text["Source"] in files


def test_every_study_has_its_figures():
    folders = {path.parent for path in (ROOT / "experiments").glob("*/*.*") if path.parent.name != "__pycache__"}
    assert {path.parent for path in (ROOT / "experiments").glob("**/README.md")} == {*FOLDERS}
    assert {*folders, ROOT / "experiments"} == {*FOLDERS}
