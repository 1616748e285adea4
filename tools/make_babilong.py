"""Write examples of BABILong to fine-tune on: stories of bAbI's kind told anew and hidden in text of yours."""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("make_babilong")  # before the imports that take seconds
    from atlas_megatron.commands.make_babilong import main

    sys.exit(main())
