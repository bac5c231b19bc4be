"""A trained run for others: as ONNX with a script that scores, or on the Hugging Face hub; with a model card.

In: a checkpoint, and what its run has measured. Out: a folder that needs neither torch nor this project; a repository.
"""
