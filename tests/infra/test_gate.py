"""The gate itself: what is wrong in template.yaml is found in its expansion.

Not so memory and /tmp above their limits: cfn-lint passes both, and test_templates.py looks at them.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from function.settings import ROOT

INFRA = ROOT / os.environ["INFRA_BIN"]


def refusal(text: str, directory: Path) -> str:
    """What the expansion or cfn-lint says against a template; empty if nothing."""
    (directory / "template.yaml").write_text(text)
    expanded = directory / "template.json"
    commands: list[list[str | Path]] = [
        [INFRA / "python", ROOT / "tests/infra/expand.py", directory / "template.yaml", expanded],
        [INFRA / "cfn-lint", "--regions", "eu-west-1", "--", expanded],
    ]
    for command in commands:
        environment = {"PATH": os.environ["PATH"], "AWS_DEFAULT_REGION": "eu-west-1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            return done.stdout + done.stderr
    return ""


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("Version", "Version", ""),
        ("Architectures: [x86_64]", "Architectures: [x86]", "x86"),
        ("InvokeMode: !Ref InvokeMode\n      EventInvoke", "InvokeMode: STREAM\n      EventInvoke", "STREAM"),
        ("Timeout: !Ref Timeout\n", "Timeout: 901\n", "901"),
        ("GetAtt Role.Arn", "GetAtt Rule.Arn", "Rule"),
    ],
)
def test_a_mistake_is_found(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    template = (ROOT / "template.yaml").read_text()
    assert right in template
    refused = refusal(template.replace(right, wrong), tmp_path)
    assert said in refused
    assert bool(refused) == (right != wrong)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("name: deploy", "name: deploy", ""),
        ("runs-on:", "run-on:", "run-on"),
        ("${{ github.sha }}", "${{ github.sah }}", "sah"),
        ("@e6de054238d6b7531b4efff3b6587d9aade6a06c # v6.2.3", "@v6", "unpinned"),
    ],
)
def test_a_mistake_in_a_workflow_is_found(tmp_path: Path, right: str, wrong: str, said: str) -> None:
    text = (ROOT / ".github/workflows/deploy.yaml").read_text()
    assert right in text
    workflow = tmp_path / ".github/workflows/deploy.yaml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(text.replace(right, wrong))
    lint: list[list[str | Path]] = [
        [INFRA / "actionlint", workflow],
        [INFRA / "zizmor", "--offline", "--no-progress", workflow],
    ]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=60, check=False) for command in lint]
    assert bool(sum(run.returncode for run in runs)) == (right != wrong)
    assert said in "".join(run.stdout for run in runs)
