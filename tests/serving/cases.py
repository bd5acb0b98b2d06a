"""The tiny models that ``write_references.py`` writes and every server is tested with."""

CASES = (
    "pivoted",
    "factors",
    "neurons",
    "heads",
    "heads-factors",
    "dense-kept",
    "excluded",
    "odd-width",
    "embedding",
    "head",
    "qwen2",
    "phi3",
    "qwen3",
)
