"""Bytes on disk, safely: written whole or not at all, read with a bound, locked.

In: values and paths. Out: files, or values from files that anybody may have written.
"""
