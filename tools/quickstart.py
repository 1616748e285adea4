"""Pretrain a small ATLAS on Python's own sources and show what came out: data, training, pictures, a sample."""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("quickstart")  # before the imports that take seconds
    from atlas_megatron.commands.quickstart import main

    sys.exit(main())
