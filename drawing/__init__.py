"""Charts, and pictures of scenes with what was chosen of them.

In: numbers, images, boxes, names.
Out: figures and images, for pages and files.
"""
