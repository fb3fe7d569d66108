"""Use of trained networks: evaluation, prediction and export.

In reading order:

    load.py        trained peers of a run or a folder, and their networks ready to predict
    evaluate.py    metrics on a data set, accuracy by class, the confusion matrix
    predict.py     the likeliest classes of image files
    onnx.py        a network as an ONNX file, checked against torch
    export.py      networks as a folder of their own: safetensors for timm, or ONNX
"""
