"""docs/reference is what the code says, documents name what is there, and the index and the site have every page."""

import re
import shlex

import pytest
import yaml

from docs import make_reference
from docs.site_pages import on_page_markdown
from tests.support.closure import ROOT

DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text()
PAGES = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
DECISIONS = {page for page in PAGES if re.match(r"decisions/\d", page)}
WRITTEN = PAGES - DECISIONS - {"log.md", "reference/cli.md"}
PLACES = sorted([*(DOCS / page for page in WRITTEN), DOCS / "README.md", ROOT / "README.md"])
"""The documents that people write on what is there today."""


def linked(text: str) -> list[str]:
    """The pages that a document links to as items of lists, in order."""
    return re.findall(r"^- \[[^\]]*\]\(([^)]*)\)", text, re.MULTILINE)


def flat(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [page for item in items for page in flat(item)]


@pytest.mark.parametrize("name", ["params.md", "cli.md"])
def test_a_page_is_what_the_code_says(name):
    assert (DOCS / "reference" / name).read_text() == make_reference.PAGES[name](), "run `make reference`"


def test_computed_sizes_are_those_of_the_code():
    """Of the smallest model; the others come of the same function."""
    name = next(iter(make_reference.MODELS))
    assert make_reference.model_sizes(name) in (DOCS / "reference/sizes.md").read_text(), "run `make reference`"


def test_hardware_repeats_the_computed_sizes():
    """Memory and disk of `fast`, and the hours of all settings by their operations at the speeds that it names."""
    sizes, hardware = (DOCS / "reference/sizes.md").read_text(), (DOCS / "hardware.md").read_text()
    for number, name in enumerate(make_reference.MODELS):
        work, held = (table(sizes.split(f"## {name}")[1], head) for head in ("PFLOP", "GB"))
        seconds = {setting: float(cells[-1].replace(",", "")) * 1e15 / 0.157e12 for setting, cells in work.items()}
        memory, disk, slow, fast, _ = table(hardware, "model")[name]
        assert memory == f"{held['`fast`'][0].split()[0]} GB"
        assert amount(disk) == pytest.approx(float(held["`fast`"][-2]) + float(held["`fast`"][-1]), rel=0.02)
        assert amount(slow) == pytest.approx(seconds["`fast`"], rel=0.05)
        assert amount(fast) == pytest.approx(seconds["`fast`"] * 0.157 / 10, rel=0.15)
        for setting, cells in table(hardware, "setting").items():
            assert amount(cells[number]) == pytest.approx(seconds[setting], rel=0.1)


def table(text: str, head: str) -> dict[str, list[str]]:
    """The rows of the first table whose first heading is `head`, by their first cell."""
    block = re.search(rf"^\| {head} \|.*\n\|-.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines()]
    return {name: cells for name, *cells in rows}


def amount(text: str) -> float:
    """GB or seconds."""
    number, unit = text.removesuffix(" or more").split()
    return float(number) * {"GB": 1, "TB": 1000, "minutes": 60, "hours": 3600, "days": 86400}[unit]


def test_every_key_has_an_entry():
    text = (DOCS / "reference/params.md").read_text()
    keys = [f"{section}.{key}" for section, values in PARAMS.items() if isinstance(values, dict) for key in values]
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == keys


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.stem)
def test_documents_name_commands_and_options_that_exist(path):
    known = dict(make_reference.commands())
    blocks = "".join(re.findall(r"^```.*?^```", path.read_text(), re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    for line in re.findall(r"^(?:\$ )?(libprune .*)$", blocks, re.MULTILINE):
        words = shlex.split(line, comments=True)
        named = max((name for name in known if words[: len(name.split())] == name.split()), key=len)
        below = getattr(known[named], "commands", {})
        assert not below or len(words) == len(named.split()) or words[len(named.split())].startswith("-"), line
        options = {option for param in known[named].params for option in param.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, line


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.stem)
def test_documents_name_keys_that_exist(path):
    text = path.read_text()
    sections = "|".join(name for name, values in PARAMS.items() if isinstance(values, dict))
    set_by_commands = re.findall(r"(?:-S|--set)[ =]'?([a-z_.]+)=", text)
    in_code = re.findall(rf"`((?:{sections})\.[a-z_]+)(?=`|:|=)", text)
    for key in set_by_commands + [key for key in in_code if not key.endswith((".parquet", ".json", ".png"))]:
        value = PARAMS
        for name in key.split("."):
            assert name in value, key
            value = value[name]


def test_the_index_names_every_page_once():
    assert sorted(linked((DOCS / "README.md").read_text())) == sorted(PAGES - DECISIONS)
    assert sorted(re.findall(r"\]\((\d[^)]*)\)", (DOCS / "decisions/README.md").read_text())) == sorted(
        page.partition("/")[2] for page in DECISIONS
    )


def test_the_site_has_the_order_of_the_index():
    first, *rest = flat(yaml.load(SITE, yaml.BaseLoader)["nav"])
    assert first == "README.md"
    assert rest == linked((DOCS / "README.md").read_text())


def test_the_glossary_is_sorted():
    words = re.findall(r"^\*\*(.*?)\*\*:", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) > 40
    assert words == sorted(set(words), key=str.casefold)


class _Page:
    def __init__(self, uri: str) -> None:
        self.file = self
        self.src_uri = uri


@pytest.mark.parametrize(
    ("uri", "text", "shown"),
    [
        ("library.md", "see [params.yaml](../params.yaml).", "see params.yaml."),
        ("library.md", "see [a\nkey](reference/params.md#x)", "see [a\nkey](reference/params.md#x)"),
        ("decisions/001.md", "[up](../log.md), [out](../../README.md)", "[up](../log.md), out"),
        ("log.md", "It says:\n- one\n  more\n- two", "It says:\n\n- one\n  more\n- two"),
        ("log.md", "It says:\n```\n$ x\n- one\n```\n- two", "It says:\n```\n$ x\n- one\n```\n\n- two"),
    ],
)
def test_pages_read_on_the_site_as_on_git_hosts(uri, text, shown):
    assert on_page_markdown(text, page=_Page(uri)) == shown
