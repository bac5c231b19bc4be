"""Scores for others: from a checkpoint to scores of any images, by command line, Python, or browser.

In: a checkpoint, images, prompts. Out: scores in MOS units, and maps of what raised them.
"""
