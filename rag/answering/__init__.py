"""The way of a question."""
