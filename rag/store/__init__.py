"""The only truth: one SQL database."""
