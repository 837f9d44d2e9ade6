"""From a file's bytes to canonical text, in a guarded subprocess."""
