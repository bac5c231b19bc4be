"""A run of the VQA trainer, `main.py`: what is built from its options, trained, measured and told.

In: a `VQAConfig`.
Out: a run folder with weights, results and a page; answers to questions.
"""
