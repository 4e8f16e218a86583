"""Learning of language models: batch in, weights out. Knows no engine and no environment; `rl` joins them."""
