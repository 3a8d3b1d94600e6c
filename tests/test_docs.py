"""The documents say what the code says, where both can be compared."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from function.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_lists_every_setting() -> None:
    section = (ROOT / "README.md").read_text().split("## Settings")[1].split("\n## ")[0]
    listed = {
        name
        for row in re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([A-Z0-9_]+)`", row)
    }
    assert listed == {setting.name.upper() for setting in fields(Settings)}


def test_cli_document_lists_every_exit_code() -> None:
    header = (ROOT / "build/cli/src/error.h").read_text()
    codes = {int(code) for code in re.findall(r"k\w+ = (\d+),", header)}
    section = (ROOT / "docs/cli.md").read_text().split("## Exit codes")[1]
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing
