"""MiniPuzzle: score, search, prune and distil a hybrid model to a memory or latency target (arXiv 2504.03624, section 3)."""
