"""Everything a person touches: command line and web page."""
