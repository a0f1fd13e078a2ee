"""`python -m rwkv_miss` is `rwkv-miss`."""

import sys

from rwkv_miss.cli import main

sys.exit(main())
