"""What scores are worth: measures, floors, repeated runs, comparisons.

In: scores and a checked data set, or run folders. Out: plain values and tables.
"""
