#!/usr/bin/env python3
"""Download a model from the Hugging Face hub: pinned, resumed where it broke off, verified.

    python build/model/download.py [--directory models] [--repository OWNER/NAME --file FILE --revision COMMIT …]

By default it is microsoft/bitnet-b1.58-2B-4T-gguf (1.19 GB). A token, if the repository wants one, is found as by all
of Hugging Face's tools: HF_TOKEN, or `hf auth login`. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoint import BITNET_2B, Checkpoint, PipelineError, exit_code_of, refuse_others, say

SHA256 = re.compile("[0-9a-f]{64}")
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """What a downloaded file is; kept beside it as FILE.source.json."""

    repository: str
    filename: str
    revision: str  # a commit
    sha256: str
    licence: str


def sha256_of(path: Path) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_of(path: Path) -> Source | None:
    """What is known of a file that `download` has made, if it is one."""
    try:
        return Source(**json.loads(_sidecar(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def download(checkpoint: Checkpoint, directory: Path) -> Path:
    """The path of the verified file, `directory`/FILE. Nothing is asked of the hub where it is there already.

    Raises:
        PipelineError: the hub does not have it or does not give it, its checksum differs, there is no room, the engine
            cannot run it, or another file has its name.
        KeyboardInterrupt: what has come stays, and the next call goes on from there.
    """
    refuse_others(checkpoint.repository)
    target = directory / Path(checkpoint.filename).name
    if target.exists():
        return _known(target, checkpoint)
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        source, size = _ask(checkpoint)
        say(f"{source.repository} at {source.revision}: {source.filename}, {size:,} bytes, licence {source.licence}")
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f".{target.name}.{source.sha256[:16]}.part"
        _receive(source, size, part)
    except (HfHubHTTPError, HFValidationError, HTTPError) as error:
        raise PipelineError(f"{checkpoint.repository}, {checkpoint.filename}: {_first_line(error)}") from error
    except OSError as error:
        raise PipelineError(f"{target} cannot be downloaded: {_first_line(error)}; start again to go on") from error
    if (actual := sha256_of(part)) != source.sha256:
        part.unlink()
        raise PipelineError(f"{source.filename} is corrupted: its SHA-256 is {actual}, it must be {source.sha256}")
    _sidecar(target).write_text(json.dumps(asdict(source), indent=2) + "\n")
    part.rename(target)
    say(f"{target}: SHA-256 {source.sha256}, as it must be")
    return target


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".source.json")


def _known(target: Path, checkpoint: Checkpoint) -> Path:
    """`target`, if it is the file that is wanted."""
    source = source_of(target)
    expected = checkpoint.sha256
    if expected is None and source is not None and source.repository == checkpoint.repository:
        named = checkpoint.revision in (source.revision, "main")  # what main was when it was downloaded
        expected = source.sha256 if named else None
    if expected is None or (actual := sha256_of(target)) != expected:
        is_what = f"its SHA-256 is {actual}, it must be {expected}" if expected else "it came from elsewhere"
        raise PipelineError(
            f"{target} is not {checkpoint.filename} of {checkpoint.repository} at {checkpoint.revision}: {is_what}. "
            "Move it away, or name another directory"
        )
    say(f"{target} is there, SHA-256 {expected}")
    return target


def _ask(checkpoint: Checkpoint) -> tuple[Source, int]:
    """What the hub says of the file, and its size."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    info = HfApi().model_info(checkpoint.repository, revision=checkpoint.revision)
    refuse_others(checkpoint.repository, (info.gguf or {}).get("architecture"))
    url = hf_hub_url(checkpoint.repository, checkpoint.filename, revision=info.sha)
    metadata = get_hf_file_metadata(url)
    named = f"{checkpoint.repository} at {checkpoint.revision}"
    if info.sha is None or metadata.size is None or not SHA256.fullmatch(metadata.etag or ""):
        raise PipelineError(f"{named}: the hub tells no commit, size or SHA-256 of {checkpoint.filename}")
    if COMMIT.fullmatch(checkpoint.revision) and info.sha != checkpoint.revision:
        raise PipelineError(f"{named}: the hub answers with the revision {info.sha}")
    if checkpoint.sha256 not in (None, metadata.etag):
        raise PipelineError(
            f"{named}: the SHA-256 of {checkpoint.filename} must be {checkpoint.sha256}, the hub says {metadata.etag}"
        )
    card = info.card_data
    licence = " ".join(
        str(value)
        for name in ("license", "license_name", "license_link")
        if card is not None and (value := card.get(name))
    )
    return (
        Source(checkpoint.repository, checkpoint.filename, info.sha, str(metadata.etag), licence or "not stated"),
        metadata.size,
    )


def _receive(source: Source, size: int, part: Path) -> None:
    """Downloads to `part`, after what is there of it, with the hub's own client and its progress bar."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get  # hf_hub_download keeps nothing of a broken download
    from huggingface_hub.utils._headers import build_hf_headers

    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if (free := shutil.disk_usage(part.parent).free) < size - have:
        raise PipelineError(f"{part.parent} has {free:,} bytes free, the rest of the model takes {size - have:,}")
    if have:
        say(f"going on after {have:,} bytes")
    with part.open("r+b" if part.exists() else "w+b") as file:
        file.seek(0, os.SEEK_END)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        url = hf_hub_url(source.repository, source.filename, revision=source.revision)
        # The client leaves the token out when the hub redirects to another host.
        http_get(url, file, resume_size=have, headers=headers, expected_size=size, displayed_filename=source.filename)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a checkpoint, and where it is kept."""
    parser.add_argument("--repository", default=BITNET_2B.repository, help="owner/name at the hub (%(default)s)")
    parser.add_argument("--file", default=BITNET_2B.filename, help="of that repository (%(default)s)")
    parser.add_argument("--revision", help="a commit; without it, that of the default model, or main")
    parser.add_argument("--sha256", help="what the file must have, if it is not the default model")
    parser.add_argument("--directory", type=Path, default=Path("models"), help="where the file is kept (%(default)s)")


def checkpoint_of(arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the options name. Raises PipelineError where one of them has no such form."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repository):
        raise PipelineError(f"--repository must be owner/name, got '{arguments.repository}'")
    if arguments.sha256 and not SHA256.fullmatch(arguments.sha256):
        raise PipelineError(f"--sha256 must be 64 hexadecimal digits, got '{arguments.sha256}'")
    named = Checkpoint(arguments.repository, arguments.file, arguments.revision or "main", arguments.sha256 or None)
    default = (BITNET_2B.repository, BITNET_2B.filename)
    if (named.repository, named.filename) == default and arguments.revision in (None, "", BITNET_2B.revision):
        return replace(BITNET_2B, sha256=named.sha256 or BITNET_2B.sha256)
    return named


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Download a model from the Hugging Face hub.")
    add_arguments(parser)
    arguments = parser.parse_args()
    return exit_code_of(lambda: download(checkpoint_of(arguments), arguments.directory))


if __name__ == "__main__":
    sys.exit(main())
