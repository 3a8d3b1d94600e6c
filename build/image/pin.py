#!/usr/bin/env python3
"""Write into the Dockerfile which digests the tags of its bases stand for now: NAME:TAG becomes NAME:TAG@sha256:….

    python3 build/image/pin.py [DOCKERFILE]

Started again, it takes the tags' newest digests. The registry itself is asked, without pulling; needs no docker.
https://distribution.github.io/distribution/spec/api/
"""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

BASE = re.compile(r"^(ARG [A-Z]+_IMAGE=)([^\s@]+:[^\s@:/]+)(@sha256:[0-9a-f]{64})?$", re.MULTILINE)
DOCKER_HUB = "registry-1.docker.io"
TIMEOUT_S = 30
MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.v2",
    )
)


class PinError(Exception):
    """A base cannot be pinned: one line that says why."""


def digest(base: str) -> str:
    """The digest of HOST/NAME:TAG, that of the index where there are several platforms. Raises PinError."""
    name, _, tag = base.rpartition(":")
    host, _, path = name.partition("/")
    if host == "docker.io":
        host = DOCKER_HUB
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1)(:|$)", host) else "https"  # as docker takes it
    request = urllib.request.Request(f"{scheme}://{host}/v2/{path}/manifests/{tag}", method="HEAD")
    request.add_header("accept", MANIFESTS)
    try:
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            request.add_header("authorization", f"Bearer {_token(error.headers['www-authenticate'] or '')}")
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        with answer:
            found = answer.headers["docker-content-digest"] or ""
    except (OSError, ValueError, KeyError) as error:
        raise PinError(f"{base} cannot be looked up: {error}") from error
    if not re.fullmatch("sha256:[0-9a-f]{64}", found):
        raise PinError(f"the registry tells no digest of {base}")
    return found


def _token(challenge: str) -> str:
    """The token that a registry hands to everybody: https://distribution.github.io/distribution/spec/auth/token/."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urllib.parse.urlencode({name: fields[name] for name in ("service", "scope") if name in fields})
    with urllib.request.urlopen(f"{fields['realm']}?{query}", timeout=TIMEOUT_S) as answer:
        decoded = json.load(answer)
    return str(decoded.get("token") or decoded["access_token"])


def main() -> int:
    """The command line. Returns the exit code; the file changes as a whole or not at all."""
    dockerfile = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "Dockerfile"
    text = dockerfile.read_text()
    bases = {match[2] for match in BASE.finditer(text)}
    try:
        if not bases:
            raise PinError(f"no line 'ARG …_IMAGE=NAME:TAG' in {dockerfile}")
        pinned = {base: f"{base}@{digest(base)}" for base in sorted(bases)}
    except PinError as error:
        print(f"pin: {error}; {dockerfile} is as it was", file=sys.stderr)
        return 1
    dockerfile.write_text(BASE.sub(lambda match: match[1] + pinned[match[2]], text))
    for line in pinned.values():
        print(f"pin: {line}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
