"""``python -m lora_svd.cli``: the ``lora-svd`` command."""

import sys

from lora_svd_command import main

sys.exit(main())
