"""Several runs: repeated with other seeds and folds, summarised, and compared, question by question or image by image.

In: options and what makes a run, or run folders. Out: a table over runs, and paired differences with intervals.
"""
