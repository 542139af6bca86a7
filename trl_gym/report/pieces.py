"""Text of single tokens, so that a sequence can be shown token by token without a tokenizer in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

_FRAGMENT = "\ufffd"  # how a decoder writes bytes that are no whole character
_MAX_RUN = 16  # tokens; a character has at most four bytes, longer runs are noise


class Pieces:
    """The pieces of the tokens that were added.

    Args:
        file: A `tokenizer.json`; None when there is none, then every piece is empty and ids are shown.
    """

    def __init__(self, file: Path | None) -> None:
        self._tokenizer = None if file is None else Tokenizer.from_file(str(file))
        # Some decoders drop a leading space at the beginning of a text: pieces are decoded after another token.
        anchor = [] if self._tokenizer is None else self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor: list[int] = anchor
        self._anchor_text = self._decode([*anchor]) if anchor else ""
        self._special = frozenset() if self._tokenizer is None else _special_ids(self._tokenizer)
        self.text: dict[int, str] = {}

    @property
    def is_known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def add(self, ids: Sequence[int]) -> None:
        """Remember the pieces of these tokens."""
        if self._tokenizer is not None:
            for token in set(ids).difference(self.text):
                self.text[token] = self._piece([token]) or self._tokenizer.id_to_token(token) or f"<token {token}>"

    def special(self) -> list[int]:
        """Those of the added tokens that are special."""
        return sorted(self._special.intersection(self.text))

    def glyphs(self, ids: Sequence[int]) -> dict[int, str]:
        """Where tokens are parts of a character: by the index of the last part, the text of all of them, and empty
        text for the parts before. Parts that never make a character stay as they are.

        Args:
            ids: Were added.
        """
        found: dict[int, str] = {}
        if self._tokenizer is None:
            return found
        start = 0
        while start < len(ids):
            if _FRAGMENT not in self.text[ids[start]]:
                start += 1
                continue
            end = self._end_of_glyph(ids, start)
            if end is not None:
                found |= dict.fromkeys(range(start, end - 1), "")
                found[end - 1] = self._piece(ids[start:end])
            start = end or start + 1
        return found

    def _end_of_glyph(self, ids: Sequence[int], start: int) -> int | None:
        for end in range(start + 2, min(start + _MAX_RUN, len(ids)) + 1):
            if _FRAGMENT not in self._piece(ids[start:end]):
                return end
            if _FRAGMENT not in self.text[ids[end - 1]]:
                return None
        return None

    def _piece(self, ids: Sequence[int]) -> str:
        text = self._decode([*self._anchor, *ids])
        return text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, content in added.items() if content.special)
