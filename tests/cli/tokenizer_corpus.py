"""Strings of every sort that a tokenizer may stumble over, generated from a seed."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence

from function.settings import ROOT

STORIES = ROOT / "build" / "model" / "smoke_corpus.txt"

# Letters and marks of these blocks, first and last code point.
SCRIPTS = {
    "latin": (0x41, 0x24F),
    "greek": (0x370, 0x3FF),
    "cyrillic": (0x400, 0x4FF),
    "armenian": (0x531, 0x587),
    "hebrew": (0x591, 0x5F4),
    "arabic": (0x600, 0x6FF),
    "devanagari": (0x900, 0x97F),
    "tamil": (0xB80, 0xBFA),
    "thai": (0xE01, 0xE5B),
    "tibetan": (0xF00, 0xFDA),
    "georgian": (0x10A0, 0x10FF),
    "hangul jamo": (0x1100, 0x11FF),
    "ethiopic": (0x1200, 0x137C),
    "mongolian": (0x1800, 0x18AA),
    "hiragana": (0x3041, 0x309F),
    "katakana": (0x30A0, 0x30FF),
    "han": (0x4E00, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "full width": (0xFF01, 0xFFEE),
    "gothic": (0x10330, 0x1034A),
    "mathematical": (0x1D400, 0x1D7FF),
    "adlam": (0x1E900, 0x1E95F),
    "han extension": (0x20000, 0x2A6DF),
}
DIGITS = "0123456789٠١٢٣٤٥٦٧٨٩०१२३४५६७८९０１２３四五²³¹½¾Ⅷⅻ①㊿𝟘𝟙𝟡"
WHITE_SPACE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e" + "".join(map(chr, range(0x2000, 0x200E)))
WHITE_SPACE += "\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
NEWLINES = ["\n", "\r\n", "\r", "\n\n", "\n\r", "\r\r\n", "\v", "\f", "\x85", "\u2028", "\u2029"]
CONTRACTIONS = [
    "s",
    "t",
    "re",
    "ve",
    "m",
    "ll",
    "d",
    "S",
    "T",
    "RE",
    "Re",
    "rE",
    "VE",
    "Ve",
    "M",
    "LL",
    "Ll",
    "lL",
    "D",
]
CONTRACTIONS += ["ſ", "st", "sſ", "r", "v", "l", "em", "rer", "K", "1"]
APOSTROPHES = ["'", "'", "'", "’", "‘", "ʼ", "`", "''", "' ", " '", "＇"]
EMOJI = [
    "😀",
    "👍",
    "👍🏽",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇩🇪",
    "🇫",
    "1️⃣",
    "❤️",
    "❤",
    "☎︎",
    "🧑🏿‍🚀",
    "\u200d",
    "\ufe0f",
    "🏽",
    "🫨",
    "🪿",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
]
COMBINING = "".join(map(chr, [*range(0x300, 0x340), 0x483, 0x5B0, 0x64B, 0x93C, 0x94D, 0x20D0, 0x20E3, 0x302A, 0xFE20]))
BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u061c"
EDGES = [0, 1, 8, 0x1F, 0x7F, 0x80, 0x9F, 0xA0, 0xAD, 0xFF, 0x100, 0x143, 0x144, 0x7FF, 0x800, 0xFFF, 0x1000, 0xD7FF]
EDGES += [0xE000, 0xF8FF, 0xFDD0, 0xFFFC, 0xFFFD, 0xFFFE, 0xFFFF, 0x10000, 0x1FFFF, 0x3FFFF, 0x40000, 0xE0001, 0xE01EF]
EDGES += [0xFFFFF, 0x100000, 0x10FFFD, 0x10FFFE, 0x10FFFF]
CODE = [
    "def f(x: int) -> int:\n", "    return x ** 2  # squared\n", "\tif (p != NULL && *p++ == '\\0') {\n", "}\n\n", "};",
    "#include <stdio.h>\n", "std::vector<std::string_view>", "const auto& [k, v] : map", "printf(\"%05.2f\\n\", 1e-5);",
    "{\"id\":123456,\"a\":[1,2,null]}", "<div class=\"a-b\">&nbsp;</div>\r\n", "SELECT * FROM t WHERE a='it''s';",
    "x = 'don\\'t' + \"we'll\"", "0xDEADBEEF", "1_000_000", "a.b.c()[0]?.d!", "// ---- \n", "/* ** */", "#!/bin/sh\n",
    "$(echo \"${HOME}\")", "https://example.com/a?b=c&d=%20e#f", "user@example.com", "C:\\Users\\x\\", "--no-deps",
    "snake_case_name", "camelCaseName", "SCREAMING_CASE", "        ", "\t\t\t", ";;", "=>", "!==", "...",
    "@@ -1,2 +3,4 @@\n", "\\frac{a}{b}", "$$E=mc^2$$", "| a | b |\n|---|---|\n", "- [x] done\n", "```python\n",
    "fn main() { let s = 'a'; }",
]  # fmt: skip
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_0|>"]
LOOKALIKES = [
    *SPECIAL,
    "<|reserved_special_token_25",
    "<|reserved_special_token_250|>",
    "<|reserved_special_token_251|>",
]
LOOKALIKES += ["<|eot_id|", "<|eot_id", "<|", "|>", "<", "<<|eot_id|>>", "<|EOT_ID|>", "<| eot_id |>", "< |eot_id|>"]
LOOKALIKES += [
    "<|eot_id|><|eot_id|>",
    "<|begin_of_text|<|eot_id|>",
    "＜|eot_id|＞",
    "<|eot_id|>\n",
    "[INST]",
    "</s>",
    "<s>",
    "<0x0A>",
]
LOOKALIKES += ["<|im_start|>", "<pad>", "Ġ", "Ċ", "âĢĻ", "ĉ"]


class Corpus:
    """Each method is one sort of text, of a few up to some hundred characters."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._stories = STORIES.read_text(encoding="utf-8")

    def texts(self, n: int) -> list[str]:
        """`n` strings: every sort alike often, then mixtures of them, none empty."""
        sorts: list[Callable[[], str]] = [
            self.prose, self.words, self.letters, self.scripts, self.digits, self.white_space, self.newlines,
            self.contractions, self.emoji, self.combining, self.right_to_left, self.code, self.lookalikes, self.edges,
            self.any_unicode, self.repetition,
        ]  # fmt: skip
        texts = [sorts[i % len(sorts)]() for i in range(n // 2)]
        texts += ["".join(self._random.choice(sorts)() for _ in range(self._count(5))) for _ in range(n - len(texts))]
        return [text or " " for text in texts]

    def _count(self, most: int) -> int:
        return self._random.randint(1, most)

    def _some(self, items: Sequence[str], most: int) -> list[str]:
        return self._random.choices(items, k=self._count(most))

    def prose(self) -> str:
        start = self._random.randrange(len(self._stories))
        text = self._stories[start : start + self._count(200)]
        return self._random.choice([text, text, text.upper(), text.title(), text.replace("\n", "\r\n")])

    def words(self) -> str:
        words = ["".join(self._some(string.ascii_letters, 14)) for _ in range(self._count(10))]
        return "".join(word + self._random.choice([" ", "  ", ", ", ". ", "-", "_", "", "'", "\n"]) for word in words)

    def letters(self) -> str:
        return "".join(self._some(string.ascii_lowercase + "aeiou" * 3, 300))

    def scripts(self) -> str:
        def word() -> str:
            first, last = self._random.choice([*SCRIPTS.values()])
            return "".join(chr(self._random.randint(first, last)) for _ in range(self._count(8)))

        return "".join(word() + self._random.choice(["", " ", " ", "。", "، ", "1"]) for _ in range(self._count(8)))

    def digits(self) -> str:
        runs = ["".join(self._some(self._random.choice([string.digits, DIGITS]), 30)) for _ in range(self._count(6))]
        return "".join(run + self._random.choice(["", " ", ".", ",", "e", "-", "%", " €", "\n"]) for run in runs)

    def white_space(self) -> str:
        runs = ["".join(self._some(self._random.choice([" ", " \n", " \t\r\n", WHITE_SPACE]), 20)) for _ in range(5)]
        return "".join(run + self._random.choice(["", "a", "1", ".", "é", "'s"]) for run in runs)

    def newlines(self) -> str:
        return "".join(
            self._random.choice(["", "a", "Z.", "7", " ", "!", "\t", "?!"]) + "".join(self._some(NEWLINES, 4))
            for _ in range(self._count(10))
        )

    def contractions(self) -> str:
        parts = (
            "".join(self._some(string.ascii_letters + "é中1", 4))
            + self._random.choice(APOSTROPHES)
            + self._random.choice(CONTRACTIONS)
            for _ in range(self._count(6))
        )
        return self._random.choice([" ", "", "\n"]).join(parts)

    def emoji(self) -> str:
        return "".join(self._some([*EMOJI, " ", "a", "!", "\n"], 20))

    def combining(self) -> str:
        base = [*string.ascii_letters, "é", "क", "ا", " ", "1", "!", "\n", "한"]
        return "".join(letter + "".join(self._some(COMBINING, 4)) for letter in self._some(base, 12))

    def right_to_left(self) -> str:
        letters = [*map(chr, range(0x5D0, 0x5EB)), *map(chr, range(0x621, 0x64B)), *BIDI, " ", " ", ".", "3"]
        return "".join(self._some(letters, 40))

    def code(self) -> str:
        return "".join(self._some(CODE, 8))

    def lookalikes(self) -> str:
        return "".join(self._some([*LOOKALIKES, " ", "a", "\n"], 8))

    def edges(self) -> str:
        return "".join(self._some([*map(chr, EDGES), "a", " ", "1", "."], 12))

    def any_unicode(self) -> str:
        def character() -> str:
            code = self._random.randrange(1 << self._random.randint(7, 20)) + self._random.choice([0, 0, 0, 0x10000])
            return chr(code) if not 0xD800 <= code < 0xE000 else "\ud7ff"

        return "".join(character() for _ in range(self._count(30)))

    def repetition(self) -> str:
        unit = "".join(self._some([*string.printable, "é", "中", "😀", "\u0301"], 3))
        return unit * self._count(100)
