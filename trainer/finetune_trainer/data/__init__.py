"""Data files to micro-batches: readers, formats, tokenizer, encoding, batching."""
