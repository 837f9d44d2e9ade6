"""Measurements side by side in one run: ours, the peer, the limit."""
