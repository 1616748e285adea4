"""Draw runs:"""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("plot")  # before the imports that take seconds
    from atlas_megatron.commands.plot import main

    sys.exit(main())
