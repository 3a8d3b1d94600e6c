"""Takes single files that the tests need out of wheels whose other contents they do not need.

The wheels are pinned by version and hash in requirements/test-files.txt. Files already there are left alone.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "test-files.txt"
OUT = ROOT / "build" / "out"

# wheel → (file within it, destination under build/out, mode)
FILES = {
    # The emulator of Lambda's Runtime API, Apache-2.0.
    "aws_sam_cli": ("samcli/local/rapid/aws-lambda-rie-x86_64", "aws-lambda-rie", 0o755),
    # The Llama 3 vocabulary, Llama 3 community licence; read by the tokenizer tests, part of no product.
    "llama_models": ("llama_models/llama3/tokenizer.model", "llama3/tokenizer.model", 0o644),
}


def main() -> None:
    """Downloads the wheels and extracts the files, unless those of the present lock are there.

    Raises:
        subprocess.CalledProcessError: a wheel cannot be downloaded or its hash differs from the lock's.
    """
    fetched = OUT / LOCK.name
    if (
        fetched.exists()
        and fetched.read_bytes() == LOCK.read_bytes()
        and all((OUT / destination).exists() for _, destination, _ in FILES.values())
    ):
        return
    print(f"setup: fetching {', '.join(destination for _, destination, _ in FILES.values())}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--requirement",
            str(LOCK),
            "--dest",
            folder,
        ]
        subprocess.run([*pip, *options], check=True)
        for wheel, (source, destination, mode) in FILES.items():
            (path,) = Path(folder).glob(f"{wheel}-*.whl")
            target = OUT / destination
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            with zipfile.ZipFile(path) as archive, archive.open(source) as member, partial.open("wb") as file:
                shutil.copyfileobj(member, file)
            partial.chmod(mode)
            partial.replace(target)
    shutil.copyfile(LOCK, fetched)


if __name__ == "__main__":
    main()
