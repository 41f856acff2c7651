"""Tensor operations: for each a specification in plain torch and faster versions beside it, chosen by name through `registry.select`."""
