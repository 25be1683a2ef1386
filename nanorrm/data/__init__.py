"""What is read: files of comparisons and queries, the embedded world, answers."""
