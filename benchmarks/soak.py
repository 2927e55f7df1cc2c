"""20,000 tokens decoded one by one on a tiny model: memory and time a token, against what the context explains."""

TOKENS, SECTION = 20_000, 1_000
