"""Answering: from documents in the store to a cited answer with its receipt."""
