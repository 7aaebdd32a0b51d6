"""``python -m latent_shift`` is the ``latent-shift`` command."""

import sys

from latent_shift.cli import main

sys.exit(main())
