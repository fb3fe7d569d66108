"""Images from files to batches: decoded once, split, and kept in memory.

In reading order:

    workers        processes that decode images, and their results in order
    pixels         one image: from a file to RGB levels
    listing        a split before it is decoded: labels, and where each image lies
    image_files    files below a folder: images, what lies beside them, links
    holdout        a test split that is cut from a single one
    class_layout   whether folders are splits or classes
    class_folders  the images of folders whose names are the classes
    arrow          data sets that the datasets library opens
    columns        which column of a table holds the images, and which the classes
    table_splits   the splits of those data sets as listings
    catalogue      where a data set lies, and the images of its splits
    splits         decoded images and labels, and what tells them from others
    memory         memory that images may use
    progress       how far the reading of many images is
    kept           the folder of the cache: what is kept in it, its limit
    parts          parts of a set that is being decoded, so that a start goes on there
    cache          decoded images, kept on disk
    decode         the images of a split as one array
    selection      which images are trained on, held out, or used with their labels
    augment        the words of --augment: read, checked, applied
    sources        data sets, read: from the hub, a local folder, or scikit-learn's digits
    mixing         mixup and CutMix: how each batch is mixed with itself
    batches        splits and batches: order, crop, flip and normalisation
"""
