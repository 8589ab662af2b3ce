"""Words of a caption, as the COCO evaluation splits them.

That evaluation calls Stanford's PTBTokenizer, a Java program, and drops some punctuation from what
comes out. This is a lexer with the same outcome on ordinary text (benchmarks/caption_tokens.py
measures how often): at each place the rule that reaches furthest wins, of equals the first. Quirks
that show in scores are kept: brackets become words such as `-lrb-`, which the evaluation means to
drop and does not, for it looks for them in capitals.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

LONGEST_RUN = 500
"""Characters without white space that are read together; some rules take the square of that."""

_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

# L: a letter of any script (with its marks). A: an apostrophe, typed or typeset.
_L = (
    r"(?:[^\W\d_\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u218b]"
    r"|[\u0300-\u036f\u0900-\u0dff\u0e00-\u0eff\xad])"
)
_A = "['\u2019\x92]"
_Q = "['\u2019\x92`\u2018\x91]"
_H = "[-\u2010\u2011]"
_CLITIC = rf"{_A}(?:[msdMSD]|[rR][eE]|[vV][eE]|[lL][lL])"
_FILE = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|"
    "ppt|ps|py|sql|tar|txt|wav|xml|x|zip"
)
_TITLES = (
    "Mr|Mrs|Ms|Miss|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|"
    "Pvt|Mt|Capt|Ste?|Ave|Pres|Lieut|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Jr|Sr|Bros|Blvd|Rd|Esq"
)
_OTHERS = (
    "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thurs?|Fri|Inc|Cos?|Corp|Ltd|Plc|"
    "Dept|Assn|Univ|Intl|Bldg|Ala|Ariz|Ark|Calif|Colo|Conn|Fla|Ga|Ill|Ind|Kans?|Ky|Md|Mich|Minn|"
    "Mont|Neb|Nev|Okla|Ore|Penna?|Pa|Tenn|Tex|Va|Vt|Wash|Wisc?|Wyo|etc|al|seq|est|vs|ft"
)
_RULES = [
    re.compile(pattern)
    for pattern in (
        # A word before "n't"; the part that is looked at counts towards how far a rule reaches.
        rf"([A-Za-z]*[A-MO-Za-mo-z])[nN]{_A}[tT]",
        rf"({_L}(?:{_L}|\d)*){_CLITIC}(?![A-Za-z])",
        rf"([nN]{_A}[tT])(?![A-Za-z])",
        rf"({_CLITIC})(?![A-Za-z])",
        # Two words written as one.
        r"([cC][aA][nN])[nN][oO][tT]\b|([gG][oO][nN])[nN][aA]\b|([gG][oO][tT])[tT][aA]\b",
        r"([lL][eE][mM])[mM][eE]\b|([gG][iI][mM])[mM][eE]\b|([wW][aA][nN])[nN][aA]\b",
        rf"({_A}[tT])(?:[iI][sS]|[wW][aA][sS])\b",
        rf"([yY]{_A})(?:[aA]ll|[aA]LL)",
        # Apostrophes that belong to their word.
        rf"({_A}[nN]{_A})|({_A}[nN])(?![A-Za-z])|({_A}(?:em|cause|till?))\b",
        rf"([oO]l{_A})|([sS]omethin{_A})",
        rf"([oO]{_A}clock|[cC]{_A}mon|{_A}[2-9]0s)",
        rf"([A-HJ-XZn]{_Q}{_L}{{2}}{_L}*)|([dDlLoOjJ]{_A}{_L}+)",
        rf"({_L}*[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*)",
        # Addresses.
        r"(https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-])",
        r"((?:www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"
        r"|(?:[^\s\"`'<>|.!?(){},\-_$/:\[\]]+\.)+(?:com|net|org|edu))"
        r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?)",
        r"(<?[a-zA-Z0-9][^\s\"<>|()\xa0{}]*@(?:[^\s\"<>|(){}.\xa0]+\.)*[^\s\"<>|(){}.\xa0]+>?)",
        r"([@#][A-Za-z_][A-Za-z_0-9]*)",
        # Words, alone and joined.
        rf"({_L}(?:{_L}|\d)*(?:[.!?]{_L}(?:{_L}|\d)*)*)",
        # A point before a comma belongs to its word.
        rf"({_L}(?:{_L}|\d)*(?:[.!?]{_L}(?:{_L}|\d)*)*\.)[,;:]",
        rf"((?:{_L}|\d)+)",
        rf"({_L}(?:{_L}|[0-9.,])*(?:{_H}(?:{_L}|\d)+)+)|((?:{_L}|\d)+(?:{_H}(?:{_L}|\d)+)+)",
        rf"((?:{_L}|\d)+(?:[.-](?:{_L}|\d)+)*\.(?:{_FILE})\b)",
        r"(\d+(?:[.,]\d+)*(?:-[A-Za-z0-9]+)+)",
        r"([A-Za-z0-9]+(?:_[A-Za-z0-9]+)+)",
        r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})",
        r"([A-Z]+(?:[+&][A-Z]+)+)|([Cc](?:\+\+|#))",
        # Abbreviations keep their point.
        r"([A-Za-z](?:\.[A-Za-z])+\.(?:-[A-Za-z]+)?)|([A-Za-z]\.)(?!$)",
        r"((?:[A-Za-z]+-)?(?:[A-Za-z]\.){2,})",
        rf"((?:{_TITLES}|{_TITLES.lower()})\.)|((?:{_OTHERS}|{_OTHERS.lower()})\.)",
        r"((?:Ph|Ed)\.D\.?)|((?:[Nn]os?|[Ff]igs?|[Aa]rts?|[Pp]p?)\.)(?=\s+\d)",
        # Numbers.
        r"([-+]?(?:\d*(?:[.,:]\d+)+|\d+))",
        r"(\d{1,4}/\d{1,4})|(\d{1,2}-\d{1,4}/\d{1,4})|(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        r"([A-Z]*\$)",
        # Faces, runs of signs, and any sign alone.
        r"([<>]?[:;=][-o*']?[()DPdp\\@|\[\]{])(?![A-Za-z0-9])|([:;=]3)\b|(\^_\^)",
        r"([?!]+)|(\.{3,5})|(-+)|(``|'')|(\*+)|(_+)",
        r"(\S)",
    )
]
_ENDING = re.compile(rf"[nN]{_A}[tT]|{_CLITIC}")
_UNREAD = set("\u2010\u2011\u2012\u300c\u300d\u300e\u300f") | set(map(chr, range(0x20B0, 0x20D0)))
_TAG = re.compile(
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
_WRITTEN = {
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


def words(caption: str) -> list[str]:
    """Lower-case words of a caption in Penn Treebank manner, most punctuation dropped."""
    found: list[str] = []
    start = 0
    for tag in _TAG.finditer(caption):
        found += _split(caption[start : tag.start()])
        found += tag[0].lower().split()
        start = tag.end()
    return [*found, *_split(caption[start:])]


def _split(text: str) -> Iterator[str]:
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    runs = text.replace("\u200b", " ").split()
    pieces = [run[i : i + LONGEST_RUN] for run in runs for i in range(0, len(run), LONGEST_RUN)]
    for piece, after in zip(pieces, [*pieces[1:], ""], strict=False):
        # What follows decides about points: a number ("No. 5"), more text, or nothing.
        yield from _lexed(piece, " 1" if after[:1].isdigit() else after and " a")


@lru_cache(maxsize=100_000)
def _lexed(piece: str, after: str) -> tuple[str, ...]:
    """The words of a run of text without white space, followed by something like `after`."""
    text, end = piece + after, len(piece)
    found, place = [], 0
    while place < end:
        matches = (match for rule in _RULES if (match := rule.match(text, place)))
        best = max(matches, key=lambda match: match.end())
        token = next(group for group in best.groups() if group is not None)
        place += len(token)
        found.append(_written(token))
    return tuple(word for word in found if word and word not in _DROPPED)


def _written(token: str) -> str:
    """A token as the reference writes it, empty for what it cannot read."""
    if len(token) == 1:
        if token in _WRITTEN:
            return _WRITTEN[token]
        if token in _BRACKETS:
            return _BRACKETS[token]
        # Beyond the basic plane the Java lexer sees halves of characters.
        if ord(token) > 0xFFFF or unicodedata.category(token)[0] in "CZ" or token in _UNREAD:
            return ""
    if set(token) == {"-"} and len(token) in (2, 3, 4):
        return "--"
    if set(token) == {"."}:
        return "..."
    if _ENDING.fullmatch(token):
        token = token.replace("\u2019", "'")
    token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("\xad", "").replace("\x92", "'").lower()
