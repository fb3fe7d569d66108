"""Images from files to batches: decoded once, split, and kept in memory.

In reading order:

    decode   the images of a split as one array, their labels, and the cache of both
    sources  data sets: from the hub, from a local folder, or scikit-learn's digits
    batches  splits and batches: order, crop, flip and normalisation
"""
