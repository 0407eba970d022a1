"""BLEU of generated texts, from 0 to 100 (Papineni et al. 2002), as sacreBLEU has it (Post 2018).

Corpus BLEU with sacreBLEU's defaults: its 13a tokenizer, case kept, exponential smoothing. The counts of an
example are its matching and possible n-grams for n = 1 to 4 and both lengths. The standard error is the
bootstrap's over examples (Koehn 2004).
"""

from __future__ import annotations

from autoq.objectives._sacrebleu import CorpusScore


class Bleu(CorpusScore):
    """Corpus BLEU."""

    unit = "BLEU"
    metric = "BLEU"
