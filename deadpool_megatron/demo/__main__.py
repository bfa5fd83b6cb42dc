"""``python -m deadpool_megatron.demo``; `scripts/demo.sh` sets everything up before it."""

import sys

from deadpool_megatron.demo import main

sys.exit(main())
