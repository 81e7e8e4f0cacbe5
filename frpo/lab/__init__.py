"""A miniature, benign laboratory of 64 tokens and 109 k weights, to study alignment and how fine-tuning changes it.

The package has the laboratory's world, model, training files and exact measures. It does not import recipes, learners
or engines; other packages define the trainings.
"""
