"""Questions about images: the second program's own parts.

In: questions, people's answers and features of regions, as official files have them.
Out: what a model is trained on, its fine branch, and what answers are worth.
"""
