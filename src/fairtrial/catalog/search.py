"""Full-text search over the papers: SQLite's FTS5 in memory, forgiving about endings, spelling and typing errors."""

import re
import sqlite3
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable
from difflib import SequenceMatcher
from heapq import nlargest
from threading import Lock

from .records import ARXIV, Paper

# How much a word found in a column counts.
WEIGHTS = {"slug": 10.0, "title": 8.0, "family": 4.0, "summary": 2.0, "claims": 1.0}

_WORD = re.compile(r"[^\W_]+")  # what FTS5's unicode61 tokenizer takes for a word
_ARXIV_WITHIN = re.compile(rf"(?<![\w.])({ARXIV.pattern})(?![0-9])")  # bare, or in an address, or with a version
_LONGEST_QUERY = 1000  # a pasted title fits, a pasted paper does not slow the search down
_MOST_WORDS = 16
_SHORTEST_STEMMED = 3  # shorter words are their own stems
_MOST_ENDINGS = 20
_LONGEST_WORD = 40
_SIMILAR = 0.65  # the least share of letters in common with a word meant
_AS_SIMILAR = 0.1  # how far below the most similar word others are still thought to be meant
_TELLING = 0.25  # a word in more papers than this share of them is not enough by itself


class Index:
    """The papers' words, each paper a row."""

    def __init__(self, papers: Iterable[Paper]) -> None:
        papers = list(papers)
        rows = [_row(paper) for paper in papers]
        self._slugs = [paper.slug for paper in papers]
        self._by_arxiv = {paper.arxiv: paper.slug for paper in papers if paper.arxiv}
        self._lock = Lock()  # one connection serves every thread that asks
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        columns = ", ".join(WEIGHTS)
        self._database.execute(f"CREATE VIRTUAL TABLE papers USING fts5({columns}, tokenize='porter unicode61')")
        self._database.executemany("INSERT INTO papers VALUES (?, ?, ?, ?, ?)", rows)
        self._containing: dict[str, list[str]] = defaultdict(list)
        self._vocabulary = sorted({word for row in rows for text in row for word in _words(text)})
        for word in self._vocabulary:
            for pair in _pairs(word):
                self._containing[pair].append(word)

    def ranked(self, query: str) -> list[str]:
        """Slugs of the papers that the query means, best first; all if it holds no word.

        Every word has to be found, as it is or as the beginning of one. Only where that leads nowhere, words found
        nowhere are replaced by the most similar ones, and at last any one of the words is enough.
        """
        query = query[:_LONGEST_QUERY]
        named = _ARXIV_WITHIN.search(query)
        if named and named[0] in self._by_arxiv:
            return [self._by_arxiv[named[0]]]
        words = list(dict.fromkeys(_words(query)))[:_MOST_WORDS]
        if not words:
            return sorted(self._slugs)
        with self._lock:
            wanted = [self._spellings(word) for word in words]
            found = self._matching(wanted, "AND")
            if not found:
                wanted = self._known(words)
                found = self._matching(wanted, "AND") or self._matching(self._telling(wanted), "OR")
        query = "".join(spellings[0] for spellings in wanted)
        # A slug being typed may look like another word for a moment: 'lay', on the way to 'layered'.
        found += [slug for slug in self._slugs if query and _likeness(slug, query) < 2 and slug not in found]
        return sorted(found, key=lambda slug: _likeness(slug, query))

    def _known(self, words: list[str]) -> list[list[str]]:
        """For each word that the papers do not hold, what begins so and what is most similar; none for some."""
        known = []
        for word in words:
            spellings = self._spellings(word)
            found = spellings if self._matching([spellings], "AND") else []
            known.append(found if self._holds(word) else found + self._similar(word))
        return [spellings for spellings in known if spellings]

    def _telling(self, wanted: list[list[str]]) -> list[list[str]]:
        """The words that are enough by themselves; all if none is."""
        most = _TELLING * len(self._slugs)
        return [spellings for spellings in wanted if len(self._matching([spellings], "AND")) < most] or wanted

    def _matching(self, wanted: list[list[str]], operator: str) -> list[str]:
        """Slugs of the rows with one spelling of every word, or of any, best first."""
        if not wanted:
            return []
        groups = (" OR ".join(map(_term, spellings)) for spellings in wanted)
        expression = f" {operator} ".join(f"({group})" for group in groups)
        weights = ", ".join(map(str, WEIGHTS.values()))
        rows = self._database.execute(
            f"SELECT rowid FROM papers WHERE papers MATCH ? ORDER BY bm25(papers, {weights}), rowid", (expression,)
        )
        return [self._slugs[rowid - 1] for (rowid,) in rows]

    def _spellings(self, word: str) -> list[str]:
        """The word, its British or American twin and, if the papers hold neither, their words that begin so.

        FTS5 alone does not find 'imbalance' by 'imbala', because what it keeps of a word is the stem, here 'imbal'.
        """
        twins = _twins(word)
        if len(word) < _SHORTEST_STEMMED or self._holds(word):
            return twins
        return list(dict.fromkeys(twins + [other for twin in twins for other in self._beginning(twin)]))

    def _holds(self, word: str) -> bool:
        return any(self._beginning(twin)[:1] == [twin] for twin in _twins(word))

    def _beginning(self, word: str) -> list[str]:
        """The papers' words that begin so."""
        start = bisect_left(self._vocabulary, word)
        return [other for other in self._vocabulary[start : start + _MOST_ENDINGS] if other.startswith(word)]

    def _similar(self, word: str) -> list[str]:
        """The words of the papers that a mistyped word may stand for."""
        if not any(map(str.isalpha, word)):
            return []  # another number is not what was meant
        shared = Counter(other for pair in _pairs(word) for other in self._containing.get(pair, ()))
        likely = nlargest(40, shared, key=lambda other: shared[other] / (len(word) + len(other)))
        similar = {other: SequenceMatcher(None, other, word).ratio() for other in likely}
        best = max(similar.values(), default=0.0)
        near = [other for other in similar if similar[other] >= max(_SIMILAR, best - _AS_SIMILAR)]
        return nlargest(5, near, key=similar.__getitem__)


def _likeness(slug: str, query: str) -> int:
    """0 for the slug that the query is, 1 for those that begin so."""
    joined = slug.replace("_", "")
    return 0 if joined == query else 1 if joined.startswith(query) else 2


def _row(paper: Paper) -> tuple[str, ...]:
    statements = " ".join(claim.statement for claim in paper.claims)
    slug = f"{paper.slug} {paper.slug.replace('_', '')}"  # 'zloss' is 'z_loss' too
    return slug, paper.title, paper.family, paper.summary, statements


def _words(text: str) -> list[str]:
    return [word[:_LONGEST_WORD] for word in _WORD.findall(unicodedata.normalize("NFC", text).lower())]


def _twins(word: str) -> list[str]:
    """The word, and its British or American spelling."""
    return list(dict.fromkeys((word, re.sub("iz(?=[aei])", "is", word), re.sub("is(?=[aei])", "iz", word))))


def _pairs(word: str) -> set[str]:
    """The pairs of neighbouring letters, the word's ends included."""
    padded = f" {word} "
    return {padded[i : i + 2] for i in range(len(padded) - 1)}


def _term(word: str) -> str:
    """A word in FTS5's language: as it is, which adds to the score, or as a beginning, unless it is a number."""
    return f'"{word}"' if word.isdigit() else f'"{word}" OR "{word}" *'
