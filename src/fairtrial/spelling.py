"""What a message says after a name that nobody knows."""

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 30


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean a or b?' with the nearest known words, or else all of them if they are few."""
    words = list(known)
    lowered = {each.lower(): each for each in words}
    close = get_close_matches(word[:80].lower(), lowered, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(lowered[each] for each in close)}?"
    if len(words) > LISTED:
        return f"none of the {len(words)} known ones is near"
    return f"there is: {', '.join(words) or 'none'}"
