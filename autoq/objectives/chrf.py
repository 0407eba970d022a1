"""chrF2 of generated texts, from 0 to 100 (Popović 2015), as sacreBLEU has it.

The F-score, β = 2, of character n-grams, n = 1 to 6, over the corpus. The standard error is the bootstrap's over
examples.
"""

from __future__ import annotations

from autoq.objectives._sacrebleu import CorpusScore


class ChrF(CorpusScore):
    """Corpus chrF2."""

    unit = "chrF2"
    metric = "CHRF"
