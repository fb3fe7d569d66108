"""Images from files to batches: listed, split, and held in memory or read when they are needed.

In reading order:

    memory         memory that images may use
    workers        processes that decode images, and their results in order
    pixels         one image: from a file to RGB levels
    listing        a split before it is decoded: labels, and where each image lies
    image_files    files below a folder: images, what lies beside them, links
    holdout        a test split that is cut from a single one
    class_layout   whether folders are splits or classes
    class_folders  the images of folders whose names are the classes
    tar_shards     tar files of images and labels, written into tables once
    named_files    images that a metadata file beside them names
    arrow          data sets that the datasets library opens
    columns        which column of a table holds the images, and which the classes
    table_splits   the splits of those data sets as listings
    catalogue      where a data set lies, and the images of its splits
    pictures       images of a split that are read when they are needed
    splits         images and labels, and what tells them from others
    progress       how far the reading of many images is
    kept           the folder of the cache: what is kept in it, its limit
    parts          parts of a set that is being decoded, so that a start goes on there
    cache          decoded images, kept on disk
    decode         the images of a split as one array
    checking       a data set looked at as a whole: every image is read
    survey         what is measured on some images: sizes, depth of grey, levels
    selection      which images are trained on, held out, or used with their labels
    feeds          where images come from: all in memory, or read when they are needed
    augment        the words of --augment: read, checked, applied
    sources        data sets, read: from the hub, a local folder, or scikit-learn's digits
    mixing         mixup and CutMix: how each batch is mixed with itself
    batches        sets of images: order, crop, flip and normalisation
    loader         a set whose images workers read and cut
    items          a Dataset of the caller's: order and draws are ours
    stream         batches of the caller's: a DataLoader, or what yields them
    given          what a caller of learn gives: looked at, or refused
    images         the images of a run, as training and evaluation are given them
"""
