#!/usr/bin/env python3
"""Make one training text of Project Gutenberg books, for train_demo.py.

    python build/model/corpus.py --books DIRECTORY --output corpus.txt

DIRECTORY holds plain-text books as Project Gutenberg gives them out (https://www.gutenberg.org), one *.txt file each.
Headers and footers are dropped, paragraphs become lines, typographic quotes and dashes become ASCII, and a line
`<|end|>` parts two books. demo/README.md says which books the demo model was trained on.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

BOOK_SEPARATOR = "<|end|>"
FIRST_PARAGRAPH_CHARACTERS = 200  # shorter ones at the head of a book are titles and tables of contents

START = (r"\*\*\*\s*START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n", r"\*END[* ]*THE SMALL PRINT[^\n]*\n")
END = r"\n[^\n]*(?:\*\*\*\s*END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)"
NOTE = r"\[(?:Illustration|Footnote|Transcriber)[^\]]*\]"
CREDIT = r"Produced by|E-text|Etext|Transcribed"
REPLACEMENTS = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "æ": "ae", "\ufeff": "", "_": "", "`": "'"}
)


def clean(book: str) -> str:
    """A Project Gutenberg book → its paragraphs, one a line, in ASCII."""
    book = book.replace("\r\n", "\n")
    starts = (re.search(pattern, book, re.IGNORECASE) for pattern in START)
    if start := next(filter(None, starts), None):
        book = book[start.end() :]
    if end := re.search(END, book, re.IGNORECASE):
        book = book[: end.start()]
    book = re.sub(NOTE, "", book.translate(REPLACEMENTS).replace("''", '"'))
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", book)]
    paragraphs = [
        paragraph.encode("ascii", "ignore").decode()
        for paragraph in paragraphs
        if paragraph and "Gutenberg" not in paragraph and "http" not in paragraph and not re.match(CREDIT, paragraph)
    ]
    long = (i for i, paragraph in enumerate(paragraphs) if len(paragraph) > FIRST_PARAGRAPH_CHARACTERS)
    return "\n".join(paragraphs[max(0, next(long, 0) - 1) :])


def read(path: Path) -> str:
    """Text in UTF-8, or else in Latin-1 as the older books are."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make one training text of Project Gutenberg books.")
    parser.add_argument("--books", type=Path, required=True, help="directory of *.txt files")
    parser.add_argument("--output", type=Path, required=True, help="text file to write")
    arguments = parser.parse_args()
    paths = sorted(arguments.books.glob("*.txt"))
    if not paths:
        print(f"corpus: --books {arguments.books}: no *.txt file there", file=sys.stderr)
        return 1
    books = [clean(read(path)) for path in paths]
    for path, book in zip(paths, books, strict=True):
        print(f"{len(book) / 1e6:.2f} MB {path.name}")
    arguments.output.write_text(f"\n{BOOK_SEPARATOR}\n".join(books) + "\n", encoding="utf-8")
    print(f"{arguments.output}: {sum(map(len, books)) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
