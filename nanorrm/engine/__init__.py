"""Generation: continuous batching over a paged cache."""
