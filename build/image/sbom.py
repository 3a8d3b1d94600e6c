#!/usr/bin/env python3
"""Write what an image consists of as a CycloneDX document (JSON, https://cyclonedx.org): `make sbom`.

    python build/image/sbom.py IMAGE OUTPUT.json

Covered: the Debian packages of the image (dpkg's list), the Python packages of the function (their own metadata), the
Python interpreter, and the Debian packages of the builder that are linked into the engine. Not covered: single files
that belong to none of them, and what Python's wheels carry within themselves. The document is validated against
CycloneDX's schema before it is written.
"""

from __future__ import annotations

import argparse
import email
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

CONTAINER = Path(__file__).resolve().parent / "container"
LINKED = "/var/task/engine-packages"


class SbomError(Exception):
    """The document cannot be made: one line that says why."""


def run(*arguments: str) -> str:
    """What docker or podman prints. Raises SbomError where it fails."""
    done = subprocess.run([CONTAINER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SbomError(done.stderr.strip().split("\n")[-1])
    return done.stdout


def debian_package(name: str, version: str, source: str, release: str) -> Component:
    """A component with a package URL as https://github.com/package-url/purl-spec has it for Debian."""
    purl = PackageURL("deb", "debian", name, version, {"distro": f"debian-{release}"})
    properties = [Property(name="debian:source", value=source)]
    return Component(name=name, version=version, purl=purl, bom_ref=str(purl), properties=properties)


def debian_packages(status: str, release: str) -> Iterator[Component]:
    """Those that are installed, by dpkg's status file."""
    for paragraph in status.strip().split("\n\n"):
        fields = email.message_from_string(paragraph)
        if fields["Status"] == "install ok installed":
            source = (fields["Source"] or fields["Package"]).split(" ")[0]
            yield debian_package(fields["Package"], fields["Version"], source, release)


def linked_packages(listing: str, release: str) -> Iterator[Component]:
    """Those whose libraries are part of the engine: lines of name, version, source."""
    for line in listing.splitlines():
        name, version, source = line.split()
        component = debian_package(name, version, source, release)
        component.bom_ref.value = f"engine:{component.purl}"
        component.properties.add(Property(name="bitnet:linked-into", value="/usr/local/bin/bitnet"))
        yield component


def python_packages(folder: Path) -> Iterator[Component]:
    """Those whose metadata lie in `folder`, with licences where they state an expression."""
    for distribution in metadata.distributions(path=[str(folder)]):
        name, version = distribution.metadata["Name"].lower().replace("_", "-"), distribution.version
        purl = PackageURL("pypi", None, name, version)
        expression = distribution.metadata["License-Expression"]
        licences = [LicenseFactory().make_from_string(expression)] if expression else []
        yield Component(name=name, version=version, purl=purl, bom_ref=str(purl), licenses=licences)


def sbom(image: str) -> str:
    """The document, as JSON. Raises SbomError where the image is not there or lacks something."""
    (about,) = json.loads(run("image", "inspect", image))
    labels = about["Config"].get("Labels") or {}
    name = f"bitnet-sbom-{about['Id'].removeprefix('sha256:')[:12]}"
    run("create", "--name", name, image)
    try:
        with tempfile.TemporaryDirectory() as folder:

            def copied(path: str) -> Path:
                run("cp", f"{name}:{path}", folder)
                return Path(folder) / Path(path).name

            release = copied("/etc/debian_version").read_text().strip()
            components = [
                *debian_packages(copied("/var/lib/dpkg/status").read_text(), release),
                *linked_packages(copied(LINKED).read_text(), release),
                *python_packages(copied("/opt/python")),
            ]
    finally:
        run("rm", "--force", name)
    python = run("run", "--rm", "--network", "none", "--entrypoint", "python", image, "--version").split()[1]
    components.append(Component(name="python", version=python, purl=PackageURL("generic", None, "python", python)))
    bom = Bom(components=components)
    bom.metadata.component = Component(
        type=ComponentType.CONTAINER,
        name="bitnet-lambda",
        version=labels.get("org.opencontainers.image.version"),
        properties=[Property(name="oci:image-id", value=about["Id"])],
    )
    bom.register_dependency(bom.metadata.component, components)
    document: str = JsonV1Dot6(bom).output_as_string(indent=2)
    if errors := JsonStrictValidator(SchemaVersion.V1_6).validate_str(document):
        raise SbomError(f"the document does not follow CycloneDX's schema: {errors}")
    return document


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write what an image consists of, as CycloneDX.")
    parser.add_argument("image")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    try:
        document = sbom(arguments.image)
    except SbomError as error:
        print(f"sbom: {error}", file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(document + "\n")
    print(f"sbom: {arguments.output}, {len(json.loads(document)['components'])} components", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
