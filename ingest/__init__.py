"""From a file to a searchable document."""
