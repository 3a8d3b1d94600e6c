"""The templates as data: template.yaml as it is after expansion, the others as they are."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from cfnlint.decode.cfn_yaml import load  # type: ignore[import-untyped]

from function.settings import ROOT

EXPANDED = ROOT / os.environ["EXPANDED"]
Template = dict[str, Any]


def template(name: str) -> Template:
    """`function`, or the name of a file in infra/."""
    if name == "function":
        expanded: Template = json.loads(EXPANDED.read_text())
        return expanded
    plain: Template = json.loads(json.dumps(load(str(ROOT / "infra" / f"{name}.yaml"))))
    return plain


def names() -> list[str]:
    return ["function", *sorted(path.stem for path in Path(ROOT / "infra").glob("*.yaml"))]


def only(plain: Template, kind: str) -> dict[str, Any]:
    """The properties of the one resource of this type."""
    (found,) = [resource for resource in plain["Resources"].values() if resource["Type"] == kind]
    properties: dict[str, Any] = found["Properties"]
    return properties


def filled(text: str, values: dict[str, str]) -> str:
    """What Fn::Sub makes of `text`."""
    return re.sub(r"\$\{([^}]+)\}", lambda match: values[match[1]], text)


def statements(policy: Any) -> list[dict[str, Any]]:
    """The statements of a policy document, those that depend on a condition marked with its name."""
    found = []
    for statement in policy["Statement"]:
        if "Fn::If" in statement:
            condition, given, otherwise = statement["Fn::If"]
            assert otherwise == {"Ref": "AWS::NoValue"}
            found.append({**given, "If": condition})
        else:
            found.append(statement)
    return found


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
