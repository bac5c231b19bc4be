"""A trained run for others, who have none of this: ONNX, a tokenizer, a script that scores, and a card.

In: a checkpoint. Out: a folder that needs neither torch nor this project.
"""
