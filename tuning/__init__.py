"""Search over options: its space, its study, its queue of trials, and what mattered.

In: options and a space. Out: trials, their table, the best options.
"""
