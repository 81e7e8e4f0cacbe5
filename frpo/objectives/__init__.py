"""Define the objectives: advantages of a group (NumPy, controller) and losses of tokens (Torch, learner).

There is no I/O, no Ray and no collective: everything here runs on any CPU. A new estimator is one new file of this
package.
"""
