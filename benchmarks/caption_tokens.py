"""How often captions are split into words as by the COCO evaluation. Prints one JSON object.

    python benchmarks/caption_tokens.py CAPTIONS.jsonl [--generated 4000]

CAPTIONS.jsonl has a list of texts under `captions` in each line. Beside them, texts are made up
with what captions seldom hold (brackets, numbers, abbreviations, other scripts, addresses), and the
real ones are damaged: one to three signs, typed or typeset, put anywhere into each. The reference
is pycocoevalcap's PTBTokenizer and needs `java`; compared is what its scorers see.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from finesight.evaluate.words import words

SUBJECTS = [
    "A man",
    "Two women",
    "the old dog",
    "Someone",
    "A boy's kite",
    "Children",
    "An airplane",
]
VERBS = ["is holding", "stands next to", "looks at", "doesn't see", "rides past", "has got"]
THINGS = [
    "a red car",
    "the U.S. flag",
    "a well-known sign",
    "an ice-cream truck",
    "its owners' bags",
]
ENDS = [".", "", "!", "...", " .", "?", "…"]

Make = Callable[[random.Random], str]


def _one_of(*texts: str) -> Make:
    return lambda chance: chance.choice(texts)


def _number(chance: random.Random) -> str:
    whole, part = chance.randrange(1, 20000), chance.randrange(10, 100)
    forms = (
        f"{whole}", f"{whole:,}", f"{whole / 100:.2f}", f"${whole}", f"{whole}%", f"#{part}",
        f"{part}-{part + 3}", f"1/{part}", f"{part}th", f"{part}:30", f"{part // 10}:30 p.m.",
        f"{part // 10}:{part}am", f"{part}kg", f"{part}.5cm", f"{part}x{part}", f"19{part}s",
        f"{part}-year-old", f"+{part}", f"-{part}", f"{part // 10}½", f"£{part}", f"{part} €",
        f"{part}°C", f"{part // 8}/{part // 4}/20{part}", f"US${part}", f".{part}", f"No. {part}",
    )  # fmt: skip
    return chance.choice(forms)


KINDS: dict[str, Make] = {
    "quotes": _one_of(
        '"STOP"',
        "'stop'",
        "“stop”",
        "‘stop’",
        "«stop»",
        "``stop''",
        '"No," he said',
        "5'10\"",
        "the '90s",
        "’70s",
        "rock 'n' roll",
        "`a`",
        '"a"b',
        "'em",
        "o'clock",
        "O'Neil's",
    ),
    "brackets": _one_of(
        "(left)",
        "[left]",
        "{left}",
        "((a))",
        "(e.g. this)",
        "<left>",
        "a (b) c",
        "(1)",
        "[2]",
        "(s)",
        "<b>bold</b>",
        "a<b",
        "3>2",
        ":)",
        ":-(",
        ";)",
        "=D",
        "^_^",
    ),
    "numbers": _number,
    "clitics": _one_of(
        "can't",
        "won't",
        "it’s",
        "they'll",
        "we've",
        "I'd",
        "I'm",
        "should've",
        "cannot",
        "gonna",
        "wanna",
        "y'all",
        "'tis",
        "CAN'T",
        "James'",
        "James's",
        "dogs'",
        "the 1990's",
        "didn’t",
        "ma'am",
    ),
    "abbreviations": _one_of(
        "Mr. Smith",
        "Dr. Who",
        "St. Louis",
        "U.S.A.",
        "e.g. one",
        "i.e. two",
        "etc.",
        "vs. him",
        "a.m.",
        "Inc.",
        "Ltd.",
        "Ph.D.",
        "J. Doe",
        "J.K. R.",
        "N.Y.",
        "Jan. 5",
        "approx. ten",
        "Mt. Fuji",
        "B.B. King",
        "Ave.",
        "Jr.",
        "vitamin C.",
        "No. 7",
        "AT&T",
        "R&B",
        "Q&A",
        "a TV.",
    ),
    "joined": _one_of(
        "t-shirt",
        "mother-in-law's",
        "and/or",
        "he/she",
        "24/7",
        "black-and-white",
        "w/o",
        "a/b/c/d",
        "co-op",
        "re-use",
        "1-on-1",
        "a--b",
        "a—b",
        "a – b",
        "end - start",
        "snow_board",
        "a+b",
        "A+B",
        "C++",
        "red,blue",
        "red,blue-green",
        "word.Word",
        "one;two",
        "--- x",
        "----- x",
        "x-",
        "-x",
    ),
    "addresses": _one_of(
        "www.example.com",
        "http://example.org/a?b=c",
        "me@example.com",
        "@someone",
        "#sunset",
        "photo.jpg",
        "example.com.",
        "(https://a.org)",
        "IMG_2034.JPG",
        "file.py",
        "a@b",
        "v1.2.3",
    ),
    "scripts and signs": _one_of(
        "café",
        "Zürich",
        "ñandú",
        "naïve-looking",
        "Москва",
        "日本語",
        "東京、日本",
        "한국어",
        "Ελλάδα",
        "שלום",
        "مرحبا",
        "हिन्दी",
        "soufflé's",
        "©2020",
        "™",
        "→",
        "★★★",
        "♥",
        "😀",
        "👍🏽",
        "½",
        "20°",
        "× 2",
        "•",
        "§ 5",
        "a & b",
        "a * b",
        "**bold**",
        "50 %",
        "~10",
        "a | b",
        "a = b",
        "100％",
        "¿Qué?",
        "₹5",
        "a…b",
        "…",
        "n°",
        "l’été",
        "L'Oréal",
        "a\u00a0b",
        "a\u200bb",
        "co\u00adop",
        "!!",
        "?!",
        "!!!",
    ),
}


def generated(count: int) -> list[tuple[str, str]]:
    """(kind, text) pairs, always the same ones."""
    chance = random.Random(0)
    made = []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        middle = [
            chance.choice(VERBS),
            KINDS[kind](chance),
            chance.choice(["", "and", "near", ","]),
        ]
        if chance.random() < 0.5:
            middle.append(KINDS[kind](chance))
        pieces = [chance.choice(SUBJECTS), *middle, chance.choice(THINGS)]
        text = " ".join(filter(None, pieces)).replace(" ,", ",") + chance.choice(ENDS)
        made.append((kind, text))
    return made


SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~0123456789“”‘’–—…«»°½×€£ "


def damaged(texts: Sequence[str], times: int) -> list[str]:
    """Each text several times, with up to three signs put in anywhere; always the same ones."""
    chance = random.Random(1)
    made = []
    for text in [*texts] * times:
        for _ in range(chance.randint(1, 3)):
            place = chance.randint(0, len(text))
            text = text[:place] + chance.choice(SIGNS) + text[place:]
        made.append(text)
    return made


def reference(texts: Sequence[str]) -> list[list[str]]:
    """What the scorers see of each text after the reference's tokeniser."""
    captions = {i: [{"caption": text}] for i, text in enumerate(texts)}
    tokens = PTBTokenizer().tokenize(captions)
    return [tokens[i][0].split() for i in range(len(texts))]


def agreement(texts: Sequence[str], expected: Sequence[list[str]]) -> dict[str, object]:
    """How many texts come out the same, and the first that do not."""
    own = [words(text) for text in texts]
    different = [i for i, pair in enumerate(zip(own, expected, strict=True)) if pair[0] != pair[1]]
    return {
        "texts": len(texts),
        "equal": len(texts) - len(different),
        "share": round(1 - len(different) / len(texts), 4),
        "words": sum(map(len, expected)),
        "first_differences": [
            {"text": texts[i], "own": own[i], "reference": expected[i]} for i in different[:5]
        ],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("--generated", type=int, default=4000)
    chosen = parser.parse_args()
    lines = chosen.captions.read_text(encoding="utf-8").splitlines()
    real = [
        re.sub(r"\s*\n\s*", " ", text) for line in lines for text in json.loads(line)["captions"]
    ]
    made = generated(chosen.generated)
    spoilt = damaged(real, 8)
    expected = iter(reference([*real, *spoilt, *(text for _, text in made)]))
    result: dict[str, object] = {
        "reference": f"pycocoevalcap {metadata.version('pycocoevalcap')}, PTBTokenizer",
        "captions": agreement(real, [next(expected) for _ in real]),
        "damaged captions": agreement(spoilt, [next(expected) for _ in spoilt]),
    }
    rest = [(kind, text, next(expected)) for kind, text in made]
    result["generated"] = agreement([text for _, text, _ in rest], [tokens for *_, tokens in rest])
    for name in KINDS:
        rows = [(text, tokens) for kind, text, tokens in rest if kind == name]
        result[f"generated: {name}"] = agreement(
            [t for t, _ in rows], [tokens for _, tokens in rows]
        )
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
