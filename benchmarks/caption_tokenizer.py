"""Compare the caption tokenizer with the PTBTokenizer of the COCO evaluation.

    python benchmarks/caption_tokenizer.py CAPTIONS.jsonl [--generated 4000]

Each line of CAPTIONS.jsonl has a list of texts under `captions`. Additional texts are generated
with rare content: brackets, numbers, abbreviations, other scripts, URLs. Real texts are also
corrupted with one to three random characters. The reference is PTBTokenizer of pycocoevalcap, which
requires `java`. The comparison uses the input of its scorers. Prints one JSON object.
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

from finesight.evaluate.metrics.captions.score import tokenize_caption

SUBJECTS = [
    "A man",
    "Two women",
    "the old dog",
    "Someone",
    "A boy's kite",
    "Children",
    "An airplane",
]
VERBS = ["is holding", "stands next to", "touches", "doesn't see", "rides past", "has got"]
OBJECTS = [
    "a red car",
    "the U.S. flag",
    "a well-known sign",
    "an ice-cream truck",
    "its owners' bags",
]
PUNCTUATION = [".", "", "!", "...", " .", "?", "…"]

TextGenerator = Callable[[random.Random], str]


def _choice(*options: str) -> TextGenerator:
    return lambda rng: rng.choice(options)


def _number_text(rng: random.Random) -> str:
    count, n = rng.randrange(1, 20000), rng.randrange(10, 100)
    forms = (
        f"{count}", f"{count:,}", f"{count / 100:.2f}", f"${count}", f"{count}%", f"#{n}",
        f"{n}-{n + 3}", f"1/{n}", f"{n}th", f"{n}:30", f"{n // 10}:30 p.m.",
        f"{n // 10}:{n}am", f"{n}kg", f"{n}.5cm", f"{n}x{n}", f"19{n}s",
        f"{n}-year-old", f"+{n}", f"-{n}", f"{n // 10}½", f"£{n}", f"{n} €",
        f"{n}°C", f"{n // 8}/{n // 4}/20{n}", f"US${n}", f".{n}", f"No. {n}",
    )  # fmt: skip
    return rng.choice(forms)


GENERATORS: dict[str, TextGenerator] = {
    "quotes": _choice(
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
    "brackets": _choice(
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
    "numbers": _number_text,
    "clitics": _choice(
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
    "abbreviations": _choice(
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
    "joined": _choice(
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
    "addresses": _choice(
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
    "scripts and signs": _choice(
        "café",
        "Zürich",
        "ñandú",
        "naïve",
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


def generate_captions(count: int) -> list[tuple[str, str]]:
    """Generate (kind, text) pairs, deterministically."""
    rng = random.Random(0)
    made = []
    for i in range(count):
        kind = list(GENERATORS)[i % len(GENERATORS)]
        middle = [
            rng.choice(VERBS),
            GENERATORS[kind](rng),
            rng.choice(["", "and", "near", ","]),
        ]
        if rng.random() < 0.5:
            middle.append(GENERATORS[kind](rng))
        pieces = [rng.choice(SUBJECTS), *middle, rng.choice(OBJECTS)]
        text = " ".join(filter(None, pieces)).replace(" ,", ",") + rng.choice(PUNCTUATION)
        made.append((kind, text))
    return made


INSERTED_CHARS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~0123456789“”‘’–—…«»°½×€£ "


def corrupt_captions(texts: Sequence[str], copies: int) -> list[str]:
    """Copy each text several times and insert up to three random characters, deterministically."""
    rng = random.Random(1)
    made = []
    for text in [*texts] * copies:
        for _ in range(rng.randint(1, 3)):
            position = rng.randint(0, len(text))
            text = text[:position] + rng.choice(INSERTED_CHARS) + text[position:]
        made.append(text)
    return made


def tokenize_reference(texts: Sequence[str]) -> list[list[str]]:
    """Tokenize texts with the reference tokenizer."""
    captions = {i: [{"caption": text}] for i, text in enumerate(texts)}
    tokens = PTBTokenizer().tokenize(captions)
    return [tokens[i][0].split() for i in range(len(texts))]


def compare_tokens(texts: Sequence[str], expected: Sequence[list[str]]) -> dict[str, object]:
    """Count equal texts and return the first differences."""
    own = [tokenize_caption(text) for text in texts]
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
    """Run the comparison and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("--generated", type=int, default=4000)
    chosen = parser.parse_args()
    lines = chosen.captions.read_text(encoding="utf-8").splitlines()
    real = [
        re.sub(r"\s*\n\s*", " ", text) for line in lines for text in json.loads(line)["captions"]
    ]
    made = generate_captions(chosen.generated)
    spoilt = corrupt_captions(real, 8)
    expected = iter(tokenize_reference([*real, *spoilt, *(text for _, text in made)]))
    result: dict[str, object] = {
        "reference": f"pycocoevalcap {metadata.version('pycocoevalcap')}, PTBTokenizer",
        "captions": compare_tokens(real, [next(expected) for _ in real]),
        "damaged captions": compare_tokens(spoilt, [next(expected) for _ in spoilt]),
    }
    rest = [(kind, text, next(expected)) for kind, text in made]
    result["generated"] = compare_tokens(
        [text for _, text, _ in rest], [tokens for *_, tokens in rest]
    )
    for name in GENERATORS:
        rows = [(text, tokens) for kind, text, tokens in rest if kind == name]
        result[f"generated: {name}"] = compare_tokens(
            [t for t, _ in rows], [tokens for _, tokens in rows]
        )
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
