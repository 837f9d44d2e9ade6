"""The language model, its limits and its cache."""
