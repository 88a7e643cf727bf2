"""The only place with torch: gradients, fine-tunes and evaluations."""
