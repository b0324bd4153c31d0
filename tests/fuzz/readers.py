"""All readers, by name."""

from tests.fuzz import imatrix, own, pickled, tokenizers, weights

READERS = {**weights.READERS, **pickled.READERS, **tokenizers.READERS, **own.READERS, **imatrix.READERS}
