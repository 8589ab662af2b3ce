"""Caption tokenizer compatible with the COCO evaluation.

The COCO evaluation uses Stanford's PTBTokenizer, a Java program, and removes some punctuation
tokens. This lexer gives the same result on ordinary text (`benchmarks/caption_tokenizer.py`
measures how often): at each position the longest match wins, and the first rule among equals.
Quirks that affect scores are reproduced. For example, brackets become words such as `-lrb-`,
because the COCO evaluation tries to remove them in upper case only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

MAX_RUN_LENGTH = 500
"""Maximum characters without whitespace per tokenizer call; some rules take quadratic time."""

_DROPPED_TOKENS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

# _LETTER: a letter of any script with its marks. _APOSTROPHE: typewriter or typographic.
_LETTER = (
    r"(?:[^\W\d_\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u218b]"
    r"|[\u0300-\u036f\u0900-\u0dff\u0e00-\u0eff\xad])"
)
_APOSTROPHE = "['\u2019\x92]"
_QUOTE = "['\u2019\x92`\u2018\x91]"
_HYPHEN = "[-\u2010\u2011]"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
_FILE_EXTENSIONS = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|"
    "ppt|ps|py|sql|tar|txt|wav|xml|x|zip"
)
_TITLES = (
    "Mr|Mrs|Ms|Miss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|"
    "Pvt|Mt|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Jr|Sr|Bros|Blvd|Rd|Esq"
)
_ABBREVIATIONS = (
    "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thurs?|Fri|Inc|Cos?|Corp|Ltd|Plc|"
    "Dept|Assn|Univ|Intl|Bldg|Ala|Ariz|Ark|Calif|Colo|Conn|Fla|Ga|Ill|Ind|Kans?|Ky|Md|Mich|Minn|"
    "Mont|Neb|Nev|Okla|Ore|Penna?|Pa|Tenn|Tex|Va|Vt|Wash|Wisc?|Wyo|etc|al|seq|est|vs|ft"
)
_TOKEN_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        # A word before "n't"; the lookahead counts towards the match length.
        rf"([A-Za-z]*[A-MO-Za-mo-z])[nN]{_APOSTROPHE}[tT]",
        rf"({_LETTER}(?:{_LETTER}|\d)*){_CLITIC}(?![A-Za-z])",
        rf"([nN]{_APOSTROPHE}[tT])(?![A-Za-z])",
        rf"({_CLITIC})(?![A-Za-z])",
        # Contracted words.
        r"([cC][aA][nN])[nN][oO][tT]\b|([gG][oO][nN])[nN][aA]\b|([gG][oO][tT])[tT][aA]\b",
        r"([lL][eE][mM])[mM][eE]\b|([gG][iI][mM])[mM][eE]\b|([wW][aA][nN])[nN][aA]\b",
        rf"({_APOSTROPHE}[tT])(?:[iI][sS]|[wW][aA][sS])\b",
        rf"([yY]{_APOSTROPHE})(?:[aA]ll|[aA]LL)",
        # Words with apostrophes.
        rf"({_APOSTROPHE}[nN]{_APOSTROPHE})|({_APOSTROPHE}[nN])(?![A-Za-z])"
        rf"|({_APOSTROPHE}(?:em|cause|till?))\b",
        rf"([oO]l{_APOSTROPHE})|([sS]omethin{_APOSTROPHE})",
        rf"([oO]{_APOSTROPHE}clock|[cC]{_APOSTROPHE}mon|{_APOSTROPHE}[2-9]0s)",
        rf"([A-HJ-XZn]{_QUOTE}{_LETTER}{{2}}{_LETTER}*)|([dDlLoOjJ]{_APOSTROPHE}{_LETTER}+)",
        rf"({_LETTER}*[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_LETTER}*)",
        # URLs and e-mail addresses.
        r"(https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-])",
        r"((?:www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"
        r"|(?:[^\s\"`'<>|.!?(){},\-_$/:\[\]]+\.)+(?:com|net|org|edu))"
        r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?)",
        r"(<?[a-zA-Z0-9][^\s\"<>|()\xa0{}]*@(?:[^\s\"<>|(){}.\xa0]+\.)*[^\s\"<>|(){}.\xa0]+>?)",
        r"([@#][A-Za-z_][A-Za-z_0-9]*)",
        # Words and compounds.
        rf"({_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*)",
        # A period before a comma is part of the word.
        rf"({_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*\.)[,;:]",
        rf"((?:{_LETTER}|\d)+)",
        rf"({_LETTER}(?:{_LETTER}|[0-9.,])*(?:{_HYPHEN}(?:{_LETTER}|\d)+)+)"
        rf"|((?:{_LETTER}|\d)+(?:{_HYPHEN}(?:{_LETTER}|\d)+)+)",
        rf"((?:{_LETTER}|\d)+(?:[.-](?:{_LETTER}|\d)+)*\.(?:{_FILE_EXTENSIONS})\b)",
        r"(\d+(?:[.,]\d+)*(?:-[A-Za-z0-9]+)+)",
        r"([A-Za-z0-9]+(?:_[A-Za-z0-9]+)+)",
        r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})",
        r"([A-Z]+(?:[+&][A-Z]+)+)|([Cc](?:\+\+|#))",
        # Abbreviations with their period.
        r"([A-Za-z](?:\.[A-Za-z])+\.(?:-[A-Za-z]+)?)|([A-Za-z]\.)(?!$)",
        r"((?:[A-Za-z]+-)?(?:[A-Za-z]\.){2,})",
        rf"((?:{_TITLES}|{_TITLES.lower()})\.)|((?:{_ABBREVIATIONS}|{_ABBREVIATIONS.lower()})\.)",
        r"((?:Ph|Ed)\.D\.?)|((?:[Nn]os?|[Ff]igs?|[Aa]rts?|[Pp]p?)\.)(?=\s+\d)",
        # Numeric tokens.
        r"([-+]?(?:\d*(?:[.,:]\d+)+|\d+))",
        r"(\d{1,4}/\d{1,4})|(\d{1,2}-\d{1,4}/\d{1,4})|(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        r"([A-Z]*\$)",
        # Emoticons, repeated symbols, single symbols.
        r"([<>]?[:;=][-o*']?[()DPdp\\@|\[\]{])(?![A-Za-z0-9])|([:;=]3)\b|(\^_\^)",
        r"([?!]+)|(\.{3,5})|(-+)|(``|'')|(\*+)|(_+)",
        r"(\S)",
    )
]
_CLITIC_ENDING = re.compile(rf"[nN]{_APOSTROPHE}[tT]|{_CLITIC}")
_UNREADABLE_CHARS = set("\u2010\u2011\u2012\u300c\u300d\u300e\u300f") | set(
    map(chr, range(0x20B0, 0x20D0))
)
_MARKUP_TAG = re.compile(
    r"<(?:[!?][A-Za-z-][^>]*|/?[A-Za-z][A-Za-z0-9_:.-]*"
    r"(?:\s+[A-Za-z][A-Za-z0-9_:.-]*(?:\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s\"'<>]+))?)*\s*/?)>"
)
_BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_CHAR_REPLACEMENTS = {
    "\u2026": "...",
    "\xa2": "cents",
    "\xa3": "#",
    "\u20ac": "$",
    "\xa4": "$",
    **dict.fromkeys("\u2013\u2014\u2015", "--"),
    **dict.fromkeys('"\u201c\u201d\xab\xbb\u2018\u2019\u201b\u2039\u203a', "'"),
    **{
        character: unicodedata.normalize("NFKC", character).replace("\u2044", "/")
        for character in "\xbc\xbd\xbe\u2153\u2154\u215b\u215c\u215d\u215e"
    },
}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}


def tokenize_caption(caption: str) -> list[str]:
    """Split a caption into lower-case Penn Treebank tokens, without most punctuation."""
    tokens: list[str] = []
    start = 0
    for tag in _MARKUP_TAG.finditer(caption):
        tokens += _tokenize_text(caption[start : tag.start()])
        tokens += tag[0].lower().split()
        start = tag.end()
    return [*tokens, *_tokenize_text(caption[start:])]


def _tokenize_text(text: str) -> Iterator[str]:
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    runs = text.replace("\u200b", " ").split()
    pieces = [
        run[i : i + MAX_RUN_LENGTH] for run in runs for i in range(0, len(run), MAX_RUN_LENGTH)
    ]
    for piece, next_piece in zip(pieces, [*pieces[1:], ""], strict=False):
        # Period rules depend on the next text: a number ("No. 5"), other text, or the end.
        yield from _tokenize_run(piece, " 1" if next_piece[:1].isdigit() else next_piece and " a")


@lru_cache(maxsize=100_000)
def _tokenize_run(piece: str, lookahead: str) -> tuple[str, ...]:
    """Tokenize text without whitespace; some rules depend on the `lookahead` after it."""
    text, end = piece + lookahead, len(piece)
    tokens, position = [], 0
    while position < end:
        matches = (match for rule in _TOKEN_PATTERNS if (match := rule.match(text, position)))
        best = max(matches, key=lambda match: match.end())
        token = next(group for group in best.groups() if group is not None)
        position += len(token)
        tokens.append(_normalize_token(token))
    return tuple(word for word in tokens if word and word not in _DROPPED_TOKENS)


def _normalize_token(token: str) -> str:
    """Return a token as written by PTBTokenizer; empty if the evaluation drops it."""
    if len(token) == 1:
        if token in _CHAR_REPLACEMENTS:
            return _CHAR_REPLACEMENTS[token]
        if token in _BRACKETS:
            return _BRACKETS[token]
        # The Java lexer splits characters beyond the BMP into surrogates.
        if (
            ord(token) > 0xFFFF
            or unicodedata.category(token)[0] in "CZ"
            or token in _UNREADABLE_CHARS
        ):
            return ""
    if set(token) == {"-"} and len(token) in (2, 3, 4):
        return "--"
    if set(token) == {"."}:
        return "..."
    if _CLITIC_ENDING.fullmatch(token):
        token = token.replace("\u2019", "'")
    token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("\xad", "").replace("\x92", "'").lower()
