"""Networks that answer questions about images, each by another way of looking.

In: numbers of words, features and boxes of regions, as tensors.
Out: a logit for each answer.
"""
