"""Read, render and tokenize rows of a data set, and lay out samples as learner batches over ranks.

This package does not sample, score or train, and starts no engine.
"""
