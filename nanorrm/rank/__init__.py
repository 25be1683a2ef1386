"""Many responses: tournaments, ratings, the best of N."""
