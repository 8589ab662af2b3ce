"""Caption metrics with one or more references: BLEU, ROUGE-L and CIDEr-D as in COCO.

Same definitions as the COCO evaluation code (Chen et al. 2015): corpus BLEU with the closest
reference length (Papineni et al. 2002), ROUGE-L with beta 1.2 (Lin 2004), CIDEr-D with n-grams up
to 4, sigma 6 and a factor of 10 (Vedantam et al. 2015). Resamples use the document frequencies of
the full set. METEOR, a Java program, is not included.

The COCO evaluation tokenizes with Stanford's PTBTokenizer, a Java program, and removes some
punctuation tokens. `tokenize_caption` gives the same result on ordinary text
(`benchmarks/caption_tokenizer.py` measures how often): at each position the longest match wins, and
the first rule among equals. Quirks that affect scores are reproduced. For example, brackets become
words such as `-lrb-`, because the COCO evaluation tries to remove them in upper case only.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from finesight.evaluate.bleu import (
    MAX_NGRAM_ORDER,
    NGram,
    NGramCounts,
    WordSequence,
    count_bleu_statistics,
    count_ngrams,
    estimate_bleu,
)
from finesight.evaluate.bootstrap import NON_NEGATIVE
from finesight.evaluate.eval_case import EvalCase, MetricResult, mean_metrics

MAX_RUN_LENGTH = 500
"""Maximum characters without whitespace per tokenizer call; some rules take quadratic time."""

_DROPPED_TOKENS = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

# _LETTER: a letter of any script with its marks. Atomic groups do not try both alternatives, which
# a Thai letter matches, in exponential time. _APOSTROPHE: typewriter or typographic.
_LETTER = (
    r"(?>[^\W\d_\xb2\xb3\xb9\xbc-\xbe\u2070-\u209f\u2150-\u218b]"
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
        rf"({_LETTER}(?>{_LETTER}|\d)*){_CLITIC}(?![A-Za-z])",
        rf"([nN]{_APOSTROPHE}[tT])(?![A-Za-z])",
        rf"({_CLITIC})(?![A-Za-z])",
        # Contracted words are split: the group is the first token, the rest is the next one.
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
        rf"({_LETTER}(?>{_LETTER}|\d)*(?:[.!?]{_LETTER}(?>{_LETTER}|\d)*)*)",
        # A period before a comma is part of the word.
        rf"({_LETTER}(?>{_LETTER}|\d)*(?:[.!?]{_LETTER}(?>{_LETTER}|\d)*)*\.)[,;:]",
        rf"((?>{_LETTER}|\d)+)",
        rf"({_LETTER}(?>{_LETTER}|[0-9.,])*(?:{_HYPHEN}(?>{_LETTER}|\d)+)+)"
        rf"|((?>{_LETTER}|\d)+(?:{_HYPHEN}(?>{_LETTER}|\d)+)+)",
        rf"((?>{_LETTER}|\d)+(?:[.-](?>{_LETTER}|\d)+)*\.(?:{_FILE_EXTENSIONS})\b)",
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
_CHAR_REPLACEMENTS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
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
    pieces = []
    for run in text.replace("\u200b", " ").split():
        for start in range(0, len(run), MAX_RUN_LENGTH):
            pieces.append(run[start : start + MAX_RUN_LENGTH])
    for piece, next_piece in zip(pieces, [*pieces[1:], ""], strict=False):
        # Period rules depend on the next text: a number ("No. 5"), other text, or the end.
        lookahead = ""
        if next_piece[:1].isdigit():
            lookahead = " 1"
        elif next_piece:
            lookahead = " a"
        yield from _tokenize_run(piece, lookahead)


@lru_cache(maxsize=100_000)
def _tokenize_run(piece: str, lookahead: str) -> tuple[str, ...]:
    """Tokenize text without whitespace; some rules depend on the `lookahead` after it."""
    text = piece + lookahead
    words = []
    position = 0
    while position < len(piece):
        token = _match_token(text, position)
        position += len(token)
        word = _normalize_token(token)
        if word and word not in _DROPPED_TOKENS:
            words.append(word)
    return tuple(words)


def _match_token(text: str, position: int) -> str:
    """Return the token of the longest match at a position, of the first rule among equals."""
    matches = (match for rule in _TOKEN_PATTERNS if (match := rule.match(text, position)))
    longest = max(matches, key=lambda match: match.end())
    return next(group for group in longest.groups() if group is not None)


def _normalize_token(token: str) -> str:
    """Return a token as written by PTBTokenizer; empty if the evaluation drops it."""
    if len(token) == 1:
        if token in _CHAR_REPLACEMENTS:
            return _CHAR_REPLACEMENTS[token]
        is_unreadable = unicodedata.category(token)[0] in "CZ" or token in _UNREADABLE_CHARS
        # The Java lexer splits characters beyond the BMP into surrogates.
        if is_unreadable or ord(token) > 0xFFFF:
            return ""
    if set(token) == {"-"} and len(token) in (2, 3, 4):
        return "--"
    if set(token) == {"."}:
        return "..."
    if _CLITIC_ENDING.fullmatch(token):
        token = token.replace("\u2019", "'")
    token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("\xad", "").replace("\x92", "'").lower()


TfIdf = dict[NGram, float]

ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
CIDER_SCALE = 10.0


def score_captions(cases: Sequence[EvalCase]) -> MetricResult:
    """Compute CIDEr-D, ROUGE-L and BLEU-1 to BLEU-4; CIDEr-D and ROUGE-L also per sample."""
    candidates = [tokenize_caption(case.answer) for case in cases]
    references = [[tokenize_caption(reference) for reference in case.references] for case in cases]
    cider_scores = compute_cider_d(candidates, references)
    per_sample = []
    for candidate, truths, cider_d in zip(candidates, references, cider_scores, strict=True):
        per_sample.append({"cider_d": cider_d, "rouge_l": compute_rouge_l(candidate, truths)})
    # CIDEr-D is bounded by 10, but no set approaches this bound, so it is not informative.
    estimators = mean_metrics(per_sample, bounds={"cider_d": NON_NEGATIVE})
    counts = count_bleu_statistics(candidates, references)
    for order in range(1, MAX_NGRAM_ORDER + 1):
        estimators[f"bleu_{order}"] = estimate_bleu(counts, order)
    return MetricResult(per_sample, estimators)


def compute_rouge_l(candidate: WordSequence, references: Sequence[WordSequence]) -> float:
    """Compute ROUGE-L, the F-measure of the longest common subsequence, in [0, 1].

    Uses the best precision and the best recall over the references, with recall weighted by beta
    1.2 squared. A text without words counts as one empty word, as in the COCO evaluation.
    """
    candidate = candidate or [""]
    lengths = []
    recalls = []
    for reference in references:
        truth = reference or [""]
        length = _lcs_length(candidate, truth)
        lengths.append(length)
        recalls.append(length / len(truth))
    precision = max(lengths) / len(candidate)
    recall = max(recalls)
    if precision == 0.0 or recall == 0.0:
        return 0.0
    weight = ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def compute_cider_d(
    candidates: Sequence[WordSequence], references: Sequence[Sequence[WordSequence]]
) -> list[float]:
    """Compute CIDEr-D of each candidate, in [0, 10]; the corpus score is the mean.

    The weight of an n-gram decreases with the number of images whose references contain it. The
    score of an image depends on the other images and is 0 for a set of one image.
    """
    orders = range(1, MAX_NGRAM_ORDER + 1)
    document_frequency: NGramCounts = Counter()
    for truths in references:
        image_ngrams: set[NGram] = set()
        for text in truths:
            for order in orders:
                image_ngrams.update(count_ngrams(text, order))
        document_frequency.update(image_ngrams)
    log_num_images = math.log(max(1, len(candidates)))
    idf = {ngram: log_num_images - math.log(n) for ngram, n in document_frequency.items()}

    def weigh(text: WordSequence) -> list[TfIdf]:
        weights_by_order = []
        for order in orders:
            weights: TfIdf = {}
            for ngram, count in count_ngrams(text, order).items():
                weights[ngram] = count * idf.get(ngram, log_num_images)
            weights_by_order.append(weights)
        return weights_by_order

    scores = []
    for candidate, truths in zip(candidates, references, strict=True):
        weights = weigh(candidate)
        total = 0.0
        for truth in truths:
            # The COCO evaluation compares the numbers of bigrams.
            difference = max(1, len(candidate)) - max(1, len(truth))
            penalty = math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
            total += penalty * _cider_similarity(weights, weigh(truth))
        scores.append(CIDER_SCALE * total / len(truths))
    return scores


def _cider_similarity(candidate: list[TfIdf], reference: list[TfIdf]) -> float:
    """Return the mean similarity of two sentences over the orders of n-grams."""
    total = 0.0
    for weights, others in zip(candidate, reference, strict=True):
        # Candidate weights are clipped to the reference: repeated words do not raise the score.
        products = []
        for ngram, weight in weights.items():
            if ngram in others:
                products.append(min(weight, others[ngram]) * others[ngram])
        norms = math.hypot(*weights.values()) * math.hypot(*others.values())
        if norms:
            total += sum(products) / norms
    return total / MAX_NGRAM_ORDER


def _lcs_length(a: WordSequence, b: WordSequence) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            if word == other:
                row[j] = diagonal + 1
            else:
                row[j] = max(above, row[j - 1])
            diagonal = above
    return row[-1]
