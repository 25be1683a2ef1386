"""What a judge is worth: benchmarks, statistics, scaling, the report."""
