"""Command lines over the packages, each run as ``python -m tools.NAME``."""
