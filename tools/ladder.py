"""The ladder of sizes from one dial: show its rungs, or write their TOMLs and the lists that launch/ladder.sh reads."""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("ladder")  # before the imports that take seconds
    from atlas_megatron.commands.ladder import main

    sys.exit(main())
