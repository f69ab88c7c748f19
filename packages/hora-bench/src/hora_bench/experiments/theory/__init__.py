"""The paper's sample-efficiency theorems as a regression: what sharing identifies, and how fast.

NumPy and SciPy only. The theorems are about *recovery of the updates* when a head is redundant.
"""
