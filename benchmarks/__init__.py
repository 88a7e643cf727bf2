"""Programs that measure what a feature costs and what it keeps."""
