"""Scores for others: from a checkpoint to scores of any images, on the command line, from Python or in a browser.

In: a checkpoint, images, prompts. Out: scores in MOS units, and maps of what raised them.
"""
