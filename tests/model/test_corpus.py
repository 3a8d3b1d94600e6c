"""build/model/corpus.py: a Project Gutenberg book becomes lines of plain text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from corpus import BOOK_SEPARATOR, clean
from function.settings import ROOT

LONG = "A long paragraph, " + "word " * 50
BOOK = f"""The Project Gutenberg EBook of Tales

*** START OF THIS PROJECT GUTENBERG EBOOK TALES ***
Produced by somebody

CONTENTS

I. THE FOX

THE FOX

{LONG}
goes on, said “he”—‘really’.

[Illustration: a fox]

A line about Project Gutenberg.

It was _all_ over.

End of Project Gutenberg's Tales
"""


def test_a_book_becomes_its_paragraphs() -> None:
    assert clean(BOOK).split("\n") == [
        "THE FOX",
        f"{LONG.strip()} goes on, said \"he\"--'really'.",
        "It was all over.",
    ]


def test_headers_of_the_oldest_books_are_dropped_too() -> None:
    for end in (
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
        "*END THE SMALL PRINT! Ver.04.07.00*END*",
    ):
        assert clean(f"Please do not remove this.\n\n{LONG}\n\n{end}\n\nTales\n\n{LONG}") == f"Tales\n{LONG.strip()}"


def test_books_in_either_encoding_are_joined(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_text(LONG + "“x”", encoding="utf-8-sig")
    (tmp_path / "2.txt").write_text(LONG + "é!", encoding="latin-1")
    command: list[str | Path] = [
        sys.executable,
        ROOT / "build/model/corpus.py",
        "--books",
        tmp_path,
        "--output",
        tmp_path / "out",
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "out").read_text() == f'{LONG}"x"\n{BOOK_SEPARATOR}\n{LONG}!\n'


def test_a_directory_without_books_is_refused(tmp_path: Path) -> None:
    command: list[str | Path] = [
        sys.executable,
        ROOT / "build/model/corpus.py",
        "--books",
        tmp_path,
        "--output",
        tmp_path / "out",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no *.txt file" in result.stderr
