"""Deep Mutual Learning (Zhang et al., CVPR 2018): networks that teach each other.

Importing the package registers its networks with timm.
"""

from dml_accel import networks

__all__ = ["__version__", "networks"]
__version__ = "0.1.0"
