"""Data sets: known ones, any CSV, and a drawn one; several joined.

In: files. Out: a checked `examples.Examples`, split and scaled; `data.py` puts the steps together.
"""
