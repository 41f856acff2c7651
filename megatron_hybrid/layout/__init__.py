"""Pure arithmetic about a model and its layout: pattern, parameters, FLOPs and pipeline stages. Imports no torch."""
