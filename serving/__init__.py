"""Scores for others: from a checkpoint to scores of any images, by command line, Python, browser, or ONNX.

In: a checkpoint, images, prompts. Out: scores in MOS units, maps of what raised them, and the scorer itself as ONNX.
"""
