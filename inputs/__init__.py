"""From image files and texts to batches on the device; what frozen layers make of them is computed once.

In: checked files, texts, a CLIP. Out: batches.
"""
