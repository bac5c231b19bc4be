"""Pictures and HTML of runs and comparisons; the templates lie beside the code.

In: run folders, read only. Out: self-contained pages and PNG files.
"""
