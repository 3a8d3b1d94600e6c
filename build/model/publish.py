#!/usr/bin/env python3
"""Bring a model from the Hugging Face hub to S3: download, verify, pack, try, upload.

    python build/model/publish.py --bucket BUCKET [--key KEY] [--gguf FILE | --repository OWNER/NAME --file FILE …]

Each step is left out where its result is there already; an object that was made of the same source in the same way
needs none of them. The last line of standard output is the object's s3:// URI, everything else goes to standard error.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import PipelineError, exit_code_of, refuse_others, say
from download import add_arguments, checkpoint_of, download, sha256_of, source_of
from verify import HERE, PACK_VERSION_KEY, contents, engine, perplexity

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PACK_VERSION = 2  # kPackVersion of build/cli/src/gguf.h
PACKED = HERE.parent / "out" / "model"
PART_BYTES = 16 * 2**20
CHUNK_BYTES = 2**20
SMOKE_TEXT, SMOKE_BYTES = HERE / "smoke_corpus.txt", 4000
SMOKE_TOLERANCE = 0.02  # packing moves the perplexity by a tenth of a per cent at 8 bits; a wrong layout multiplies it


def object_key(name: str, sha256: str, output_bits: int) -> str:
    """The key of a packed model. It tells source and layout, so another model never takes its place."""
    return f"models/{name}-{sha256[:12]}-layout{PACK_VERSION}-{output_bits}bit.gguf"


def pack(source: Path, sha256: str, output_bits: int, directory: Path) -> Path:
    """The packed model in `directory`, tried against its source. What an earlier call made of the same is taken."""
    target = directory / Path(object_key(source.stem, sha256, output_bits)).name
    receipt = target.with_suffix(".json")
    made_of = {"source": sha256, "layout": PACK_VERSION, "output_bits": output_bits}
    if target.exists() and receipt.exists():
        found = json.loads(receipt.read_text())
        if found == made_of | {"sha256": sha256_of(target)}:
            say(f"{target} is there")
            return target
    directory.mkdir(parents=True, exist_ok=True)
    engine("pack", "--model", source, "--output", target, "--output-bits", str(output_bits))
    if (version := contents(target).keys.get(PACK_VERSION_KEY)) != str(PACK_VERSION):
        raise PipelineError(f"{target} has the layout {version}, this script knows {PACK_VERSION}")
    smoke(source, target)
    receipt.write_text(json.dumps(made_of | {"sha256": sha256_of(target)}) + "\n")
    say(f"{target}: {target.stat().st_size:,} bytes, of {source.stat().st_size:,}")
    return target


def smoke(source: Path, packed: Path) -> None:
    """Raises PipelineError where the packed model foretells a text otherwise than its source does."""
    (before, _), (after, tokens) = (perplexity(model, SMOKE_TEXT, SMOKE_BYTES) for model in (source, packed))
    say(f"perplexity on {tokens:,} tokens: {before:.3f} as it was, {after:.3f} packed")
    if not abs(after / before - 1) < SMOKE_TOLERANCE:
        raise PipelineError(
            f"{packed} differs from {source}: its perplexity must be within {SMOKE_TOLERANCE:.0%} of {before:.3f}, "
            f"got {after:.3f}"
        )


def published(client: S3Client, bucket: str, key: str, metadata: dict[str, str]) -> bool:
    """Whether the object is there, made of the same source in the same way."""
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.head_bucket(Bucket=bucket)  # raises where it is the bucket that is missing
        return False
    return metadata.items() <= head["Metadata"].items()


def upload(client: S3Client, path: Path, bucket: str, key: str, metadata: dict[str, str]) -> None:
    """Uploads in parts, with a checksum of the whole that S3 keeps; compares it, and the size, when all is there.

    An upload that is interrupted leaves no object: S3 shows it when its last part has come, and forgets the parts.
    """
    from boto3.s3.transfer import TransferConfig
    from tqdm import tqdm

    size = path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
        client.upload_file(
            str(path),
            bucket,
            key,
            ExtraArgs={
                "ChecksumAlgorithm": "CRC64NVME",
                "Metadata": metadata,
                "ContentType": "application/octet-stream",
            },
            Config=TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES),
            Callback=bar.update,
        )
    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    found = (head["ContentLength"], head.get("ChecksumCRC64NVME"))
    if found != (size, expected := _crc64nvme(path)):
        raise PipelineError(
            f"s3://{bucket}/{key} is corrupted: it must have {size:,} bytes and the CRC-64/NVME {expected}, "
            f"S3 says {found[0]:,} bytes and {found[1]}"
        )


def _crc64nvme(path: Path) -> str:
    from awscrt.checksums import crc64nvme  # type: ignore[import-untyped]

    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = crc64nvme(chunk, value)
    return base64.b64encode(value.to_bytes(8, "big")).decode()


def publish(arguments: argparse.Namespace) -> str:
    """The URI of the object, after whatever it took to have it there.

    Raises:
        PipelineError: with a line that says which step failed.
    """
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    origin, name, sha256, file = _origin(arguments)
    made_of = {"source-sha256": sha256, "layout-version": str(PACK_VERSION), "output-bits": str(arguments.output_bits)}
    key = arguments.key or object_key(name, sha256, arguments.output_bits)
    uri = f"s3://{arguments.bucket}/{key}"
    try:
        client = boto3.client("s3")
        if published(client, arguments.bucket, key, made_of):
            say(f"{uri} is there")
            return uri
        packed = pack(
            file or download(checkpoint_of(arguments), arguments.directory),
            sha256,
            arguments.output_bits,
            arguments.packed,
        )
        upload(client, packed, arguments.bucket, key, made_of | {"source": origin, "sha256": sha256_of(packed)})
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise PipelineError(f"{uri}: {error}") from error
    say(f"{uri}: {packed.stat().st_size:,} bytes, verified")
    return uri


def _origin(arguments: argparse.Namespace) -> tuple[str, str, str, Path | None]:
    """Where the model comes from, its name, its SHA-256, and its file where that had to be looked at to know them."""
    if arguments.gguf:
        file: Path = arguments.gguf
    else:
        checkpoint = checkpoint_of(arguments)
        if checkpoint.sha256:
            refuse_others(checkpoint.repository)
            origin = f"{checkpoint.repository}@{checkpoint.revision}"
            return origin, Path(checkpoint.filename).stem, checkpoint.sha256, None
        file = download(checkpoint, arguments.directory)
    known = source_of(file)
    return f"{known.repository}@{known.revision}" if known else file.name, file.stem, sha256_of(file), file


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Bring a model from the Hugging Face hub to S3.")
    add_arguments(parser)
    parser.add_argument("--gguf", type=Path, help="a file of your own, instead of one from the hub")
    parser.add_argument("--bucket", required=True, help="of infra/model-bucket.yaml, or another one")
    parser.add_argument("--key", help="default: one that names source and layout")
    parser.add_argument("--output-bits", type=int, choices=(6, 8), default=8, help="of the output matrix (%(default)s)")
    parser.add_argument("--packed", type=Path, default=PACKED, help="where packed models are kept (%(default)s)")
    arguments = parser.parse_args()
    return exit_code_of(lambda: print(publish(arguments)))


if __name__ == "__main__":
    sys.exit(main())
