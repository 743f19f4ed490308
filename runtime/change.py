"""Whether requests have changed, by where they leave a module with caches.

Requests unlike those that the caches know are mostly trusted by none of them, and run to the end. That shows without
asking anything of the model: Page's cumulative sum (1954) of the log-likelihood ratio between the shares that leave at
each place when all is as it was, and those where some of the requests all run to the end instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log

_FOREIGN = (0.5, 0.1)
"""Shares of requests that run to the end for being unlike; each has a sum of its own. Half shows within a few."""
_LIMIT = log(len(_FOREIGN) * 1e5)
"""Of a sum. Where nothing changes it is reached once in 100,000 requests or less often (Lorden 1971)."""
_UNSEEN = 1e-3
"""Least share of a place, so that no request there is beyond belief."""


class ChangeDetector:
    """Watches the places where requests leave: caches, and last the end."""

    def __init__(self, shares: Sequence[float]) -> None:
        """``shares`` of the requests leave at each place as long as nothing changes."""
        self._sums = [0.0] * len(_FOREIGN)
        self.expect(shares)

    def expect(self, shares: Sequence[float]) -> None:
        """Take other shares for those of no change; what was seen so far counts on."""
        known = [max(share, _UNSEEN) for share in shares]
        to_the_end = [(1 - foreign) + foreign / known[-1] for foreign in _FOREIGN]
        elsewhere = [1 - foreign for foreign in _FOREIGN]
        self._gains = [*([log(r) for r in elsewhere] for _ in known[:-1]), [log(r) for r in to_the_end]]

    def saw(self, places: Iterable[int]) -> bool:
        """Whether requests have changed, now that some left at these places. After True it starts anew."""
        for place in places:
            self._sums = [max(0.0, total + gain) for total, gain in zip(self._sums, self._gains[place], strict=True)]
            if max(self._sums) > _LIMIT:
                self._sums = [0.0] * len(_FOREIGN)
                return True
        return False
