"""What any training needs: processes, the loop, resuming, run folders. It knows nothing of what is trained.

In: a model, batches, losses. Out: trained weights, a history, and a folder from which it goes on.
"""
