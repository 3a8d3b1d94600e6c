"""Expands an AWS SAM template into plain CloudFormation, as AWS does at a deployment: `expand.py TEMPLATE EXPANDED`.

Linters pass wrong values inside of AWS::Serverless::*, so they and the tests get the result instead.
"""

import json
import sys
from pathlib import Path

from cfnlint.decode.cfn_yaml import load  # type: ignore[import-untyped]
from samtranslator.translator.transform import transform  # type: ignore[import-not-found]


class NoManagedPolicies:
    """Stands in for the list of AWS's policies, which `transform` asks IAM for only if a template names one."""

    def load(self) -> dict[str, str]:
        raise LookupError("the template names a managed policy; name its actions and resources instead")


def main(template: Path, expanded: Path) -> None:
    """Writes the expansion.

    Raises:
        samtranslator.model.exceptions.InvalidDocumentException: the template is wrong, and why.
    """
    plain = json.loads(json.dumps(load(str(template))))  # without cfn-lint's positions
    expanded.parent.mkdir(parents=True, exist_ok=True)
    expanded.write_text(json.dumps(transform(plain, {}, NoManagedPolicies()), indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
