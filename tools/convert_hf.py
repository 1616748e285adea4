"""Convert between Megatron checkpoints and Hugging Face folders."""

import sys

from atlas_megatron.cli.ending import say_interrupts

if __name__ == "__main__":
    say_interrupts("convert_hf")  # before the imports that take seconds
    from atlas_megatron.commands.convert_hf import main

    sys.exit(main())
