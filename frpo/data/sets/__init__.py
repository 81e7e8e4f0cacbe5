"""Make data within frpo: small tasks for a CPU, the tiny tokenizer, the files of fine-tuning attacks."""
