"""Between a person and a run: the command line and settings by name, advice before it, diagnosis after it.

In: flags, facts and histories. Out: options; remarks and proposals, each with a command.
"""
