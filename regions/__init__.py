"""Regions of images: read from files of bottom-up attention features, or computed by a CLIP.

In: files and folders of features; a CLIP and images.
Out: for each image, vectors and boxes of its regions.
"""
