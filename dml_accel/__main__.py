"""``python -m dml_accel`` is ``dml-accel``."""

import sys

from dml_accel.cli import main

if __name__ == "__main__":
    sys.exit(main())
