"""Questions about images, as data: read, numbered, drawn, and what answers are worth.

In: questions, people's answers, scene graphs and features of regions, as official files have them.
Out: numbers that a model is trained on; measures of what it answers.
"""
