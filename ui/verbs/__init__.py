"""The verbs of `fathom`, a file for each thing they are about."""
