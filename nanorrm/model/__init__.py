"""The transformer, its folders on disk, its tokenizer."""
