"""Trained networks: loading, evaluation, prediction and export.

In reading order:

    load         the trained peers of a run or of a folder, ready to predict
    checkpoints  the same from a checkpoint, of a run that may not be finished
    evaluate     metrics on a data set, accuracy by class, the confusion matrix
    images       which images are evaluated on, and the folder that receives the results
    predict      the most likely classes of image files
    onnx         a network as an ONNX file, compared with torch
    export       a network in a folder of its own: safetensors for timm, or ONNX
    own          the same of a module of the caller's, which learn has trained
"""
