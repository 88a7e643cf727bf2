"""A text's words, of any language, for comparisons that no model is asked for.

A text is brought to Unicode's form NFKC and folded to one case. A word is then a run of letters and digits with the
marks on them (Hindi's vowel signs, Arabic's points); where a script is written without spaces (Chinese characters,
kana, Thai, Lao, Khmer, Burmese) every letter is a word by itself, since a run would be a whole clause. Underscores end
a word like other punctuation: Markdown's _emphasis_ is the word that it is elsewhere. There is no stemming and no list
of stop words: BM25 counts a word for little that most texts have.

BM25, near-duplicates and contamination all have their words from here: where these change, so do `bm25.BM25_VERSION`
and `selection.contamination.VERSION`.

Texts without such marks and scripts take a shortcut to the same words.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

_WITHOUT_SPACES = (
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\u3041-\u3096\u30a1-\u30fa"  # kana
    "\u0e01-\u0e4e\u0e80-\u0ece\u1000-\u103f\u1050-\u109f\u1780-\u17d3"  # Thai, Lao, Burmese, Khmer
)
_BASIC_PLANE = 1 << 16  # marks beyond it, those of a few scripts, would make the pattern 20 times slower
_WORD = re.compile(r"[^\W_]+")
_ASCII_WORD = re.compile("[a-z0-9]+")  # the same for lower-cased ASCII, in two thirds of the time


def words(text: str) -> list[str]:
    """The words of a text, in order.

    >>> words("Don't panic: 42 Ärzte 東京")
    ['don', 't', 'panic', '42', 'ärzte', '東', '京']
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    folded = unicodedata.normalize("NFKC", text).casefold()
    special, word = _special()
    return word.findall(folded) if special.search(folded) else _WORD.findall(folded)


@cache
def _special() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a text has where its words are more than runs of letters, and what these words are then."""
    marks = "".join(mark for mark in map(chr, range(_BASIC_PLANE)) if unicodedata.category(mark)[0] == "M")
    word = f"[{_WITHOUT_SPACES}][{marks}]*|(?:[^\\W_{_WITHOUT_SPACES}][{marks}]*)+"
    return re.compile(f"[{marks}{_WITHOUT_SPACES}]"), re.compile(word)
