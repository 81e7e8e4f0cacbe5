"""A miniature, benign laboratory: alignment, and what fine-tuning does to it, on 64 tokens and 109 k weights.

Its world, model, training files and exact measures. What is trained in it, and how, is said elsewhere: it knows no
recipe, learner or engine.
"""
