"""The tests of the templates run with `make check-infra`; EXPANDED is where the expanded template.yaml is then."""

import os

collect_ignore = (
    []
    if "EXPANDED" in os.environ
    else [
        "test_batch.py",
        "test_gate.py",
        "test_stacks.py",
        "test_templates.py",
    ]
)
