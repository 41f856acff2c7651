"""Speed, measured beside the peer in the same run: ``python -m benchmarks.NAME --help``."""
