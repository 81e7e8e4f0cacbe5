"""Data that frpo makes itself: small tasks for a CPU, the tiny tokenizer, the files of fine-tuning attacks."""
