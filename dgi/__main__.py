"""``python -m dgi`` is ``dgi``; ``torchrun -m dgi train …`` trains with several processes."""

import sys

from dgi.cli import main

if __name__ == "__main__":
    sys.exit(main())
