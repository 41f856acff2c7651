"""Float8 training: formats, delayed and current scaling, and the linear that uses them (docs/fp8.md)."""
