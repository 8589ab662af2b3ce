"""Strings of many kinds, drawn from a seed, to compare tokenizers."""

import random

_WORD_TEXT = r"""
the The THE picture shows isn't we'll I'd dogs' naïve café Zürich schön straße x_1 f(x)=2x+1
http://a.b/c?d=e&f 3.14159 1,000,000 007 2023-08-31 camelCase snake_case __init__
\frac{a}{b} $\alpha_i$ {"bbox":[1,2]} e=mc² ½ № Ⅻ ﬁ antidisestablishmentarianism 你好 世界
图中的狗是什么品种？ 请框出“重庆”。
东京タワー カタカナ ひらがな 한국어 안녕하세요
Привет мир Ελλάδα שלום مرحبا
हिन्दी ไทย 😀 👍🏽
👨‍👩‍👧 🇨🇳 ☃️ 𝔘𝔫𝔦 ∑∫√ →⇒ “” … — « » <|im_end|> <|im_start|>user <|endoftext|> <|extra_0|>
<img>a.png</img> <imgpad> <box>(1,2),(3,4)</box> <ref>it</ref> </box> <quad> <|image_pad|> <
img > <|im_end| !!! ??? ---- ==== //// @@ ##
"""
WORDS = _WORD_TEXT.split()
SPACES = (" ", " ", " ", " ", "", "", "  ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u3000", "\u00a0")
UNUSUAL_CHARACTERS = (
    *("e\u0301", "A\u030a", "\u1100\u1161", "\u212b", "\ufb01"),
    *("\x00", "\x7f", "\u200b", "\ufeff"),
)
IMAGE_NAMES = (
    *("a.png", "data/图片 1.jpg", "/mnt/x/y/very_long_name_of_a_folder/IMG_2023.jpeg", "é.webp"),
)

TextPiece = tuple[str, str]
"""A kind, "text", "special" or "image", and its content."""


def random_text(rng: random.Random) -> str:
    """Text that may spell special tokens."""
    parts = []
    for _ in range(rng.randrange(1, 14)):
        parts.append(rng.choice(UNUSUAL_CHARACTERS) if rng.random() < 0.08 else rng.choice(WORDS))
        parts.append(rng.choice(SPACES))
    return "".join(parts)


def random_markup(rng: random.Random) -> list[TextPiece]:
    """Make images, references, boxes, and text without special tokens."""
    pieces: list[TextPiece] = []
    for _ in range(rng.randrange(1, 6)):
        kind = rng.randrange(4)
        if kind == 0:
            pieces.append(("text", f"Picture {rng.randrange(1, 30)}: "))
            pieces += [("image", rng.choice(IMAGE_NAMES)), ("text", "\n")]
        elif kind == 1:
            text = random_text_without_specials(rng)
            pieces += [("special", "<ref>"), ("text", text), ("special", "</ref>")]
        elif kind == 2:
            corners = [rng.randrange(1000) for _ in range(4)]
            box = "({},{}),({},{})".format(*corners)
            pieces += [("special", "<box>"), ("text", box), ("special", "</box>")]
        else:
            pieces.append(("text", random_text_without_specials(rng)))
    return pieces


def random_text_without_specials(rng: random.Random) -> str:
    """Text that spells no special token."""
    return random_text(rng).replace("<", "(").replace(">", ")")


def make_strings(count: int, seed: int) -> list[list[TextPiece]]:
    """By turns one of each kind, as pieces."""
    rng = random.Random(seed)
    return [random_markup(rng) if n % 2 else [("text", random_text(rng))] for n in range(count)]
