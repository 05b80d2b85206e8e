"""README and docs/ stay true: figures come from benchmarks/results, links lead somewhere, the config page is current.

An invisible mark behind a measured number names its file, the way to it, its format and perhaps a scale:
`26<!-- save_stall-cpu.json seconds.stall.median .0f *1000 -->`. A block after `<!-- transcript: FILE -->` shows lines
of a file; "..." stands for what it leaves out.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from khanhllm.model.counts import active_parameters, on_paper, total_parameters
from khanhllm.settings import preset, preset_names, resolve

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"([-+]?[\d,]*\.?\d+)(?:\*\*)?<!-- (\S+\.json) (.+?) (\S+?)(?: ([*/])([-\d.e]+))? -->")
UNITS = re.compile(
    r"\d\s*(?:%|times|bits per byte|bpb|nats|tok(?:ens)?/s|tokens a|[kMGT]i?B\b|ms\b|s\b|seconds|minutes|hours|days|"
    r"injected|faults)"
)
UNMEASURED = (
    *("480 seconds there", "card with 8 GB", "card with 12 GB", "card with 24 GB"),
    *("--memory 8GB", "40 % of its peak rate", "2048-cube"),
)
"""numbers with a unit that are no measurements"""
QUOTING = [README, *(ROOT / "docs" / f"{name}.md" for name in ("data", "planning", "reliability", "speed"))]
"""pages on which each number with a unit is a measurement"""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def value(file: str, key: str) -> float:
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def wrong_figures(text: str) -> list[str]:
    wrong = []
    for shown, file, key, form, sign, scale in MARK.findall(text):
        measured = value(file, key)
        factor = float(scale or 1)
        is_so = format(measured * factor if sign == "*" else measured / factor if sign else measured, form)
        wrong += [f"{shown} should be {is_so} ({file} {key})"] if shown != is_so else []
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_figures_are_those_that_were_measured(page):
    text = page.read_text(encoding="utf-8")
    assert wrong_figures(text) == []
    assert len(MARK.findall(text)) == len(re.findall(r"<!-- \S+\.json ", text)), "a mark that cannot be read"


def test_an_old_figure_is_found():
    mark = "<!-- save_stall-cpu.json seconds.stall.median .0f *1000 -->"
    assert wrong_figures(f"26{mark}") == []
    assert wrong_figures(f"27{mark}") == ["27 should be 26 (save_stall-cpu.json seconds.stall.median)"]


def bare_lines(page: Path) -> list[str]:
    """The lines of a page, less its marked figures and what is known to be no measurement."""
    known = "|".join(map(re.escape, UNMEASURED))
    return [re.sub(known, "", line) for line in MARK.sub("", prose(page)).splitlines()]


@pytest.mark.parametrize("page", QUOTING, ids=named)
def test_no_figure_stands_without_its_file(page):
    for line in bare_lines(page):
        assert not UNITS.search(line), f"name the file of this figure in a mark, or add it to UNMEASURED: {line}"


def test_tables_of_the_readme_hold_no_figures_without_their_files():
    rows = [line for line in bare_lines(README) if line.startswith("|") and not line.startswith("| `")]
    assert not [row for row in rows if re.search(r"\d", row)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_loss_stands_without_its_file(page):
    for line in bare_lines(page):
        assert not re.search(r"\b\d\.\d{3}", re.sub("`[^`]*`", "", line)), (
            f"three digits behind a point look measured: {line}"
        )


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_transcripts_are_real(page):
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- transcript: (\S+) -->\n```\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == text.count("<!-- transcript:")
    for file, block in shown:
        real = (RESULTS / file).read_text(encoding="utf-8").splitlines()
        for line in block.splitlines():
            begun = line.removesuffix("...").rstrip()
            assert any(one.rstrip() == line.rstrip() or (begun != line and one.startswith(begun)) for one in real), line


@pytest.mark.parametrize("page", ["README.md", "docs/planning.md"])
def test_the_sizes_of_presets_are_what_the_package_computes(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([\d,]+ \| [\d,]+) \|", text, flags=re.MULTILINE))
    assert sorted(rows) == preset_names()
    for name, shown in rows.items():
        model = on_paper(resolve(preset(name)).model)
        assert shown == f"{total_parameters(model):,} | {active_parameters(model):,}", name


@pytest.mark.parametrize(
    "place", ["many.md", "clusters/slurm.sh", "clusters/kubernetes.yaml", "clusters/skypilot.yaml"]
)
def test_torchrun_and_train_know_every_option_shown(place):
    from torch.distributed.run import get_args_parser

    from khanhllm import cli

    text = (ROOT / "docs" / place).read_text(encoding="utf-8")
    if place.endswith(".yaml"):
        loaded = pytest.importorskip("yaml").safe_load(text)
    if "kubernetes" in place:
        words = loaded["spec"]["trainer"]["command"][1:] + loaded["spec"]["trainer"]["args"]
    else:
        text = loaded["run"] if place.endswith(".yaml") else text
        shown = re.search(r"torchrun[\s\\]+(--nnodes.*?--resume-or-new)", text, re.DOTALL)[1].replace("\\\n", " ")
        words = shlex.split(re.sub(r"\$\w+|\$\(.*?\)+", "1", shown))
    given = get_args_parser().parse_args(words)
    assert given.module and given.training_script == "khanhllm"
    assert cli._parsed(given.training_script_args).resume_or_new


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def test_the_config_page_is_current():
    spec = importlib.util.spec_from_file_location("config_page", ROOT / "scripts" / "config_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.render(), "run: python scripts/config_page.py"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != README], ids=named)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert link.startswith("https://") or target.exists(), link
        assert link.startswith("https://") or not anchor or anchor in anchors(target), link


def test_links_of_the_readme_are_absolute_and_lead_somewhere():
    text = prose(README)
    repository = re.search(r'^REPOSITORY = "(.+)"$', (ROOT / "docs" / "conf.py").read_text("utf-8"), re.MULTILINE)[1]
    defined = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, flags=re.MULTILINE))
    for link in defined.values():
        assert link.startswith(repository)
        assert (ROOT / re.sub(r"^/(?:blob|raw)/main/", "", link.removeprefix(repository))).exists(), link
    assert not re.findall(r"\]\([^)]+\)", text), "README links by reference, with the addresses in one place"
    labels = re.findall(r"(?<!\])\[[^\]]+\]\[([\w-]+)\]", text) + re.findall(r"(?<!\])\[([\w-]+)\](?![\[:])", text)
    assert set(defined) == {label for label in labels if label in defined}, "an address that no link uses"
    assert set(re.findall(r"\[[^\]]+\]\[([\w-]+)\]", text)) <= set(defined)
