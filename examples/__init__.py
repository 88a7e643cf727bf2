"""Programs that show what gradstore does."""
