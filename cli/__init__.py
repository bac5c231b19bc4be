"""Options of a program: each a dataclass field, from which flag, check, help and JSON follow.

In: a `Config` class and a command line. Out: checked options, or an error of one line.
"""
