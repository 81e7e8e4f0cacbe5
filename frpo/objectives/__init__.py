"""What is optimised: advantages of a group (NumPy, controller) and losses of tokens (Torch, learner).

No I/O, no Ray, no collectives: everything here runs on any CPU. A new estimator is one new file of this package.
"""
