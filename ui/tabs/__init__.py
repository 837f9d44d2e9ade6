"""The tabs of the web page, one file each."""
