"""Benchmarks: a card for people, one JSON line for programs."""
