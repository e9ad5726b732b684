"""`python -m fedtrust` is the `fedtrust` command."""

import sys

from fedtrust.cli import main

sys.exit(main())
