"""The documents say what the code says, where both can be compared."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from function import openapi
from function.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
CLI = ROOT / "build/out/bitnet"
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


def test_cli_document_lists_every_command_and_option() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    commands = re.findall(r"^  ([a-z]+) {2,}\S", help_of().split("Subcommands:")[1], re.MULTILINE)
    assert set(re.findall(r"^bitnet (\w+)", text, re.MULTILINE)) == set(commands)
    for command in commands:
        options = set(re.findall(r"^ +(?:-\w,)?(--[a-z-]+)", help_of(command), re.MULTILINE)) - {"--help"}
        assert options <= set(re.findall(r"--[a-z-]+", text)), command


def help_of(*command: str) -> str:
    return subprocess.run([CLI, *command, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


def test_api_document_names_every_route_and_field() -> None:
    text = (ROOT / "docs/api.md").read_text()
    named = set(re.findall(r"[a-z_0-9]+", text))
    for path, methods in openapi.document(Settings())["paths"].items():
        assert re.search(rf"{re.escape(path)}[` \n]", text), path
        for operation in methods.values():
            if "requestBody" in operation:
                fields_of_it = operation["requestBody"]["content"]["application/json"]["schema"]["properties"].keys()
                assert fields_of_it <= named, path
