"""Where a CLIP comes from and how much of it is trained.

In: a name, a folder, a checkpoint. Out: a `loading.Backbone`, whose towers can be entered between any two blocks.
"""
