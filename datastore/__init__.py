"""What is on disk and the arithmetic over it: no torch, no web."""
