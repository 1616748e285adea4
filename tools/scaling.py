"""Loss against compute:"""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("scaling")  # before the imports that take seconds
    from atlas_megatron.commands.scaling import main

    sys.exit(main())
