"""The first program's own parts: from a `TrainingConfig` to a run, step by step. `baseline.run` calls them in order.

In: options. Out: an `Experiment`, what is trained of it, and the files of its run folder.
"""
